"""Calls that a thread makes for its owner: in their order, one waiting at most, and none after one that failed."""

import os
import signal
import threading
from concurrent.futures import Future

import pytest

from flexkern.render.backlog import THREAD, Backlog


@pytest.fixture
def backlog():
    with Backlog() as backlog:
        yield backlog


def test_calls_are_made_in_their_order_on_one_thread(backlog):
    made = []
    for number in range(20):
        backlog.add(lambda number=number: made.append((number, threading.current_thread().name)))
    backlog.drain()
    assert [number for number, _ in made] == list(range(20))
    assert {name.rpartition("_")[0] for _, name in made} == {THREAD} and len({name for _, name in made}) == 1


def test_one_call_waits_and_the_next_is_waited_for(backlog, monkeypatch):
    """The first call ends when the owner waits for it: with the third, and neither sooner nor later."""
    gate, asked, made, result = threading.Event(), [], [], Future.result

    def waited_for(future, *given):
        asked.append(len(made))
        gate.set()
        return result(future, *given)

    monkeypatch.setattr(Future, "result", waited_for)
    backlog.add(lambda: gate.wait(10) and made.append(0))
    backlog.add(lambda: made.append(1))
    assert asked == [] and made == [] and backlog.waited < 1
    backlog.make_room()
    assert asked[0] == 0 and made[:1] == [0]
    backlog.add(lambda: made.append(2))
    backlog.drain()
    assert made == [0, 1, 2]


def test_waiting_is_counted():
    backlog, slow = Backlog(), threading.Event()
    backlog.add(lambda: slow.wait(0.05))
    assert backlog.waited < 0.05
    backlog.close()
    assert backlog.waited > 0.02


@pytest.mark.parametrize("how", ["add", "make_room", "drain", "close"])
def test_no_call_after_one_that_failed_is_made_and_the_owner_hears_of_it(how):
    backlog, made, gate = Backlog(), [], threading.Event()
    error = OSError(28, "No space left on device")

    def fail():
        gate.wait(10)
        raise error

    backlog.add(fail)
    backlog.add(lambda: made.append(1))
    gate.set()
    more = (lambda: made.append(2),) if how == "add" else ()
    with pytest.raises(OSError) as told:
        getattr(backlog, how)(*more)
    assert told.value is error
    if how != "close":
        with pytest.raises(OSError):
            backlog.close()
    backlog.close()
    assert made == []


def test_an_error_of_a_call_comes_before_what_came_after_it():
    """Without a thread the block would not have come so far."""

    def fail():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError) as told, Backlog() as backlog:
        backlog.add(fail)
        raise KeyboardInterrupt
    assert isinstance(told.value.__context__, KeyboardInterrupt)


@pytest.mark.parametrize("how", ["make_room", "add", "drain", "close"])
def test_a_signal_waits_for_what_the_owner_waits_for(how, monkeypatch):
    backlog, made, gate, result = Backlog(), [], threading.Event(), Future.result

    def interrupt():
        gate.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        gate.clear()
        gate.wait(0.02)  # in which the owner would be gone
        made.append(0)

    monkeypatch.setattr(Future, "result", lambda future: gate.set() or result(future))  # when the owner waits
    backlog.add(interrupt)
    backlog.add(lambda: made.append(1))
    more = (lambda: made.append(2),) if how == "add" else ()
    with pytest.raises(KeyboardInterrupt):
        getattr(backlog, how)(*more)
    assert made[:1] == [0] and (how in ("make_room", "add") or made == [0, 1])
    backlog.close()
    assert made == [0, 1, *(2 for _ in more)]


def test_the_thread_is_gone_when_it_is_closed():
    before = threading.active_count()
    with Backlog() as backlog:
        backlog.add(lambda: None)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        backlog.add(lambda: None)
