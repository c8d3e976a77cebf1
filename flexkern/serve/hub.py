"""What happens to videos, told from the threads that see it to the connections that follow it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

Message = tuple[str, dict[str, Any]]
"""kind and content: what a server-sent event has"""
BACKLOG = 1000  # messages that wait for a reader


class Lost(Exception):
    """A reader was too slow, and has missed something: it begins again."""


class Reader:
    """One connection that follows."""

    def __init__(self, wanted: Callable[[Message], bool]):
        self.wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._lost = False

    def put(self, message: Message | None) -> None:
        """From any thread. None ends it."""
        try:
            self._loop.call_soon_threadsafe(self._take, message)
        except RuntimeError:  # its loop is closed
            return

    def _take(self, message: Message | None) -> None:
        if message is not None and self._queue.qsize() >= BACKLOG:
            self._lost = True
        else:
            self._queue.put_nowait(message)

    async def next(self, patience: float) -> Message | None:
        """The next message, None at the end.

        Raises:
            TimeoutError: None came for so many seconds.
            Lost: One was left out.
        """
        if self._lost:
            raise Lost
        return await asyncio.wait_for(self._queue.get(), patience)


class Hub:
    """Readers, and what they are told."""

    def __init__(self) -> None:
        self._readers: set[Reader] = set()
        self._guard = threading.Lock()
        self.closed = False

    @asynccontextmanager
    async def reading(self, wanted: Callable[[Message], bool]) -> AsyncIterator[Reader]:
        """A reader of the messages that are wanted, from now on."""
        reader = Reader(wanted)
        with self._guard:
            self._readers.add(reader)
        if self.closed:
            reader.put(None)
        try:
            yield reader
        finally:
            with self._guard:
                self._readers.discard(reader)

    @property
    def readers(self) -> int:
        """How many follow."""
        with self._guard:
            return len(self._readers)

    def publish(self, kind: str, content: dict[str, Any]) -> None:
        """Tell those who want it; from any thread."""
        with self._guard:
            readers = list(self._readers)
        for reader in readers:
            if reader.wanted((kind, content)):
                reader.put((kind, content))

    def close(self) -> None:
        """Every connection ends."""
        self.closed = True
        with self._guard:
            readers = list(self._readers)
        for reader in readers:
            reader.put(None)
