"""Families of published checkpoints: what one was trained with, and what nobody can read from its keys.

    family = FAMILIES["longlive"].override(size=(30, 52))
    Engine.from_pretrained(path, family=family)

All are text-to-video Wan 2.1 with few-step sampling, at 480x832 and 16 pictures per second.
Source: the inference configs of Self-Forcing, LongLive (branch v1.0), CausVid, Rolling Forcing, Reward-Forcing and
FastVideo.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexkern.checks import check_fields, did_you_mean, require
from flexkern.model.schedule import SCHEDULES, Schedule
from flexkern.policies.position import HORIZON

CHANNELS = 16  # of a latent of Wan 2.1
STRIDE = 8  # pixels of a picture for one of the latent's, in Wan's VAE
PATCH = 2  # latent pixels for one token's side
PICTURES_PER_FRAME = 4  # that a latent frame gives, but for the first, which gives one


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of one kind are run, and what their latents become."""

    name: str
    schedule: Schedule
    """noise levels"""
    chunk: int = 3
    """latent frames denoised together"""
    first_chunk: int = 3
    """latent frames of the first chunk"""
    preset: str = "flex"
    """the method used where none is named"""
    size: tuple[int, int] = (60, 104)
    """height and width of a latent frame"""
    stride: int = STRIDE
    """height or width of a picture, divided by that of its latent frame"""
    pictures_per_frame: int = PICTURES_PER_FRAME
    """pictures that a latent frame decodes to, except the first, which gives one"""
    horizon: int = HORIZON
    """latent frames that it was trained on, for presets whose ``position.train_len`` is None"""
    fps: int = 16
    """pictures per second"""
    files: tuple[str, ...] = ()
    """names that its checkpoints were published under, the preferred one first"""
    doc: str
    """one sentence"""
    source: str

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("chunk", "first_chunk", "stride", "pictures_per_frame", "horizon", "fps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(min(self.size) >= 1, f"size must be at least 1x1, got {self.size[0]}x{self.size[1]}")

    @property
    def takes_image(self) -> bool:
        """Whether a video can begin with one picture: that is one latent frame, and must be a whole chunk."""
        return self.first_chunk == 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.size[0] * self.stride, self.size[1] * self.stride

    def pictures(self, frames: int) -> int:
        """How many pictures a video of so many latent frames has."""
        return 1 + (frames - 1) * self.pictures_per_frame

    def frames(self, pictures: int) -> int:
        """The fewest latent frames that decode to at least so many pictures."""
        return 1 + -(-(pictures - 1) // self.pictures_per_frame)

    def validate_image(self) -> None:
        """Raises ValueError where no video of this family can begin with one picture."""
        if not self.takes_image:
            raise ValueError(
                f"a checkpoint of {self.name} cannot begin with one picture: one picture is one latent frame, and its "
                f"first chunk is {self.first_chunk} frames; expected one trained frame by frame (chunk 1) or with "
                "independent_first_frame (first chunk 1)"
            )

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of the latent frames that decode to pictures of a size.

        Args:
            height: Of a picture, in pixels.
            width: Of a picture, in pixels.

        Returns:
            Height and width of the latent frame.

        Raises:
            ValueError: A side is not a multiple of 16 pixels; the message names the nearest size.
        """
        step = self.stride * PATCH
        if height < step or width < step or height % step or width % step:
            near = [max(step, round(side / step) * step) for side in (height, width)]
            raise ValueError(
                f"size must be a multiple of {step} pixels, as {self.name}'s VAE and patches need, "
                f"got {height}x{width}; the nearest is {near[0]}x{near[1]}"
            )
        return height // self.stride, width // self.stride

    def validate_frames(self, frames: int) -> None:
        """Raises ValueError where this many latent frames are not whole chunks."""
        rest = frames - self.first_chunk
        if rest < 0 or rest % self.chunk:
            below = self.first_chunk + max(0, rest // self.chunk) * self.chunk
            raise ValueError(
                f"{self.name} makes chunks of {self.chunk} latent frames, the first of {self.first_chunk}, "
                f"got {frames} in all; the nearest are {below} and {below + self.chunk}"
            )

    def override(
        self,
        *,
        chunk: int | None = None,
        first_chunk: int | None = None,
        size: tuple[int, int] | None = None,
        steps: Sequence[float] | None = None,
        shift: float | None = None,
        warp: bool | None = None,
        context_timestep: float | None = None,
    ) -> "Family":
        """The same family with other values; None keeps a value.

        Args:
            chunk: Latent frames denoised together; the first chunk becomes as long, unless ``first_chunk`` is given.
            first_chunk: Latent frames of the first chunk.
            size: Height and width of a latent frame.
            steps: Of the schedule, as are all that follow.
            shift: See ``Schedule``.
            warp: See ``Schedule``.
            context_timestep: See ``Schedule``.

        Raises:
            ValueError: A value that ``Family`` or ``Schedule`` does not take.
        """
        first = chunk if first_chunk is None else first_chunk
        listed = None if steps is None else tuple(steps)
        ours = _given(chunk=chunk, first_chunk=first, size=size)
        theirs = _given(steps=listed, shift=shift, warp=warp, context_timestep=context_timestep)
        return replace(self, schedule=replace(self.schedule, **theirs), **ours)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


_ALL = (
    Family(
        name="self-forcing",
        schedule=SCHEDULES["self-forcing"],
        files=("self_forcing_dmd.pt", "self_forcing_sid.pt", "self_forcing_gan.pt"),
        doc="Trained on 21 latent frames (81 pictures, 5 seconds), all of which it attends to.",
        source="guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml, self_forcing_sid.yaml",
    ),
    Family(
        name="longlive",
        schedule=SCHEDULES["longlive"],
        preset="longlive",
        horizon=240,
        files=("longlive_base.pt",),
        doc="Trained for long video and for changing prompts with a sink of 3 frames and a window of 12.",
        source="NVlabs/LongLive v1.0, configs/longlive_inference.yaml; its LoRA is a file of its own, lora.pt",
    ),
    Family(
        name="causvid",
        schedule=SCHEDULES["causvid"],
        doc="Three steps without warping, trained on 21 latent frames.",
        source="tianweiy/CausVid, configs/wan_causal_dmd.yaml",
    ),
    Family(
        name="rolling-forcing",
        schedule=SCHEDULES["rolling-forcing"],
        preset="longlive-infinite",
        files=("rolling_forcing_dmd.pt",),
        doc="Five steps; run chunk by chunk, without the joint window of five noise levels that it was trained with.",
        source="TencentARC/RollingForcing, configs/rolling_forcing_dmd.yaml; sink and positions as its attention's",
    ),
    Family(
        name="reward-forcing",
        schedule=SCHEDULES["self-forcing"],
        preset="reward-forcing",
        files=("rewardforcing.pt",),
        doc="Trained with a window of 9 frames, what leaves it merged into a sink of 3; the steps are Self-Forcing's.",
        source="JaydenLyh/Reward-Forcing, configs/reward_forcing.yaml",
    ),
    Family(
        name="wan-diffusers",
        schedule=SCHEDULES["self-forcing"],
        doc="A folder in the form of diffusers; the steps are those of Self-Forcing, which FastVideo's SFWan has.",
        source="FastVideo SFWan2.1-T2V-1.3B-Diffusers; Wan's own, undistilled weights load too, but need 50 steps",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def get_family(name: str) -> Family:
    """The family of that name. Raises ValueError that lists those there are."""
    known = f"expected one of {', '.join(FAMILIES)}"
    require(name in FAMILIES, f"no family {name!r}: {known}{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def family_of(path: str | Path) -> str | None:
    """The family that a file or folder is named after, by its own name, its folder's, or its repository's on the Hub.

    A link has the say before what it points to: in the Hub's cache, that is a file whose name is a hash.
    """
    for given in (Path(os.path.abspath(path)), Path(path).resolve()):
        repository = [folder.name for folder in given.parents if folder.name.startswith("models--")]
        names = [given.name, given.parent.name, *repository]
        if found := next((family for name in names if (family := guess_family(name))), None):
            return found
    return None


def guess_family(name: str) -> str | None:
    """The family that a file or folder of this name was published under, None where the name says nothing."""
    plain = name.lower().replace("-", "_")
    words = {"self_forcing": "self-forcing", "longlive": "longlive", "causvid": "causvid"}
    words |= {
        "rolling_forcing": "rolling-forcing",
        "reward_forcing": "reward-forcing",
        "rewardforcing": "reward-forcing",
    }
    return next((family for word, family in words.items() if word in plain), None)
