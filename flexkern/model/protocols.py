"""What an engine asks of a model and of what stands around it. Any object with these methods will do."""

from typing import Protocol

import torch
from torch import Tensor

from flexkern.backends import Pointwise
from flexkern.memory import Memory
from flexkern.model.wan import TextKV, WanConfig


class VideoModel(Protocol):
    """A transformer that denoises a chunk of latent frames; its self-attention goes through a ``Memory``."""

    @property
    def config(self) -> WanConfig:
        """Its sizes, and what its head predicts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and of the keys and values it makes."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a latent frame. Raises ValueError for a size that patches do not tile."""

    def text_keys(self, text: Tensor, ops: Pointwise) -> TextKV:
        """What a prompt [B, L, text_dim] becomes, once, for all forwards."""

    def __call__(
        self, latents: Tensor, timesteps: Tensor, text: TextKV, memory: Memory, *, keys_only: bool = False
    ) -> Tensor | None:
        """The prediction [B, F, C, h, w] for latents [B, F, C, h, w] at timesteps [B, F]; None with keys_only."""


class TextEncoder(Protocol):
    """Turns prompts into what the model's cross-attention reads."""

    def __call__(self, prompts: list[str], /) -> Tensor:
        """[B, L, text_dim], zero after each prompt. Raises ValueError for a prompt the model cannot follow."""


class Encoder(Protocol):
    """Turns pictures into clean latents, to start a video from."""

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """uint8 [B, pictures, height, width, 3] -> latents [B, F, C, h, w]."""


class Decoder(Protocol):
    """Turns one session's latents into pictures, chunk by chunk; may keep what it needs of the past."""

    def __call__(self, latents: Tensor, /) -> Tensor:
        """latents [B, F, C, h, w] -> uint8 [B, pictures, height, width, 3], which later calls leave as they are."""

    def state(self) -> dict[str, Tensor]:
        """What it keeps of the past; empty where it keeps nothing."""

    def restore(self, state: dict[str, Tensor], /) -> None:
        """Continue from a ``state``, bit for bit. Raises ValueError for the state of another decoder."""
