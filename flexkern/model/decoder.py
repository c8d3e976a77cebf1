"""What decoders have in common: latents in chunks of any length, pictures out, the past in memory of fixed size."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexkern.finite import all_finite


class LatentForm(NamedTuple):
    """What the latents of a VAE look like."""

    channels: int
    spatial: int
    """height or width of a picture, divided by that of its latent frame"""
    temporal: int
    """pictures that a latent frame decodes to, except the first, which gives one"""


class ChunkDecoder(ABC):
    """Decodes one session's latents chunk by chunk; the pictures do not depend on where the chunks end.

    channels, spatial, temporal: those of ``LatentForm``. finite: whether the pictures of the last call were, a bool on
    the device; None before the first.
    """

    finite: Tensor | None = None

    def __init__(self, *, channels: int, spatial: int, temporal: int, dtype: torch.dtype, device: torch.device):
        self.channels, self.spatial, self.temporal = channels, spatial, temporal
        self.dtype, self.device = dtype, device

    def __call__(self, latents: Tensor) -> Tensor:
        """The pictures of the next latent frames, as a file or a screen takes them.

        Args:
            latents: [B, F, C, h, w], as the model makes them.

        Returns:
            uint8 [B, pictures, height, width, 3].

        Raises:
            ValueError: The latents have another shape than those so far.
        """
        to_bytes = lambda x: ((x.float() + 1) * 127.5).round().to(torch.uint8)
        return self._run(latents, torch.uint8, to_bytes).movedim(2, -1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The same pictures before rounding: [B, pictures, 3, height, width] in -1..1."""
        return self._run(latents, self.dtype, lambda x: x)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What it keeps of the past, fit for safetensors; shares memory with the decoder, which never writes to it."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state``, bit for bit. Raises ValueError for the state of another decoder."""

    @abstractmethod
    def _past(self) -> tuple[int, int, int] | None:
        """Batch, height and width of the latents so far; None before the first."""

    @abstractmethod
    def _step(self, frame: Tensor, first: bool) -> Tensor:
        """One latent frame [B, C, h, w] -> [B, pictures, 3, height, width] in -1..1."""

    @torch.no_grad()
    def _run(self, latents: Tensor, dtype: torch.dtype, convert: Callable[[Tensor], Tensor]) -> Tensor:
        past = self._past()
        if latents.dim() != 5 or latents.shape[2] != self.channels or 0 in latents.shape:
            raise ValueError(f"latents must be [B, F, {self.channels}, h, w], got {list(latents.shape)}")
        batch, frames, _, height, width = latents.shape
        if past not in (None, (batch, height, width)):
            raise ValueError(f"latents so far had B, h, w = {list(past)}, got {[batch, height, width]}")
        count = frames * self.temporal - (self.temporal - 1 if past is None else 0)
        shape = batch, count, 3, height * self.spatial, width * self.spatial
        pictures = torch.empty(shape, dtype=dtype, device=self.device)
        done, finite = 0, []
        for i, frame in enumerate(latents.unbind(1)):
            made = self._step(frame.to(self.device), first=past is None and i == 0)
            finite.append(all_finite(made))  # before clamping and rounding hide it
            pictures[:, done : done + made.shape[1]] = convert(made.clamp(-1, 1))
            done += made.shape[1]
        self.finite = torch.stack(finite).all()
        return pictures
