"""What is said to a person beside the work: where it cannot be, the work goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def heard_by_nobody() -> Iterator[None]:
    """What cannot be told is not told; but for a reader who has left, which is raised."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


class Spoken:
    """A stream for what a person reads: a disk that is full, or a terminal that is gone, ends no render.

    A pipe whose reader has left still does: that reader wanted no more.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's, where that can be."""
        with heard_by_nobody():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's, where that can be."""
        with heard_by_nobody():
            self._stream.flush()
