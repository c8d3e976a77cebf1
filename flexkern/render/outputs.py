"""What a render may write besides an MP4 or MOV: a folder of pictures, or a stream to stdout.

A folder of pictures can be gone on with after a stop, as a video can; a stream cannot.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flexkern.checks import require
from flexkern.render.encoding import STDOUT, Encoding, exact_rate, numbered
from flexkern.render.signals import uninterrupted
from flexkern.render.target import GROWING, beside, sequence, sync_folder, validate_free, validate_name
from flexkern.render.writer import Stream, as_pictures, colours, load_av, validate_encoder, validate_target

if TYPE_CHECKING:
    from torch import Tensor

    Pixels = NDArray[np.uint8] | Tensor
LEVEL = 3  # of zlib, in PNG: half the time of the usual 6, a few percent larger


def validate_output(target: Path, encoding: Encoding) -> None:
    """Raise where no video of that encoding can be written to a target.

    Raises:
        ValueError: Name and format do not fit, or it is a folder, or stdout is a terminal.
        FileNotFoundError: There is no folder for it.
        PermissionError: It may not be written.
        BlockingIOError: Another render is writing it.
    """
    form = encoding.form(target)
    if target == STDOUT:
        terminal = sys.stdout is not None and sys.stdout.isatty()
        require(not terminal, "a video is not written to a terminal: pipe it, or give a file")
        return
    if form != "png":
        validate_target(target)
        return
    before, digits, after = numbered(target.name) or ("", 0, "")
    longest = f"{before}{0:0{max(digits, 12)}}{after}"
    validate_name(longest)
    folder = target.parent
    there = folder if folder.exists() else folder.parent
    require(there.is_dir() or not there.exists(), f"{there} is not a folder")
    if not there.is_dir():
        raise FileNotFoundError(f"there is no folder {there} to make {folder.name} in")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"no permission to write {there}")
    validate_free(target)


def validate_form(width: int, height: int, fps: int, encoding: Encoding, target: Path) -> None:
    """Raises ValueError or ImportError where pictures of that size cannot be written in the form of a target."""
    form, rate = encoding.form(target), encoding.rate(fps)
    if form == "png":
        import PIL.Image  # noqa: F401
    elif form == "y4m":
        require(width % 2 == 0 and height % 2 == 0, f"width and height must be even for y4m, got {width}x{height}")
        load_av()
    elif form != "rgb24":
        validate_encoder(width, height, rate, crf=encoding.crf, form=form)


class SequenceWriter:
    """A picture each, under the number that it has: shots/%06d.png becomes shots/000000.png and so on.

    Attributes:
        path: The name with the place of the number.
        pictures: Written so far.
        kept: The folder that holds them.
    """

    def __init__(self, path: Path, *, width: int, height: int, fps: float | Fraction = 16):
        """The folder is there; nothing is written yet.

        Args:
            path: A name such as shots/%06d.png.
            width: Of a picture, in pixels.
            height: Of a picture, in pixels.
            fps: Pictures per second, which the files do not say.
        """
        self.path, self.width, self.height, self.fps = path, width, height, exact_rate(fps)
        self.pictures = 0
        self.kept = path.parent

    def write(self, pixels: "Pixels") -> None:
        """Append pictures; see ``VideoWriter.write``. Pictures of an earlier render go before the first."""
        for picture in as_pictures(pixels, self.height, self.width):
            with uninterrupted():
                if not self.pictures:
                    for old in sequence(self.path):
                        old.unlink()
                self._save(picture)
                self.pictures += 1

    def _save(self, picture: NDArray[np.uint8]) -> None:
        from PIL import Image

        path = self._named(self.pictures)
        growing = beside(path, path.stem, f"{GROWING}{path.suffix}")
        try:
            Image.fromarray(np.ascontiguousarray(picture)).save(growing, format="PNG", compress_level=LEVEL)
            growing.replace(path)
        except BaseException as error:
            with suppress(OSError):
                growing.unlink()
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise

    def _named(self, number: int) -> Path:
        found = numbered(self.path.name)
        assert found is not None, "the order has checked the name"
        before, digits, after = found
        return self.path.with_name(f"{before}{number:0{digits}d}{after}")

    def state(self) -> dict[str, Any]:
        """How many pictures there are."""
        return {"pictures": self.pictures}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``. Raises ValueError where a picture of it is not there."""
        for number in range(state["pictures"]):
            if not self._named(number).is_file():
                raise ValueError(f"{self._named(number)} is not there, one of {state['pictures']} pictures")
        self.pictures = state["pictures"]

    def finish(self) -> None:
        """All pictures have their names on the disk."""
        sync_folder(self.path.parent)

    def stop(self) -> None:
        """What was written stays."""

    def discard(self) -> None:
        """Remove what was written."""
        for number in range(self.pictures):
            self._named(number).unlink(missing_ok=True)
        self.pictures = 0


class PipeWriter:
    """Pictures into a stream: a fragmented MP4, y4m, or the bytes of RGB.

    Attributes:
        pictures: Written so far.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        width: int,
        height: int,
        fps: float | Fraction,
        encoding: Encoding,
        about: Mapping[str, str] | None = None,
    ):
        """Nothing is written yet.

        Args:
            stream: Where they go; it is left open.
            width: Of a picture, in pixels.
            height: Of a picture, in pixels.
            fps: Pictures per second.
            encoding: Quality and form.
            about: Metadata of an MP4.
        """
        self.width, self.height, self.fps, self.pictures = width, height, exact_rate(fps), 0
        self._stream, self._form = stream, encoding.form(STDOUT)
        coded = self._form == "mp4"
        self._coded = Stream(stream, width, height, self.fps, encoding.crf, about=about, piped=True) if coded else None

    def write(self, pixels: "Pixels") -> None:
        """Append pictures; see ``VideoWriter.write``. Raises BrokenPipeError where nobody reads."""
        for picture in as_pictures(pixels, self.height, self.width):
            with uninterrupted():
                if self._coded is not None:
                    self._coded.write(picture, self.pictures)
                elif self._form == "y4m":
                    self._put(self._planes(picture))
                else:
                    self._put(np.ascontiguousarray(picture).tobytes())
                self.pictures += 1

    def _planes(self, picture: NDArray[np.uint8]) -> bytes:
        rate = Fraction(self.fps)
        about = f"W{self.width} H{self.height} F{rate.numerator}:{rate.denominator} Ip A1:1 C420mpeg2"
        head = "" if self.pictures else f"YUV4MPEG2 {about} XCOLORRANGE=LIMITED\n"
        frame = load_av().VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        planes: bytes = frame.reformat(format="yuv420p", **colours()).to_ndarray().tobytes()
        return f"{head}FRAME\n".encode() + planes

    def _put(self, data: bytes) -> None:
        left = memoryview(data)
        while len(left):
            left = left[self._stream.write(left) :]

    def close(self) -> None:
        """The stream has all pictures. Raises OSError where it takes no more."""
        coded, self._coded = self._coded, None
        if coded is not None:
            coded.close()
        self._stream.flush()
