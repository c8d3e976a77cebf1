"""Ctrl-C, SIGTERM and SIGHUP: they stop a render, but never in the middle of a picture."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def quietly(program: str) -> Iterator[None]:
    """Ctrl-C ends the program with one line on stderr and the status that a shell gives it, without a traceback."""
    try:
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


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end the block with KeyboardInterrupt, as Ctrl-C does. Yields the numbers of those that came.

    What somebody else handles or ignores, as nohup does SIGHUP, stays so; so does everything outside the main thread.
    """
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    ours: list[int] = []
    if threading.current_thread() is threading.main_thread():
        usual = (signal.SIG_DFL, signal.default_int_handler)
        ours = [number for number in STOPS if signal.getsignal(number) in usual]
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
