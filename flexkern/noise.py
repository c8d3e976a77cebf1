"""A session's noise as tensors: from a preset's policy, or in the draw order of the research code."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexkern.ahead import Ahead
from flexkern.checks import shown
from flexkern.policies import NoisePolicy
from flexkern.state import State, nest, within

Draw = tuple[tuple[int, ...], int | None]
"""Frames, and the denoising step after which noise is drawn for them: from 0, None for what they start from."""


class Noise(Protocol):
    """Where a session's noise comes from."""

    def initial(self, frames: Sequence[int]) -> Tensor:
        """Noise [B, F, C, h, w] that the frames start from."""

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        """Fresh noise [B, F, C, h, w] after denoising step ``step`` (from 0)."""

    def state(self) -> State:
        """All that later draws depend on."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``, bit for bit. Raises ValueError for the state of other noise."""


class PolicyNoise(Ahead[Draw, Tensor, State]):
    """Noise of a policy: a function of seed, frame and step alone. Draws that were expected are made on a thread.

    Args:
        policy: Which noise a frame gets.
        seed: Video b of a batch is drawn from seed + b.
        batch: Number of videos.
        shape: Of one latent frame, [C, h, w].
        target: Latent frames of the video, where known.
        pinned: Whether draws are in pinned memory, from which a GPU copies while the host goes on.
    """

    def __init__(
        self, policy: NoisePolicy, seed: int, batch: int, shape: tuple[int, ...], target: int | None, *,
        pinned: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.sources = [policy.source(seed + b, shape=shape, target=target) for b in range(batch)]
        self.pinned = pinned

    def initial(self, frames: Sequence[int]) -> Tensor:
        return self._ask((tuple(frames), None))

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        return self._ask((tuple(frames), step))

    def restart(self) -> None:
        """Let the next frames begin their sequences: the video was given frames that were not drawn."""
        self.forget()
        for source in self.sources:
            source.restart()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.forget()
        self._go_back(state)

    def _make(self, call: Draw) -> Tensor:
        frames, step = call
        drawn = [source.initial(frames) if step is None else source.renoise(frames, step) for source in self.sources]
        noise = torch.stack([torch.from_numpy(one) for one in drawn])
        return noise.pin_memory() if self.pinned else noise

    def _save(self) -> State:
        state: State = {"videos": len(self.sources)}
        for b, source in enumerate(self.sources):
            drawn = source.state().items()
            plain = {name: value if isinstance(value, int) else torch.from_numpy(value) for name, value in drawn}
            state |= nest(str(b), plain)
        return state

    def _go_back(self, state: Mapping[str, Any]) -> None:
        if state.get("videos") != len(self.sources):
            raise ValueError(f"noise must be of {len(self.sources)} videos, got a state of {state.get('videos')}")
        for b, source in enumerate(self.sources):
            drawn = within(str(b), state).items()
            source.restore({name: value.numpy() if isinstance(value, Tensor) else value for name, value in drawn})


class ResearchNoise:
    """The draw order of the research code: the whole video's noise at once, then fresh noise step by step.

    Equal numbers need the same device, dtype and generator state as the original run.

    Args:
        shape: Of the video's latents, [B, F, C, h, w].
        generator: Draws everything, on its device.
        dtype: Of the noise.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        generator: torch.Generator,
        dtype: torch.dtype = torch.bfloat16,
    ):
        sized = isinstance(shape, tuple | list) and len(shape) == 5
        if not isinstance(generator, torch.Generator) or not sized:
            got = f"{shown(shape)} and {shown(generator)}"
            raise TypeError(f"expected a shape [B, F, C, h, w] and a torch.Generator, got {got}")
        self.generator, self.dtype = generator, dtype
        self.video = self._draw(shape)

    def _draw(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.generator.device, dtype=self.dtype)

    def initial(self, frames: Sequence[int]) -> Tensor:
        if frames[-1] >= self.video.shape[1]:
            raise ValueError(f"noise was drawn for {self.video.shape[1]} frames, got frame {frames[-1]}")
        return self.video[:, frames[0] : frames[-1] + 1]

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        batch, _, *rest = self.video.shape
        return self._draw((batch * len(frames), *rest)).view(batch, len(frames), *rest)

    def state(self) -> State:
        """The generator's state, and the video's noise, which the generator has long left."""
        return {"video": self.video.cpu().clone(), "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        video = state["video"]
        if video.shape != self.video.shape or video.dtype != self.dtype:
            expected = f"{self.dtype} {list(self.video.shape)}"
            raise ValueError(f"noise must be {expected}, got a state of {video.dtype} {list(video.shape)}")
        self.video = video.to(self.video.device, copy=True)
        self.generator.set_state(state["generator"])
