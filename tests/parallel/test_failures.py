"""A rank that ends takes the others with it, and is named."""

import os
import signal
import threading
import time

import pytest
from small_ranks import USUAL, make_model, prompt_of, video

from flexkern.engine import Engine
from flexkern.parallel import RankError, start_ranks
from flexkern.parallel.launch import Processes


@pytest.fixture
def started(monkeypatch):
    """Two ranks, a session on them, and the processes."""
    made = []
    begin = Processes.__init__
    monkeypatch.setattr(Processes, "__init__", lambda own, *given: made.append(own) or begin(own, *given))
    with start_ranks(2, "cpu") as ranks:
        session = Engine(make_model(), ranks=ranks, **USUAL).session(prompt_of(1), preset="self-forcing")
        session.step()
        yield ranks, session, made[0]
    assert all(process.poll() is not None for process in made[0].started.values())


def test_a_rank_that_fails_says_why(started):
    ranks, session, _ = started
    ranks.group.tell(("dance", {"forgotten": []}))
    with pytest.raises(RankError, match="rank 1 of 2 has failed: AttributeError: 'Follower' object has no .*'dance'"):
        session.step()
    with pytest.raises(RankError, match="rank 1 of 2 has failed"):  # and every time from then on
        session.step()
    assert repr(ranks) == "Ranks(2 on cpu, lost)" and ranks.lost.startswith("rank 1 of 2 has failed")


def test_a_rank_that_ends_while_nothing_is_computed_is_known_before_it_is_needed(started):
    ranks, _, processes = started
    assert ranks.lost is None
    processes.started[1].kill()
    until = time.monotonic() + 60
    while ranks.lost is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert ranks.lost == "rank 1 of 2 has ended, killed by signal 9"


def test_signals_are_for_rank_0_and_a_rank_that_is_killed_is_named(started):
    _, session, processes = started
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(processes.started[1].pid, number)
    session.step()
    threading.Timer(0.2, os.kill, (processes.started[1].pid, signal.SIGKILL)).start()
    with pytest.raises(RankError, match="rank 1 of 2 has ended, killed by signal 9"):
        video(session, 1000)


def test_a_pass_that_is_interrupted_ends_the_ranks(started, monkeypatch):
    ranks, session, _ = started

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.group, "gather", stop)
    with pytest.raises(KeyboardInterrupt):
        session.step()
    monkeypatch.undo()
    with pytest.raises(RankError, match="rank 0 left the others in the middle of a pass: KeyboardInterrupt"):
        session.step()
    began = time.monotonic()
    ranks.close()
    assert time.monotonic() - began < 5


def test_ranks_that_are_closed_say_so(started):
    ranks, session, _ = started
    ranks.close()
    with pytest.raises(RankError, match="the ranks have been closed"):
        session.step()


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RankError, match="rank 1 of 2 has ended, with status 1"):
        start_ranks(2, "cpu")


def test_devices():
    with pytest.raises(
        ValueError, match="count 2 takes the GPUs from 0 on: the device must be cuda or cpu, got cuda:1"
    ):
        start_ranks(2, "cuda:1")
    with pytest.raises(ValueError, match="count must be at most the . GPUs of this machine, got 99"):
        start_ranks(99, "cuda")
