"""Pictures into an H.264 MP4 as they are made.

While it grows, the file is a fragmented MP4 of closed groups of one second, each complete on disk before the next
begins: a process killed without warning leaves all but the last two seconds or so (one group and the encoder's
look-ahead). Closing turns it, in place, into a plain MP4 with one index, which every player can seek.

Numerics: RGB to limited-range BT.709 4:2:0, tagged as such; equal pictures give equal bytes, on any CPU.
Bytes: the index of the file, some 100 per picture, is all that grows in memory.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

BT709 = 1  # of primaries, transfer and matrix alike, in ITU-T H.273
SAME_EVERYWHERE = "cpu-independent=1"  # else bits vary with the vector code x264 finds, in AVX-512 from run to run
MOVFLAGS = "+hybrid_fragmented+delay_moov"  # delay_moov: the edit list that lets B-frames start at time 0


def validate_target(path: str | Path) -> None:
    """Raises ValueError, FileNotFoundError or PermissionError where no video can be written to the path."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of an .mp4 file")
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"the video must be named .mp4, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(f"no permission to write {target}")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that a picture is never encoded without being counted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if held:
        signal.raise_signal(signal.SIGINT)


class _Stream:
    """An MP4 that has been begun."""

    def __init__(self, path: Path, width: int, height: int, fps: int, crf: int):
        options = {"movflags": MOVFLAGS, "flush_packets": "1"}
        self._container = av.open(str(path), "w", format="mp4", options=options)
        # g bounds x264's look-ahead as well, which dies with the process
        x264 = {"crf": str(crf), "g": str(fps), "threads": "1", "x264-params": SAME_EVERYWHERE}
        self._stream = self._container.add_stream("libx264", rate=fps, options=x264)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        tags = self._stream.codec_context
        tags.color_primaries = tags.color_trc = tags.colorspace = BT709
        tags.color_range = ColorRange.MPEG

    def write(self, picture: NDArray[np.uint8], number: int) -> None:
        """Append a picture, [height, width, 3] in RGB, as the one of this number."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        frame.pts = number
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        with self._container:  # closed even where the last packets find no room
            self._container.mux(self._stream.encode())


class VideoWriter:
    """A video file that is open for writing; a context manager that leaves a playable file however it is left.

        with VideoWriter("video.mp4", 288, 288, fps=16) as writer:
            writer.write(pixels)

    pictures: written so far. An existing file is replaced with the first picture, and stays where none is written.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int = 16, *, crf: int = 18):
        """Nothing is written yet.

        Args:
            path: The file, named .mp4.
            width: Of a picture, in pixels, even.
            height: Of a picture, in pixels, even.
            fps: Pictures per second.
            crf: Quality of x264, 0 (lossless) to 51; 18 looks like the original.

        Raises:
            ValueError: The name or a number will not do.
            FileNotFoundError: There is no folder for the file.
            PermissionError: The file cannot be written.
        """
        validate_target(path)
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even, yuv420p halves them, got {width}x{height}")
        if fps < 1:
            raise ValueError(f"fps must be at least 1, got {fps}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be in 0..51, got {crf}")
        self.path, self.width, self.height, self.fps, self.crf = Path(path), width, height, fps, crf
        self.pictures = 0
        self._new = not self.path.exists()
        with self.path.open("ab"):  # the last word on permission; leaves what is there
            pass
        self._stream: _Stream | None = None
        self._closed = False

    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Append pictures.

        Args:
            pixels: uint8 [pictures, height, width, 3], RGB.

        Raises:
            ValueError: The pixels have another dtype or shape, or the file is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        expected = (self.height, self.width, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"pixels must be uint8 [pictures, {', '.join(map(str, expected))}], got {got}")
        for picture in pixels:
            with uninterrupted():
                if self._stream is None:
                    self._stream = _Stream(self.path, self.width, self.height, self.fps, self.crf)
                self._stream.write(picture, self.pictures)
                self.pictures += 1

    def close(self) -> None:
        """Finish the file; where no picture was written, leave what was there before."""
        with uninterrupted():
            stream, self._stream, self._closed = self._stream, None, True
            if stream is not None:
                stream.close()
            elif self.pictures == 0 and self._new:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
