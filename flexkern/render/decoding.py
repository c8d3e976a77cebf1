"""Latents of a file into a video: what a render with ``writes="latents"`` left, decoded afterwards or elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from flexkern.checks import require
from flexkern.render.latents import DTYPES
from flexkern.render.writer import VideoWriter

if TYPE_CHECKING:
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
    try:
        with safe_open(path, framework="numpy") as file:
            require("latents" in file.keys(), f"{path} holds no tensor named latents")  # noqa: SIM118
            rows, about = file.get_slice("latents"), file.metadata() or {}
            shape, dtype = rows.get_shape(), rows.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    fits = len(shape) == 5 and shape[0] == 1 and 0 not in shape and dtype in DTYPES.values()
    require(fits, f"latents must be floating point [1, F, C, h, w], {path} holds {dtype} {list(shape)}")
    ordered = about.get("pictures", "")
    return HeldLatents(
        path=path,
        frames=shape[1],
        channels=shape[2],
        size=(shape[3], shape[4]),
        model=about.get("model"),
        pictures=int(ordered) if ordered.isdecimal() else None,
    )


def decode_latents(
    held: HeldLatents,
    decoder: "Decoder",
    out: str | Path,
    *,
    device: str = "cpu",
    fps: float | Fraction = 16,
    crf: int = 18,
    told: Callable[[int], object] = lambda _: None,
) -> int:
    """Write the pictures of latents to a video; memory does not grow with their number.

    Args:
        held: What ``inspect_latents`` returned.
        decoder: Of one session, new.
        out: The file, named .mp4; it is replaced when the new one is whole.
        device: Where the decoder is.
        fps: Pictures per second.
        crf: Quality of x264.
        told: Hears how many latent frames are decoded.

    Returns:
        How many pictures were written: as many as were ordered, where the file says that, and the latents suffice.

    Raises:
        ValueError: The latents do not fit the decoder.
        OSError: A file cannot be read or written; then, as after Ctrl-C, nothing is left of the video.
    """
    from safetensors import safe_open

    writer: VideoWriter | None = None
    made = 0
    try:
        with safe_open(held.path, framework="pt") as file:
            rows = file.get_slice("latents")
            for start in range(0, held.frames, STEP):
                pixels = decoder(rows[:, start : start + STEP].to(device))[0]
                if writer is None:
                    writer = VideoWriter(out, pixels.shape[2], pixels.shape[1], fps, crf=crf)
                left = len(pixels) if held.pictures is None else held.pictures - made
                writer.write(pixels[:left])
                made = writer.pictures
                told(min(held.frames, start + STEP))
            if writer is not None:
                writer.close()
    except BaseException:
        if writer is not None:
            writer.discard()  # it can be decoded again
        raise
    return made
