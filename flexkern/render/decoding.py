"""Latents of a file into a video: what a render with ``writes="latents"`` left, decoded afterwards or elsewhere."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flexkern import __version__
from flexkern.checks import require
from flexkern.model.intact import validate_form as validate_container
from flexkern.render.encoding import STDOUT, Encoding, is_sequence
from flexkern.render.latents import DTYPES
from flexkern.render.outputs import PipeWriter, SequenceWriter, validate_form
from flexkern.render.parts import Parts
from flexkern.render.sidecar import FORMAT, describe_video, file_hash, fingerprint, read_sidecar
from flexkern.render.target import parts_name
from flexkern.render.watch import now
from flexkern.render.writer import VideoWriter

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.model.protocols import Decoder

STEP = 3  # latent frames that are decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLatents:
    """What a file of latents says of itself."""

    path: Path
    frames: int
    channels: int
    size: tuple[int, int]
    """height and width of a latent frame"""
    model: str | None
    """name of the family that made them, where the file says it"""
    pictures: int | None
    """how many were ordered, where the file says it"""
    fps: int = 16
    """pictures per second of the model"""
    tags: dict[str, str] = field(default_factory=dict)
    """title and comment of a video of them, where the file says them"""


def inspect_latents(path: str | Path) -> HeldLatents:
    """What a file of latents holds, from its header.

    Args:
        path: The file; one that a render left unfinished will do.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It holds no latents.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no latents {path}")
    require(validate_container(path) == "safetensors", f"{path} is no safetensors file, as latents are")
    try:
        with safe_open(path, framework="numpy") as file:
            require("latents" in file.keys(), f"{path} holds no tensor named latents")  # noqa: SIM118
            rows, about = file.get_slice("latents"), file.metadata() or {}
            shape, dtype = rows.get_shape(), rows.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    fits = len(shape) == 5 and shape[0] == 1 and 0 not in shape and dtype in DTYPES.values()
    require(fits, f"latents must be floating point [1, F, C, h, w], {path} holds {dtype} {list(shape)}")
    ordered, fps = about.get("pictures", ""), about.get("fps", "")
    return HeldLatents(
        path=path,
        frames=shape[1],
        channels=shape[2],
        size=(shape[3], shape[4]),
        model=about.get("model"),
        pictures=int(ordered) if ordered.isdecimal() else None,
        fps=int(fps) if fps.isdecimal() and int(fps) else 16,
        tags={name: about[name] for name in ("title", "comment") if name in about},
    )


def decode_latents(
    held: HeldLatents,
    decoder: "Decoder",
    out: str | Path,
    *,
    device: str = "cpu",
    encoding: Encoding | None = None,
    stream: BinaryIO | None = None,
    told: Callable[[int], object] = lambda _: None,
) -> int:
    """Write the pictures of latents to a video; memory does not grow with their number.

    Args:
        held: What ``inspect_latents`` returned.
        decoder: Of one session, new.
        out: What is written, as ``flexkern render`` has it: .mp4, .mov, FOLDER/%06d.png, or - for a stream. It is
            replaced when the new one is whole; pictures of a folder, one after the other.
        device: Where the decoder is.
        encoding: Rate, quality and form; the rate is otherwise that of the model.
        stream: Where - goes.
        told: Hears how many latent frames are decoded.

    Returns:
        How many pictures were written: as many as were ordered, where the file says that, and the latents suffice.

    Raises:
        ValueError: The latents do not fit the decoder, or the form does not fit the pictures.
        NotFiniteError: Latents, or the pictures of them, are not finite; nothing is left of the video.
        BlockingIOError: Somebody else is writing the video.
        OSError: A file cannot be read or written; then, as after Ctrl-C, nothing is left of the video.
    """
    from safetensors import safe_open

    out, encoding = Path(out), encoding or Encoding()
    writer: VideoWriter | SequenceWriter | PipeWriter | None = None
    made = 0
    with ExitStack() as ends:
        try:
            file = ends.enter_context(safe_open(held.path, framework="pt"))
            rows = file.get_slice("latents")
            for start in range(0, held.frames, STEP):
                pixels = _decoded(decoder, rows[:, start : start + STEP], f"frames from {start} of {held.path}", device)
                if writer is None:
                    height, width = pixels.shape[1:3]
                    writer = _begin(held, out, encoding, stream, ends, height=height, width=width)
                left = len(pixels) if held.pictures is None else held.pictures - made
                writer.write(pixels[:left])
                made = writer.pictures
                told(min(held.frames, start + STEP))
            if isinstance(writer, SequenceWriter):
                writer.finish()
            elif writer is not None:
                writer.close()
            if isinstance(writer, VideoWriter) and parts_name(out).is_dir():
                ends.callback((parts := Parts(out)).release)
                parts.clear()  # nobody can go on with what a stopped render left of that video
        except BaseException:
            if isinstance(writer, (VideoWriter, SequenceWriter)):
                writer.discard()  # it can be decoded again
            raise
    return made


def _decoded(decoder: "Decoder", latents: "Tensor", what: str, device: str) -> "Tensor":
    """The pictures of latents. Raises NotFiniteError where they, or the latents, are not finite."""
    from flexkern.finite import HANDED_IN, NotFiniteError, validate_finite

    validate_finite(f"the latents of {what}", latents, advice=HANDED_IN)
    pixels = decoder(latents.to(device))[0]
    finite = getattr(decoder, "finite", None)  # before rounding
    if finite is not None and not finite:
        began, dtype = "they began in the decoder, the latents are finite", getattr(decoder, "dtype", latents.dtype)
        advice = "try a decoder in float32, or look at the latents: they may be too large"
        raise NotFiniteError(f"the pictures of {what}", dtype, layer="decoder", began=began, advice=advice)
    return pixels


def describe(held: HeldLatents, out: Path, *, pictures: int, encoding: Encoding, decoder: Path | None, device: str,
             seconds: float) -> dict[str, Any]:  # fmt: skip
    """The content of a sidecar of a video that was decoded; the video is there.

    Args:
        held: What was decoded.
        out: The video.
        pictures: How many it has.
        encoding: How it was encoded.
        decoder: File of the VAE; None where the latents are pictures already.
        device: Where it was decoded.
        seconds: What that took.

    Bytes: reads latents and video once.
    """
    import torch

    return {
        "format": FORMAT,
        "flexkern": __version__,
        "decoded": {"name": held.path.name, "frames": held.frames, "sha256": file_hash(held.path),
                    "rendered": read_sidecar(held.path)},
        "files": {} if decoder is None else {"vae": fingerprint(decoder)},
        "video": describe_video(out, pictures, encoding.rate(held.fps)),
        "decided_by": {"torch": torch.__version__, "device": device, "encoding": asdict(encoding)},
        "timings": {"ended": now(), "decode_seconds": round(seconds, 3)},
    }  # fmt: skip


def _begin(
    held: HeldLatents,
    out: Path,
    encoding: Encoding,
    stream: BinaryIO | None,
    ends: ExitStack,
    *,
    height: int,
    width: int,
) -> VideoWriter | SequenceWriter | PipeWriter:
    """What the pictures go to, until ``ends`` are closed its alone."""
    validate_form(width, height, held.fps, encoding, out)
    rate = encoding.rate(held.fps)
    if out == STDOUT:
        assert stream is not None, "whoever names - has a stream"
        return PipeWriter(stream, width=width, height=height, fps=rate, encoding=encoding, about=held.tags)
    if is_sequence(out):
        out.parent.mkdir(exist_ok=True)
        parts = Parts(out)  # its lock is that of a folder of pictures
        ends.callback(parts.release)
        parts.clear()  # of a render that was stopped: its pictures go
        return SequenceWriter(out, width=width, height=height, fps=rate)
    return VideoWriter(out, width, height, rate, crf=encoding.crf, about=held.tags)
