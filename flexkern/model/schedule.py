"""Few-step flow-matching schedules: which noise levels a chunk passes through, and what the prediction means at each.

x_t = (1 - sigma) * x0 + sigma * noise,   sigma = shift * s / (1 + (shift - 1) * s),   timestep = 1000 * sigma
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from flexkern.checks import check_fields, require

if TYPE_CHECKING:  # torch takes seconds to load, and the command line names families before
    from torch import Tensor

Prediction = Literal["flow", "x0"]
"""What a model's head outputs: flow (noise - x0), or x0 itself."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Denoising timesteps of a distilled model.

    Source: Self-Forcing utils/scheduler.py and pipeline/causal_inference.py; CausVid (shift 8, not warped).
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    """as the research configs list them (``denoising_step_list``), falling; a 0 at the end is dropped"""
    shift: float = 5.0
    """how far the noise levels are shifted towards noise"""
    warp: bool = True
    """whether steps count in the shifted schedule, so that 750 means timestep 937.5 at shift 5
    (``warp_denoising_step``)"""
    first_steps: tuple[float, ...] | None = None
    """other steps for the first chunk, which has no past to lean on; None for the same"""
    fresh: bool = True
    """whether noise between steps is drawn anew; else it is the noise that the last prediction implies"""
    context_timestep: float = 0.0
    """timestep, 0 to 1000, of the clean pass that fills the cache (``context_noise``)"""

    def __post_init__(self) -> None:
        for name in ("steps", "first_steps"):
            if isinstance(steps := getattr(self, name), tuple | list):
                object.__setattr__(self, name, tuple(steps[:-1] if len(steps) > 1 and steps[-1] == 0 else steps))
        check_fields(self)
        require(self.shift > 0, f"shift must be > 0, got {self.shift}")
        context = self.context_timestep
        require(0 <= context <= 1000, f"context_timestep must be a timestep from 0 to 1000, got {context}")
        for name in ("steps", "first_steps"):
            if (steps := getattr(self, name)) is None:
                continue
            falling = all(a > b for a, b in zip(steps, steps[1:], strict=False))
            within = all(0 < step <= 1000 for step in steps)
            require(
                bool(steps) and falling and within, f"{name} must fall from at most 1000 to above 0, got {list(steps)}"
            )
            whole = not self.warp or all(step == int(step) for step in steps)
            require(whole, f"{name} must be whole numbers where warp is on, got {list(steps)}")

    @cached_property
    def sigmas(self) -> "Tensor":
        """Noise levels of the 1000 training timesteps, float32, falling."""
        import torch

        s = torch.linspace(1, 0, 1001, device="cpu")[:-1]
        return self.shift * s / (1 + (self.shift - 1) * s)

    def timesteps(self, *, first_chunk: bool = False) -> list[float]:
        """What the model is told at each step, on a scale of 0 to 1000."""
        steps = self.first_steps if first_chunk and self.first_steps else self.steps
        if not self.warp:
            return [float(s) for s in steps]
        import torch

        table = torch.cat((self.sigmas * 1000, torch.zeros(1, device="cpu")))
        return [table[1000 - int(s)].item() for s in steps]

    def sigma(self, timestep: float) -> float:
        """Noise level of the training timestep nearest to ``timestep``."""
        return float(self.sigmas[(self.sigmas * 1000 - timestep).abs().argmin()])

    def clean(self, noisy: "Tensor", prediction: "Tensor", timestep: float, kind: Prediction) -> "Tensor":
        """x0 from the model's output of that kind at ``timestep``, computed in float64."""
        if kind == "x0":
            return prediction.to(noisy.dtype)
        return (noisy.double() - self.sigma(timestep) * prediction.double()).to(noisy.dtype)

    def noise(self, noisy: "Tensor", clean: "Tensor", timestep: float) -> "Tensor":
        """The noise that turns ``clean`` into ``noisy`` at ``timestep``."""
        sigma = self.sigma(timestep)
        return (noisy.float() - (1 - sigma) * clean.float()) / sigma

    def noisy(self, clean: "Tensor", noise: "Tensor", timestep: float) -> "Tensor":
        """x0 with noise, at the level of ``timestep``."""
        sigma = self.sigma(timestep)
        return ((1 - sigma) * clean.float() + sigma * noise.float()).to(clean.dtype)


SCHEDULES = {
    "self-forcing": Schedule(),
    "longlive": Schedule(),
    "causvid": Schedule(steps=(1000, 757, 522), shift=8.0, warp=False),
    "rolling-forcing": Schedule(steps=(1000, 800, 600, 400, 200)),
}
"""By family of checkpoints; a Rolling Forcing checkpoint is run chunk by chunk, without its joint window."""
