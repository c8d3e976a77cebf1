"""Sessions whose steps are watched: which video makes which chunk."""

from flexkern.session import Session


def watch_steps(monkeypatch, before):
    """``before(seed, chunk)`` is called before each step of any session, with the seed that it was begun with."""
    step, begin, seeds = Session.step, Session.__init__, {}

    def begun(session, *arguments, **options):
        begin(session, *arguments, **options)
        seeds[id(session)] = options["seed"]

    def watched(session):
        before(seeds[id(session)], session.chunks)
        return step(session)

    monkeypatch.setattr(Session, "__init__", begun)
    monkeypatch.setattr(Session, "step", watched)
