"""Pictures into an MP4 of H.264, or a MOV of ProRes, as they are made.

While it grows, the file is a fragmented MP4 of closed groups of one second, each complete on disk before the next
begins: a process killed without warning leaves all but the last two seconds or so (one group and the encoder's
look-ahead), in ``video.unfinished.mp4`` beside ``video.mp4``. Closing turns it, in place, into a plain MP4 with one
index, which every player can seek, and gives it its name.

Numerics: RGB to limited-range BT.709, 4:2:0 of 8 bits or, in a MOV, 4:2:2 of 10, tagged as such; equal pictures give
equal bytes, on any CPU.
Bytes: the index of the file, some 100 per picture, is all that grows in memory.
"""

import importlib
import io
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flexkern.render.encoding import exact_rate
from flexkern.render.signals import uninterrupted
from flexkern.render.target import Target, validate_file

if TYPE_CHECKING:
    from torch import Tensor

Coded = Literal["mp4", "mov"]
OLDEST = 17, 1  # av; before it the suite fails
BT709 = 1  # of primaries, transfer and matrix alike, in ITU-T H.273
SAME_EVERYWHERE = "cpu-independent=1"  # else bits vary with the vector code x264 finds, in AVX-512 from run to run
CODECS = {"mp4": "libx264", "mov": "prores_ks"}
PIXELS = {"mp4": "yuv420p", "mov": "yuv422p10le"}
BLOCKS = 32, 16  # width, height: of other sizes FFmpeg's ProRes reads past the edge, and bytes differ from run to run
PIPED = "+frag_keyframe+delay_moov+default_base_moof"  # nothing is rewritten
MOVFLAGS = "+hybrid_fragmented+delay_moov"  # delay_moov: the edit list that lets B-frames start at time 0


def validate_target(path: str | Path) -> None:
    """Raise where no video can be written to the path.

    Raises:
        ValueError: It is not named .mp4 or .mov, or is a folder.
        FileNotFoundError: There is no folder for it.
        PermissionError: It may not be written.
        BlockingIOError: Another render is writing it.
    """
    validate_file(path, "the video", f".{named_form(path)}")


def named_form(path: str | Path) -> Coded:
    """What a file holds by its name: mov (ProRes) where it is named so, else mp4 (H.264)."""
    return "mov" if Path(path).suffix.lower() == ".mov" else "mp4"


@lru_cache(maxsize=16)
def validate_encoder(
    width: int, height: int, fps: float | Fraction = 16, *, crf: int = 18, form: Coded = "mp4"
) -> None:
    """Encode one black picture in memory, so that what would fail after hours of work fails now.

    Args:
        width: Of a picture, in pixels, even.
        height: Of a picture, in pixels, even.
        fps: Pictures per second.
        crf: Quality of x264.
        form: mp4 (H.264) or mov (ProRes).

    Raises:
        ValueError: x264 does not encode such pictures, or a number is out of range.
        ImportError: PyAV is not installed, is too old, or has no x264.
    """
    if width < 2 or height < 2 or width % 2 or height % 2:
        raise ValueError(f"width and height must be even, yuv420p halves them, got {width}x{height}")
    if form == "mov" and (width % BLOCKS[0] or height % BLOCKS[1]):
        blocks = f"a width that is a multiple of {BLOCKS[0]}, and a height of {BLOCKS[1]}"
        got = f"got pictures {width} wide and {height} high"
        raise ValueError(f"ProRes needs {blocks}, {got}: write pictures, as FOLDER/%06d.png")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be in 0..51, got {crf}")
    rate, av, memory = exact_rate(fps), load_av(), io.BytesIO()
    try:
        stream = Stream(memory, width, height, rate, crf, form)
        stream.write(np.zeros((height, width, 3), dtype=np.uint8), 0)
        stream.close()
        with av.open(io.BytesIO(memory.getvalue())) as video:
            assert sum(1 for _ in video.decode(video=0)) == 1, "one picture was encoded"
    except av.codec.codec.UnknownCodecError:
        advice = "pip install --force-reinstall av brings one that has"
        built = f"was built without {CODECS[form]}"
        raise ImportError(f"the av that is installed ({av.__version__}) {built}: {advice}") from None
    except av.FFmpegError as error:
        size, codec = f"{width}x{height} at {rate} per second", CODECS[form].removeprefix("lib")
        raise ValueError(f"{codec} does not encode pictures of {size}: {error}") from None


def load_av() -> Any:
    """PyAV. Raises ImportError where it is not there, or is too old."""
    av = importlib.import_module("av")
    if tuple(map(int, re.findall(r"\d+", av.__version__)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"writing video needs av {oldest} or newer, got {av.__version__}: pip install 'av>={oldest}'")
    return av


class Sink:
    """What FFmpeg writes to. It hears of no error, which it may answer with a segmentation fault.

    After the first, nothing more is written, so that the file stays what it was then.
    """

    def __init__(self, file: io.RawIOBase | io.BytesIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.error is None:
                left = left[self._file.write(left) :]  # a disk that is almost full takes a part
        except OSError as error:
            self.error = error
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class PipeSink(Sink):
    """A sink that cannot go back, and whose error is raised as it came."""

    seek = tell = None  # type: ignore[assignment]


class Stream:
    """An MP4 or MOV that has been begun, in a file that is open, or in a pipe."""

    def __init__(
        self,
        file: Any,
        width: int,
        height: int,
        rate: int | Fraction,
        crf: int,
        form: Coded = "mp4",
        *,
        about: Mapping[str, str] | None = None,
        piped: bool = False,
    ):
        """Nothing is written yet.

        Args:
            file: Has ``write``, and ``seek`` and ``tell`` unless it is a pipe.
            width: Of a picture, in pixels.
            height: Of a picture, in pixels.
            rate: Pictures per second.
            crf: Quality of x264.
            form: mp4 (H.264) or mov (ProRes 422 HQ).
            about: Metadata of the file.
            piped: Whether it cannot go back.
        """
        self._av, self._sink = load_av(), (PipeSink if piped else Sink)(file)
        self._pixels = PIXELS[form]
        self._colours = colours()
        options = {"movflags": PIPED if piped else MOVFLAGS, "flush_packets": "1"}
        self._container = self._av.open(self._sink, "w", format=form, options=options)
        if about:
            self._container.metadata.update(about)
        # g bounds x264's look-ahead as well, which dies with the process
        x264 = {"crf": str(crf), "g": str(round(rate)), "threads": "1", "x264-params": SAME_EVERYWHERE}
        prores = {"profile": "hq", "vendor": "apl0", "threads": "1"}
        self._stream = self._container.add_stream(CODECS[form], rate=rate, options=x264 if form == "mp4" else prores)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._pixels
        tags = self._stream.codec_context
        tags.color_primaries = tags.color_trc = tags.colorspace = BT709
        tags.color_range = self._colours["dst_color_range"]

    def write(self, picture: NDArray[np.uint8], number: int) -> None:
        """Append a picture, [height, width, 3] in RGB, as the one of this number."""
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format=self._pixels, **self._colours)
        frame.pts = number
        self._container.mux(self._stream.encode(frame))
        self._raise()

    def close(self) -> None:
        with self._container:  # closed even where the encoder fails
            self._container.mux(self._stream.encode())
        self._raise()

    def _raise(self) -> None:
        if self._sink.error is not None:
            raise self._sink.error


def colours() -> dict[str, Any]:
    """How RGB becomes YUV: BT.709 of limited range, as arguments of PyAV's reformat."""
    reformatter = importlib.import_module("av.video.reformatter")
    return {"dst_colorspace": reformatter.Colorspace.ITU709, "dst_color_range": reformatter.ColorRange.MPEG}


class VideoWriter:
    """A video file that is open for writing; a context manager that leaves a playable file however it is left.

        with VideoWriter("video.mp4", 288, 288, fps=16) as writer:
            writer.write(pixels)

    pictures: written so far; of a file that could not be finished, those that it holds. The file grows under another
    name, see ``flexkern.render.target``; an existing one is replaced when it is closed, and stays where nothing was
    written. No error of closing hides the one that came first.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: float | Fraction = 16,
        *,
        crf: int = 18,
        about: Mapping[str, str] | None = None,
    ):
        """The encoder has been tried, and the file is this writer's alone; nothing is written yet.

        Args:
            path: The file, named .mp4 (H.264) or .mov (ProRes 422 HQ).
            width: Of a picture, in pixels, even.
            height: Of a picture, in pixels, even.
            fps: Pictures per second, 1 to 1000: a whole number, a float such as 23.976, or a fraction.
            crf: Quality of x264, 0 (lossless) to 51; 18 looks like the original.
            about: Metadata of the file.

        Raises:
            ValueError: The name or a number will not do.
            FileNotFoundError: There is no folder for the file.
            PermissionError: The file cannot be written.
            BlockingIOError: Another writer has the file.
            ImportError: PyAV is not installed, is too old, or has no x264.
        """
        validate_target(path)
        self._form = named_form(path)
        validate_encoder(width, height, fps, crf=crf, form=self._form)
        self.path, self.width, self.height, self.fps, self.crf = Path(path), width, height, exact_rate(fps), crf
        self.pictures, self._about = 0, about
        self._target = Target(path)
        self._stream: Stream | None = None
        self._closed = False

    def write(self, pixels: "NDArray[np.uint8] | Tensor") -> None:
        """Append pictures.

        Args:
            pixels: uint8 [pictures, height, width, 3], RGB, or one picture [height, width, 3]; an array, or a tensor
                on any device.

        Raises:
            ValueError: The pixels have another dtype or shape, or the file is closed.
            OSError: The file has no room; it is finished with what it holds when it is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        for picture in as_pictures(pixels, self.height, self.width):
            with uninterrupted():
                if self._stream is None:
                    self._target.begin()
                    self._stream = Stream(
                        self._target.file, self.width, self.height, self.fps, self.crf, self._form, about=self._about
                    )  # fmt: skip
                try:
                    self._stream.write(picture, self.pictures)
                except OSError as error:
                    raise self._target.named(error) from None
                self.pictures += 1

    def close(self) -> None:
        """Finish the file and give it its name; where no picture was written, what was there before stays.

        Raises:
            OSError: The file has no room for its end. It keeps its name and what it holds, if that can be played.
        """
        with uninterrupted():
            if self._closed:
                return
            stream, self._stream, self._closed = self._stream, None, True
            if stream is None:
                self._target.release()
                return
            try:
                stream.close()
            except BaseException as error:
                self.pictures = _cut_to_whole(self._target.file)
                self._target.commit() if self.pictures else self._target.discard()
                raise self._target.named(error) if isinstance(error, OSError) else error from None
            self._target.commit()

    def discard(self) -> None:
        """Remove what was written; what bears the file's name stays."""
        with uninterrupted():
            if self._closed:
                return
            stream, self._stream, self._closed = self._stream, None, True
            if stream is not None:
                with suppress(OSError):
                    stream.close()
            self._target.discard()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:
                raise


def as_pictures(pixels: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Pictures as an array [pictures, height, width, 3].

    Args:
        pixels: uint8 [pictures, height, width, 3] or [height, width, 3], an array, or a tensor on any device.
        height: Of a picture, in pixels.
        width: Of a picture, in pixels.

    Raises:
        ValueError: They have another dtype or shape.
    """
    torch = sys.modules.get("torch")  # never loaded for the sake of looking
    tensor = torch is not None and isinstance(pixels, torch.Tensor)
    form = (height, width, 3)
    shape = tuple(getattr(pixels, "shape", ()))
    fits = (tensor or isinstance(pixels, np.ndarray)) and str(pixels.dtype).removeprefix("torch.") == "uint8"
    if not fits or shape[-3:] != form or len(shape) not in (3, 4):
        got = f"{pixels.dtype} {list(shape)}" if hasattr(pixels, "dtype") else type(pixels).__name__
        hint = "; of a batch, write one video after the other: pixels[0]" if len(shape) == 5 else ""
        raise ValueError(f"pixels must be uint8 [pictures, {', '.join(map(str, form))}], got {got}{hint}")
    found: NDArray[np.uint8] = pixels.detach().cpu().numpy() if tensor else pixels
    return found.reshape(-1, *form)


def _cut_to_whole(file: io.RawIOBase) -> int:
    """Cut a file that could not be finished after its last whole group of pictures. Returns how many it then has."""
    whole, size, at = 0, file.seek(0, io.SEEK_END), 0
    while at + 16 <= size:  # ISO base media: boxes, each of 4 bytes of length, 4 of name
        file.seek(at)
        head = file.read(16) or b""
        length = int.from_bytes(head[:4], "big")
        at += int.from_bytes(head[8:], "big") if length == 1 else length or size
        whole = at if head[4:8] == b"mdat" and at <= size else whole
    file.truncate(whole)
    file.seek(0)
    if not whole:
        return 0
    with load_av().open(file) as video:
        return sum(packet.size > 0 for packet in video.demux(video=0))
