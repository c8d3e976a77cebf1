"""A video while it grows: its finished segments as one MP4 that is sent as it is made.

Packets are copied, nothing is encoded again. What a reader has had counts in pictures, so it goes on across the moment
in which the segments become the whole file, and across a render that goes on from an earlier checkpoint.
"""

from fractions import Fraction
from pathlib import Path

from flexkern.render.segments import Joined
from flexkern.render.target import parts_name


class Gathering:
    """What is to be sent next: a file that only grows at its end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> int:
        """Keep it until it is taken."""
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """All that was written since."""
        taken, self._parts = b"".join(self._parts), []
        return taken


class Growing:
    """One reader of a video that may still be made.

    Args:
        video: The file that it becomes.
        rate: Pictures per second of the file.
    """

    def __init__(self, video: Path, *, rate: int | Fraction):
        self._video, self._rate = video, rate
        self._gathering = Gathering()
        self._joined = Joined(self._gathering, rate=rate, about={}, piped=True)
        self._segments, self._ended = 0, False

    def more(self, *, over: bool) -> bytes | None:
        """What there is besides what was given, empty where there is nothing yet; None where all was given.

        Args:
            over: Whether nothing more will become of the video.

        Raises:
            OSError: It is gone.
        """
        if self._ended:
            return None
        if self._video.is_file():
            self._joined.add(self._video, skip=self._joined.pictures)
            self._end()
        else:
            while (path := self._next()) is not None:
                try:
                    self._joined.add(path)
                except FileNotFoundError:  # the video has just become whole
                    break
                self._segments += 1
            if over and not self._video.is_file():
                self._end()
        return self._gathering.take()

    def _next(self) -> Path | None:
        """The next segment that is final."""
        path = parts_name(self._video) / f"{self._segments:06}{self._video.suffix}"
        return path if path.is_file() else None

    def _end(self) -> None:
        self._joined.close()
        self._ended = True

    def close(self) -> None:
        """The reader has gone, or has had everything."""
        if not self._ended:
            self._end()
