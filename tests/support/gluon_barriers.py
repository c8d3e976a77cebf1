"""The barriers that gluon_player.py plays: mbarriers in shared memory, and the named ones of the hardware."""


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes have."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int, expected: int) -> None:
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0, "an arrival too many"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count


class NamedBarrier:
    """A barrier of the hardware: over when so many threads have arrived, and then as it was in the beginning.

    Stricter than the hardware, which counts threads and does not look who they are.
    """

    def __init__(self):
        self.arrived: dict[str, int] = {}  # role: its threads
        self.round, self.expected = 0, None

    def arrive(self, role: str, threads: int, expected: int) -> None:
        assert self.expected in (None, expected), "two opinions of how many threads meet at a named barrier"
        assert role not in self.arrived, f"{role} arrives twice at a named barrier that is not over"
        self.expected = expected
        self.arrived[role] = threads
        assert sum(self.arrived.values()) <= expected, "too many threads at a named barrier"
        if sum(self.arrived.values()) == expected:
            self.arrived, self.round = {}, self.round + 1


class Barriers(list):
    def index(self, i) -> Barrier:
        return self[int(i)]
