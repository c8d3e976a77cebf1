"""Families of published checkpoints: what one was trained with, and what nobody can read from its keys.

    family = FAMILIES["longlive"]
    Engine.from_pretrained(path, schedule=family.schedule, chunk=family.chunk, size=family.size)

All are text-to-video Wan 2.1 with few-step sampling, at 480x832 and 16 pictures per second.
Source: the inference configs of Self-Forcing, LongLive (branch v1.0), CausVid, Rolling Forcing and FastVideo.
"""

from dataclasses import dataclass, replace

from flexkern.model.schedule import SCHEDULES, Schedule

STRIDE = 8  # pixels of a picture for one of the latent's, in Wan's VAE
PATCH = 2  # latent pixels for one token's side
PICTURES_PER_FRAME = 4  # that a latent frame gives, but for the first, which gives one


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of one kind are run.

    schedule: noise levels. chunk: latent frames denoised together. first_chunk: those of the first chunk. preset: the
    method used where none is named. size: height and width of a latent frame. fps: pictures per second.
    files: names that its checkpoints were published under, the preferred one first. doc: one sentence.
    """

    name: str
    schedule: Schedule
    chunk: int = 3
    first_chunk: int = 3
    preset: str = "flex"
    size: tuple[int, int] = (60, 104)
    fps: int = 16
    files: tuple[str, ...] = ()
    doc: str
    source: str

    def __post_init__(self) -> None:
        for name in ("chunk", "first_chunk", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def takes_image(self) -> bool:
        """Whether a video can begin with one picture: that is one latent frame, and must be a whole chunk."""
        return self.first_chunk == 1

    def check_image(self) -> None:
        """Raises ValueError where no video of this family can begin with one picture."""
        if not self.takes_image:
            raise ValueError(
                f"a checkpoint of {self.name} cannot begin with one picture: one picture is one latent frame, and its "
                f"first chunk is {self.first_chunk} frames; expected one trained frame by frame (chunk 1) or with "
                "independent_first_frame (first chunk 1)"
            )

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latent frame of pictures of height x width. Raises ValueError for odd sizes."""
        step = STRIDE * PATCH
        if height < step or width < step or height % step or width % step:
            near = [max(step, round(side / step) * step) for side in (height, width)]
            raise ValueError(
                f"size must be a multiple of {step} pixels, as {self.name}'s VAE and patches need, "
                f"got {height}x{width}; the nearest is {near[0]}x{near[1]}"
            )
        return height // STRIDE, width // STRIDE

    def check_frames(self, frames: int) -> None:
        """Raises ValueError where this many latent frames are not whole chunks."""
        rest = frames - self.first_chunk
        if rest < 0 or rest % self.chunk:
            below = self.first_chunk + max(0, rest // self.chunk) * self.chunk
            raise ValueError(
                f"{self.name} makes chunks of {self.chunk} latent frames, the first of {self.first_chunk}, "
                f"got {frames} in all; the nearest are {below} and {below + self.chunk}"
            )

    def override(self, **changes) -> "Family":
        """The same with other fields; those of the schedule (steps, shift, ...) are named like the others."""
        ours = {name: value for name, value in changes.items() if name in type(self).__dataclass_fields__}
        theirs = {name: value for name, value in changes.items() if name not in ours}
        if "chunk" in ours and "first_chunk" not in ours:
            ours["first_chunk"] = ours["chunk"]
        return replace(self, schedule=replace(self.schedule, **theirs), **ours)


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
        name="wan-diffusers",
        schedule=SCHEDULES["self-forcing"],
        doc="A folder in the form of diffusers; the steps are those of Self-Forcing, which FastVideo's SFWan has.",
        source="FastVideo SFWan2.1-T2V-1.3B-Diffusers; Wan's own, undistilled weights load too, but need 50 steps",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def guess_family(name: str) -> str | None:
    """The family that a file of this name was published under, None where the name says nothing."""
    plain = name.lower().replace("-", "_")
    words = {"self_forcing": "self-forcing", "longlive": "longlive", "causvid": "causvid"}
    words |= {"rolling_forcing": "rolling-forcing"}
    return next((family for word, family in words.items() if word in plain), None)
