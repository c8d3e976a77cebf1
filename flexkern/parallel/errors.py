"""What goes wrong between ranks; without torch, for whoever only handles it."""


class RankError(ConnectionError):
    """Another rank has ended, or does not answer: what all of them were computing is lost."""
