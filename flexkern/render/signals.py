"""Ctrl-C, SIGTERM and SIGHUP: they stop a render, but never in the middle of a picture."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ONE = 0.5  # seconds in which signals count as one: `timeout`, or a terminal that goes, sends the same one twice


class Leave:
    """A handler that ends the process where nothing can be saved yet, with one line, and else raises KeyboardInterrupt.

    While torch or NumPy loads nothing can be: in their C++ parts the exception would be an abort and a core dump.

    Args:
        program: Who says that it was interrupted.
        at_once: Whether nothing can be saved at any time.
    """

    def __init__(self, program: str, *, at_once: bool = False):
        self._program, self._at_once = program, at_once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or any(is_loading(name) for name in ("numpy", "torch")):
            with suppress(OSError):
                print(f"{self._program}: interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        raise KeyboardInterrupt


def leave_at_once(program: str) -> None:
    """From now on Ctrl-C ends the process with one line: for the imports of a module that is run as a program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, Leave(program, at_once=True))


@contextmanager
def leaving_quietly(program: str) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, but while torch or NumPy loads it ends the process at once, with one line."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler or isinstance(before, Leave)
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, Leave(program))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def is_loading(module: str) -> bool:
    """Whether a module is being imported right now."""
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


@contextmanager
def quietly(program: str) -> Iterator[None]:
    """Ctrl-C ends the program with one line on stderr and the status that a shell gives it, without a traceback."""
    try:
        with leaving_quietly(program):
            yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that stop a render wait until the block is done, so that no picture is encoded without being counted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    held: list[int] = []
    before = {number: handler for number in STOPS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


class Stop:
    """A handler that stops a block, with KeyboardInterrupt or by telling it.

    Args:
        waits: As ``stoppable`` has it.

    Attributes:
        came: The numbers of the signals that came.
        before: The handlers whose places this takes, by number.
    """

    def __init__(self, waits: Callable[[], bool]):
        self.came: list[int] = []
        self.before: dict[int, Any] = {}
        self._waits, self._first = waits, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        now = time.monotonic()
        if len(self.came) == 1:
            self._first = now
            if self._waits():
                return
        elif now - self._first < ONE:
            return
        before = self.before.get(number)
        if isinstance(before, (Leave, Stop)):  # of a block around this one, which is stopped as well
            before(number, frame)
        raise KeyboardInterrupt


@contextmanager
def stoppable(waits: Callable[[], bool] = lambda: False) -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end the block with KeyboardInterrupt, as Ctrl-C does. Yields the numbers of those that came.

    What somebody else handles or ignores, as nohup does SIGHUP, stays so; so does everything outside the main thread.
    A block in another one hears signals in its place.

    Args:
        waits: Asked when the first one comes, in the middle of whatever the block does. Where it says True nothing is
            raised: the block looks at what came, and stops by itself. A second one, half a second later or more, does
            not wait.
    """
    stop = Stop(waits)
    ours: list[int] = []
    if threading.current_thread() is threading.main_thread():
        usual = (signal.SIG_DFL, signal.default_int_handler)
        held = {number: signal.getsignal(number) for number in STOPS}
        ours = [number for number, handler in held.items() if handler in usual or isinstance(handler, (Leave, Stop))]
    for number in ours:
        stop.before[number] = signal.signal(number, stop)
    try:
        yield stop.came
    finally:
        for number, handler in stop.before.items():
            signal.signal(number, handler)
