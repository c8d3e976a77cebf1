"""A video in segments, and the one file that they become.

Every segment but the last has the same number of pictures, so that where one ends depends on nothing but the number of
a picture. Each is an MP4 of its own, by an encoder of its own, and is final once it is closed: written to the disk,
then given its name. When the video is whole, the packets of all are copied into one file; nothing is encoded twice, and
the bytes do not depend on how often the render was stopped.

Bytes: the pictures of one segment are kept, for they are part of the state; on disk the video is there twice, for as
long as joining takes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexkern.render.encoding import exact_rate
from flexkern.render.parts import Parts
from flexkern.render.signals import uninterrupted
from flexkern.render.target import Target
from flexkern.render.writer import (
    MOVFLAGS,
    PIPED,
    Coded,
    PipeSink,
    Sink,
    VideoWriter,
    as_pictures,
    load_av,
    named_form,
    validate_encoder,
)
from flexkern.state import State

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 2  # of a segment
LEAST = 16  # pictures of a segment: with fewer x264 reorders less, and the first would not speak for all


class SegmentWriter:
    """Stands in for a ``VideoWriter`` where a render may be stopped and go on.

    Attributes:
        path: The file.
        pictures: Written so far; after an error, those that are kept.
        length: Pictures of a segment.
        kept: What holds the pictures so far: the segments' folder, or the file that they were joined to.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        width: int,
        height: int,
        fps: float | Fraction = 16,
        crf: int = 18,
        about: Mapping[str, str] | None = None,
    ):
        """The encoder has been tried; nothing is written yet.

        Args:
            parts: Of the file to write.
            width: Of a picture, in pixels, even.
            height: Of a picture, in pixels, even.
            fps: Pictures per second, 1 to 1000.
            crf: Quality of x264, 0 (lossless) to 51.
            about: Metadata of the file.

        Raises:
            ValueError: A number will not do.
            ImportError: PyAV is not installed, is too old, or has no x264.
        """
        validate_encoder(width, height, fps, crf=crf, form=named_form(parts.path))
        self.path, self.fps, self.about = parts.path, exact_rate(fps), dict(about or {})
        self.width, self.height, self.crf = width, height, crf
        self.length = max(LEAST, SECONDS * round(self.fps))
        self.pictures = 0
        self.kept: Path = parts.folder
        self._parts = parts
        self._closed = 0  # segments
        self._digest = ""
        self._segment: VideoWriter | None = None
        self._pending = np.empty((0, height, width, 3), dtype=np.uint8)  # of the open segment
        self._done = False

    def write(self, pixels: "NDArray[np.uint8] | Tensor") -> None:
        """Append pictures.

        Args:
            pixels: uint8 [pictures, height, width, 3], RGB, or one picture [height, width, 3]; an array, or a tensor
                on any device.

        Raises:
            ValueError: The pixels have another dtype or shape, or the file is closed.
            OSError: The disk has no room.
        """
        if self._done:
            raise ValueError(f"{self.path} is closed")
        for picture in as_pictures(pixels, self.height, self.width):
            with uninterrupted(), self._told():
                self._append(picture)

    def _append(self, picture: NDArray[np.uint8]) -> None:
        if not len(self._pending):
            self._pending = np.empty((self.length, self.height, self.width, 3), dtype=np.uint8)
        if self._segment is None:
            self._segment = self._open()
        self._segment.write(picture)
        self._pending[self._segment.pictures - 1] = picture
        self.pictures += 1
        if self._segment.pictures == self.length:
            self._close_segment()

    def _open(self) -> VideoWriter:
        path = self._parts.segment(self._closed, self.path.suffix.lower())
        return VideoWriter(path, self.width, self.height, self.fps, crf=self.crf)

    def _close_segment(self) -> None:
        assert self._segment is not None
        self._segment.close()
        self._digest = _chained(self._digest, self._segment.path)
        self._segment, self._closed = None, self._closed + 1

    def state(self) -> State:
        """What has to be there to go on from here: the closed segments, by their bytes, and the pictures after them."""
        import torch

        open_ = self._segment.pictures if self._segment is not None else 0
        state: State = {"segments": self._closed, "digest": self._digest}
        if open_:
            state["pending"] = torch.from_numpy(self._pending[:open_].copy())
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``; segments that were written after it are dropped.

        Raises:
            ValueError: The folder does not hold the segments of the state, bit for bit.
            OSError: The disk has no room.
        """
        digest, count = "", state["segments"]
        for path in self._files(count):
            if not path.is_file():
                raise ValueError(f"{path} is not there, one of {count} segments of the video")
            digest = _chained(digest, path)
        if digest != state["digest"]:
            raise ValueError(f"the first {count} segments in {self._parts.folder} are not those that were written")
        self._parts.drop_segments(count)
        self._closed, self._digest, self.pictures = count, digest, count * self.length
        if "pending" in state:
            self.write(state["pending"])

    def finish(self) -> None:
        """The file has its name, and holds every picture.

        Raises:
            OSError: The disk has no room; the segments stay.
        """
        with uninterrupted(), self._told():
            if self._segment is not None:
                self._close_segment()
            target = self._joined()
            target.commit()
            self._done, self.kept = True, self.path

    def stop(self) -> None:
        """What was written so far can be played, as ``kept``; nothing is raised where the disk has no room for it."""
        with uninterrupted():
            if self._done:
                return
            self._done = True
            last, self._segment = self._segment, None
            if last is not None:
                with suppress(OSError):  # what fitted is there, or nothing
                    last.close()
            there = [path for path in self._files(self._closed) if path.is_file()]
            self.pictures = min(self.pictures, len(there) * self.length)
            if last is not None and last.path.is_file() and len(there) == self._closed:
                self.pictures += last.pictures
                self._closed += 1
            if not self.pictures:
                return
            with suppress(OSError):  # no room for both
                target = self._joined()
                target.leave()
                self.kept = target.unfinished

    def _files(self, count: int) -> list[Path]:
        return [self._parts.segment(number, self.path.suffix.lower()) for number in range(count)]

    def _joined(self) -> Target:
        """The file under its unfinished name, with what the segments hold."""
        target = Target(self.path)
        try:
            target.begin()
            join(self._files(self._closed), target.file, rate=self.fps, about=self.about, form=named_form(self.path))
        except BaseException:
            target.discard()
            raise
        return target

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the block name the file that is rendered, and not one of its parts."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def join(
    segments: Sequence[Path], file: Any, *, rate: int | Fraction, about: Mapping[str, str], form: Coded = "mp4"
) -> None:
    """Copy the packets of videos that follow each other into one file, with one index.

    Args:
        segments: At least one, all by the same encoder; the first reorders pictures as far as any.
        file: Open for writing, empty.
        rate: Pictures per second, of all.
        about: Metadata of the file.
        form: mp4 or mov.

    Raises:
        OSError: The file has no room.
        ValueError: A segment is no video.
    """
    joined = Joined(file, rate=rate, about=about, form=form)
    with joined:
        for path in segments:
            joined.add(path)


class Joined:
    """A video that packets of others are copied into, in their order; a context manager that ends it.

    Attributes:
        pictures: Copied so far.
    """

    def __init__(
        self,
        file: Any,
        *,
        rate: int | Fraction,
        about: Mapping[str, str],
        form: Coded = "mp4",
        piped: bool = False,
    ):
        """Nothing is written yet.

        Args:
            file: Open for writing, empty; a pipe, where nothing is gone back to, has ``write`` alone.
            rate: Pictures per second, of all videos.
            about: Metadata.
            form: mp4 or mov.
            piped: Whether it is a pipe: what is copied can then be played before the end is there.
        """
        self.pictures = 0
        self._sink, self._rate, self._delay = (PipeSink if piped else Sink)(file), rate, 0
        options = {"movflags": PIPED if piped else MOVFLAGS, "flush_packets": "1"}
        self._film = load_av().open(self._sink, "w", format=form, options=options)
        self._film.metadata.update(about)
        self._stream: Any = None

    def add(self, path: Path, *, skip: int = 0) -> None:
        """Copy a video's packets, but for the first so many.

        Raises:
            OSError: There is no room for them, or no such file.
            ValueError: It is no video.
        """
        with path.open("rb") as opened, load_av().open(opened) as segment:
            (given,) = segment.streams.video
            self._stream = self._stream or self._film.add_stream_from_template(given)
            step, first, seen = int(1 / (self._rate * given.time_base)), self.pictures - skip, 0
            for packet in segment.demux(given):
                if not packet.size:
                    continue
                seen += 1
                self._delay = self._delay if self.pictures else -packet.dts // step
                if seen > skip:
                    packet.pts += first * step
                    packet.dts = (self.pictures - self._delay) * step  # even: a short last segment reorders less
                    packet.stream = self._stream
                    self._film.mux(packet)
                    self.pictures += 1
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """The video has its end. Raises OSError where there is no room for it."""
        self._film.close()
        if self._sink.error is not None:
            raise self._sink.error

    def __enter__(self) -> "Joined":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._film.close()


def _chained(digest: str, path: Path) -> str:
    """One hash for all files so far, in their order."""
    return hashlib.sha256(f"{digest} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode()).hexdigest()
