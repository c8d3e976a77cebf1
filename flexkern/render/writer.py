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

BT709 = 1  # of primaries, transfer and matrix alike, in ITU-T H.273
SAME_EVERYWHERE = "cpu-independent=1"  # else bits vary with the vector code x264 finds, in AVX-512 from run to run
MOVFLAGS = "+hybrid_fragmented+delay_moov"  # delay_moov: the edit list that lets B-frames start at time 0


def check_target(path: str | Path) -> None:
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
    """Ctrl-C waits until the block is done, so that it never splits a picture from its place in the file."""
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


class VideoWriter:
    """A video file that is open for writing; a context manager that leaves a playable file however it is left.

        with VideoWriter("video.mp4", 288, 288, fps=16) as writer:
            writer.write(pixels)

    pictures: written so far. An existing file is replaced with the first picture, and stays where none is written.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int = 16, *, crf: int = 18):
        """fps: pictures per second. crf: quality of x264, 0 (lossless) to 51; 18 looks like the original.

        Raises what ``check_target`` does, and ValueError for sizes that 4:2:0 cannot hold.
        """
        check_target(path)
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
        self._container = self._stream = None
        self._closed = False

    def _open(self) -> None:
        options = {"movflags": MOVFLAGS, "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=options)
        # g bounds x264's look-ahead as well, which dies with the process
        x264 = {"crf": str(self.crf), "g": str(self.fps), "threads": "1", "x264-params": SAME_EVERYWHERE}
        stream = self._container.add_stream("libx264", rate=self.fps, options=x264)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        tags = stream.codec_context
        tags.color_primaries = tags.color_trc = tags.colorspace = BT709
        tags.color_range = ColorRange.MPEG
        self._stream = stream

    def write(self, pixels: np.ndarray) -> None:
        """Append pictures, uint8 [pictures, height, width, 3] in RGB. Raises ValueError for else, or once closed."""
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        expected = (self.height, self.width, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"pixels must be uint8 [pictures, {', '.join(map(str, expected))}], got {got}")
        for picture in pixels:
            with uninterrupted():
                if self._container is None:
                    self._open()
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                frame.pts = self.pictures
                self._container.mux(self._stream.encode(frame))
                self.pictures += 1

    def close(self) -> None:
        """Finish the file; where no picture was written, leave what was there before."""
        with uninterrupted():
            container, self._container, self._closed = self._container, None, True
            if container is not None:
                with container:  # closed even where the last packets find no room
                    container.mux(self._stream.encode())
            elif self.pictures == 0 and self._new:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()
