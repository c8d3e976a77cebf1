"""What decoders have in common: latents in chunks of any length, pictures out, the past in memory of fixed size."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexkern.checks import shown
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
        return self._run(latents, torch.uint8)

    def decode(self, latents: Tensor) -> Tensor:
        """The same pictures before rounding: [B, pictures, 3, height, width] in -1..1."""
        return self._run(latents, self.dtype).movedim(-1, 2)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What it keeps of the past, fit for safetensors; may be the decoder's own memory, but is never written to."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state``, bit for bit. Raises ValueError for the state of another decoder."""

    @abstractmethod
    def _past(self) -> tuple[int, int, int] | None:
        """Batch, height and width of the latents so far; None before the first."""

    @abstractmethod
    def _pictures(self, frames: Tensor, *, first: bool) -> Iterator[Tensor]:
        """Pictures [B, n, height, width, 3] of latent frames [B, F, C, h, w], in pieces: -1..1 and a little beyond.

        first: whether the video begins with them.
        """

    def _write(self, pictures: Tensor, out: Tensor) -> None:
        """Write pictures of -1..1 to ``out``, of the same shape: clamped, and as bytes where it holds bytes."""
        clamped = pictures.clamp(-1, 1)
        out.copy_(((clamped.float() + 1) * 127.5).round() if out.dtype == torch.uint8 else clamped)

    def validate_latents(self, latents: Tensor) -> None:
        """Raises ValueError for latents of another form."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            got = latents.dtype if isinstance(latents, Tensor) else shown(latents)
            raise ValueError(f"latents must be a floating-point tensor, got {got}")
        if latents.dim() != 5 or latents.shape[2] != self.channels or 0 in latents.shape:
            raise ValueError(f"latents must be [B, F, {self.channels}, h, w], got {list(latents.shape)}")

    @torch.no_grad()
    def _run(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        past = self._past()
        self.validate_latents(latents)
        batch, frames, _, height, width = latents.shape
        if past not in (None, (batch, height, width)):
            raise ValueError(f"latents so far had B, h, w = {list(past)}, got {[batch, height, width]}")
        count = frames * self.temporal - (self.temporal - 1 if past is None else 0)
        shape = batch, count, height * self.spatial, width * self.spatial, 3
        out = torch.empty(shape, dtype=dtype, device=self.device)
        done, finite = 0, []
        for made in self._pictures(latents.to(self.device), first=past is None):
            finite.append(all_finite(made))  # before clamping and rounding hide it
            self._write(made, out[:, done : done + made.shape[1]])
            done += made.shape[1]
        self.finite = torch.stack(finite).all()
        return out
