"""What is written while the next chunk is made: calls that a thread makes for its owner, in the order they were added.

    backlog = Backlog()
    with backlog:
        backlog.add(write)  # waits only where another call is waiting already
        backlog.drain()     # whatever was added is done
    # everything is done, and the thread has ended

A call that raises is the last: none after it is made, and the owner gets its error when it next adds, drains or closes.
So of chunks that follow each other none is left out.

Bytes: what two calls hold, that which is being made and that which waits.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from flexkern.render.signals import uninterrupted

THREAD = "flexkern-writer"
WAITING = 1  # calls, besides the one that is being made


class Backlog:
    """Calls that a thread makes; a context manager that closes it. Of one owner, which adds and waits on one thread.

    Signals that stop a render wait while the owner does, as they do for a picture that the owner writes itself.

    Attributes:
        waited: Seconds that the owner stood still for the calls so far.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, THREAD)
        self._added: deque[Future[None]] = deque()
        self._error: BaseException | None = None

    def make_room(self) -> None:
        """Wait until a call can be added at once. Raises what a call raised."""
        with uninterrupted():
            self._wait(WAITING)

    def add(self, call: Callable[[], object]) -> None:
        """The call is made after those before it. Waits where as many wait as may; raises what one of them raised."""
        with uninterrupted():
            self._wait(WAITING)
            self._added.append(self._thread.submit(self._make, call))

    def drain(self) -> None:
        """Every call so far is made. Raises what one of them raised."""
        with uninterrupted():
            self._wait(0)

    def close(self) -> None:
        """Every call so far is made, and the thread has ended; again is harmless. Raises what a call raised, once."""
        with uninterrupted():
            try:
                self._wait(0)
            finally:
                self._thread.shutdown()
                self._error = None  # whose traceback holds this

    def _wait(self, most: int) -> None:
        """Until at most so many of the calls are not made yet."""
        began = time.perf_counter()
        while self._added and (len(self._added) > most or self._added[0].done()):
            self._added[0].result()
            self._added.popleft()
        self.waited += time.perf_counter() - began
        if self._error is not None:
            raise self._error

    def _make(self, call: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            call()
        except BaseException as error:  # whatever it is, the owner raises it
            self._error = error

    def __enter__(self) -> "Backlog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
