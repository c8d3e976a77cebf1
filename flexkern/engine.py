"""The autoregressive denoising loop: an ``Engine`` holds a model, a ``Session`` one video, for ever if need be.

    engine = Engine.from_pretrained("self_forcing_dmd.pt", schedule=SCHEDULES["self-forcing"])
    session = engine.session(text_embedding, preset="flex", size=(60, 104), seed=0)
    for chunk in session: ...

A session's step: draw noise, let retention evict, plan positions, denoise in a few steps, run the clean result once
more so that the cache holds clean keys and values. Source: Self-Forcing pipeline/causal_inference.py, LongLive
pipeline/interactive_causal_inference.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexkern.backends import get_backend
from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan
from flexkern.model.weights import load_transformer
from flexkern.noise import Noise, PolicyNoise
from flexkern.plan import band_split
from flexkern.policies import Preset, get_preset
from flexkern.window import CacheWindow


class TextEncoder(Protocol):
    def __call__(self, prompts: list[str]) -> Tensor:
        """[B, L, text_dim], zero behind each prompt. Raises ValueError for a prompt the model cannot follow."""


class Decoder(Protocol):
    """Turns one session's latents into pictures, chunk by chunk; may keep what it needs of the past."""

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B, F, C, h, w] -> uint8 [B, pictures, height, width, 3]."""


class Encoder(Protocol):
    """Turns pictures into clean latents, to start a video from."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, pictures, height, width, 3] -> latents [B, F, C, h, w]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one step made. frames: absolute indices of its latent frames. latents: [B, F, C, h, w].

    pixels: uint8 [B, pictures, height, width, 3], None where the engine has no decoder.
    """

    index: int
    frames: tuple[int, ...]
    latents: Tensor
    pixels: Tensor | None


class Engine:
    """A model with everything that sessions share. Nothing in it changes while sessions run."""

    def __init__(
        self, model: CausalWan, *, schedule: Schedule | None = None, backend: str = "sdpa", chunk: int = 3,
        text_encoder: TextEncoder | None = None, encoder: Encoder | None = None, decoder=None,
        size: tuple[int, int] = (60, 104),
    ):  # fmt: skip
        """schedule: default that of Self-Forcing. chunk: frames denoised together. size: default height and width of a
        latent frame. decoder: called without arguments for each session, gives its ``Decoder``."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 frame, got {chunk}")
        self.model, self.chunk, self.size = model, chunk, size
        self.schedule = schedule or Schedule()
        self.backend = get_backend(backend, model.device)
        self.text_encoder, self.encoder, self.decoder = text_encoder, encoder, decoder

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", ema: bool | None = None,
        lora: str | Path | None = None, lora_scale: float = 1.0, **options,
    ) -> "Engine":  # fmt: skip
        """The engine for a checkpoint on disk, of any form ``model.weights`` reads; options as the constructor's."""
        get_backend(options.get("backend", "sdpa"), device)  # before gigabytes are read
        model = load_transformer(path, ema=ema, lora=lora, lora_scale=lora_scale, dtype=dtype, device=device)
        return cls(model, **options)

    @torch.inference_mode()
    def encode(self, prompt: str | Sequence[str] | Tensor):
        """Cross-attention keys and values of prompts, [B, L, H, D] per layer; a tensor is the text encoder's output."""
        if not isinstance(prompt, Tensor):
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if self.text_encoder is None:
                raise ValueError("this engine has no text encoder: pass the prompt's embedding [B, L, text_dim]")
            if not prompts:
                raise ValueError("prompt must be a string or at least one, got none")
            prompt = self.text_encoder(prompts)
        return self.model.text_keys(prompt.to(self.model.device), self.backend)

    def session(self, prompt: str | Sequence[str] | Tensor, **options) -> "Session":
        """A new video, or a batch of them that goes in step; options as ``Session``'s."""
        return Session(self, prompt, **options)


class Session:
    """One video, chunk by chunk. Iterate over it, or call ``step``.

    Raises ValueError, before any work, for a preset, size or prompt that does not fit the model.
    """

    def __init__(
        self, engine: Engine, prompt: str | Sequence[str] | Tensor, *, preset: str | Preset = "flex", seed: int = 0,
        frames: int | None = None, size: tuple[int, int] | None = None, noise: Noise | None = None,
        first_chunk: int | None = None,
    ):  # fmt: skip
        """preset: a name or a ``Preset``. seed: of the preset's noise, >= 0. frames: latent frames to make, None for no
        end; policies that depend on the length of the video need it. size: height and width of a latent frame.
        noise: takes the place of the preset's noise. first_chunk: frames of the first chunk, where it differs
        (1 for models trained with ``independent_first_frame``)."""
        self.engine, self.preset, self.target = engine, get_preset(preset), frames
        self.size = tuple(size or engine.size)
        self.first_chunk = first_chunk or engine.chunk
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
        model, config = engine.model, engine.model.config
        rows, columns = model.grid(*self.size)
        sizes = {"bands": band_split(config.head_dim)[0], "heads": config.num_heads}
        self.preset.check(chunk=max(engine.chunk, self.first_chunk), **sizes, target=frames)
        self.text = engine.encode(prompt)
        self.batch = self.text[0][0].shape[0]
        self.window = CacheWindow(
            self.preset, engine.backend, layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim,
            eps=config.eps, dtype=model.dtype, device=model.device,
        )  # fmt: skip
        self.window.begin(frames)
        self.window.allocate((self.batch, rows, columns))
        shape = (config.out_dim, *self.size)
        self.noise = noise or PolicyNoise(self.preset.noise, seed, self.batch, shape, frames)
        self.decode = engine.decoder() if engine.decoder else None
        self.next_frame = 0
        self.chunks = 0
        self._recent: Tensor | None = None  # clean latents that a recache would run again
        self._cut = False

    @property
    def cache(self) -> FrameCache:
        """The frames that later chunks see."""
        return self.window.cache

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks without end, or until ``frames`` latent frames are made."""
        while self.target is None or self.next_frame < self.target:
            yield self.step()

    @torch.inference_mode()
    def step(self) -> Chunk:
        """Denoise the next chunk and leave its clean keys and values in the cache."""
        first = self.next_frame == 0
        frames = list(range(self.next_frame, self.next_frame + (self.first_chunk if first else self.engine.chunk)))
        memory = self._open(frames, cut=self._cut)
        schedule, kind = self.engine.schedule, self.engine.model.config.prediction
        z = self.noise.initial(frames).to(self.engine.model.device)
        timesteps = schedule.timesteps(first_chunk=first)
        for i, timestep in enumerate(timesteps):
            clean = schedule.clean(z, self._run(z, timestep, memory), timestep, kind)
            if i + 1 < len(timesteps):
                noise = self.noise.renoise(frames, i) if schedule.fresh else schedule.noise(z, clean, timestep)
                z = schedule.noisy(clean, noise.to(clean.device), timesteps[i + 1])
        self._finish(clean, frames, memory)
        pixels = self.decode(clean) if self.decode else None
        chunk = Chunk(index=self.chunks, frames=tuple(frames), latents=clean, pixels=pixels)
        self.chunks += 1
        self._cut = False
        return chunk

    @torch.inference_mode()
    def prefill(self, given: Tensor) -> Chunk:
        """Continue from given clean latents [B, n, C, h, w], or from pictures, uint8 [B, pictures, height, width, 3].

        Pictures go through the engine's encoder. n, the number of latent frames, must be whole chunks, the first of
        ``first_chunk`` frames where nothing was made yet. Returns what was given as a chunk of index -1: the decoder
        has seen it too, so that what follows is decoded as its continuation.
        """
        if given.dtype == torch.uint8 and self.engine.encoder is None:
            raise ValueError("this engine has no encoder for pictures: pass latents [B, n, C, h, w]")
        latents = self.engine.encoder(given) if given.dtype == torch.uint8 else given
        expected = [self.batch, self.engine.model.config.in_dim, *self.size]
        if latents.dim() != 5 or [latents.shape[0], *latents.shape[2:]] != expected:
            raise ValueError(f"latents must be [B, n, C, h, w] with B, C, h, w = {expected}, got {list(latents.shape)}")
        sizes, left = [], latents.shape[1]
        while left > 0:
            sizes.append(self.engine.chunk if sizes or self.next_frame else self.first_chunk)
            left -= sizes[-1]
        if left < 0 or not sizes:
            raise ValueError(
                f"latents must be whole chunks of {self.engine.chunk} frames (the first of a video "
                f"{self.first_chunk}), got {latents.shape[1]} frames"
            )
        latents, first = latents.to(self.engine.model.device), self.next_frame
        for block in latents.split(sizes, dim=1):
            frames = list(range(self.next_frame, self.next_frame + block.shape[1]))
            self._finish(block, frames, self._open(frames))
        pixels = self.decode(latents) if self.decode else None
        return Chunk(index=-1, frames=tuple(range(first, self.next_frame)), latents=latents, pixels=pixels)

    @torch.inference_mode()
    def switch(self, prompt: str | Sequence[str] | Tensor) -> None:
        """Follow another prompt from the next chunk on; what happens to the cache is the preset's ``switch`` policy."""
        text = self.engine.encode(prompt)
        if text[0][0].shape[0] != self.batch:
            raise ValueError(f"prompt must be for {self.batch} videos, got {text[0][0].shape[0]}")
        self.text = text
        if count := self.window.switch():
            recent, timestep = self._recent[:, -count:], self.engine.schedule.context_timestep
            self._run(recent, timestep, self.window.memory, keys_only=True)

    def cut(self) -> None:
        """Cut to a new scene: the next chunk alone sits at the preset's ``cut_position`` (Infinity-RoPE)."""
        if self.preset.position.index != "slot":
            raise ValueError(f"a cut needs position.index 'slot', the preset {self.preset.name!r} has 'absolute'")
        self._cut = True

    def _open(self, frames: list[int], cut: bool = False) -> PagedMemory:
        """What the frames' passes attend through: room made, pages opened, positions planned."""
        return self.window.open(frames[0], len(frames), self.window.shape, cut=cut)

    def _run(self, z: Tensor, timestep: float, memory: PagedMemory, *, keys_only: bool = False) -> Tensor | None:
        timesteps = torch.full(z.shape[:2], timestep, dtype=torch.float32, device=z.device)
        return self.engine.model(z, timesteps, self.text, memory, keys_only=keys_only)

    def _finish(self, clean: Tensor, frames: list[int], memory: PagedMemory) -> None:
        """The clean pass, and the bookkeeping behind a chunk."""
        self._run(clean, self.engine.schedule.context_timestep, memory, keys_only=True)
        self.next_frame = frames[-1] + 1
        if self.preset.switch.kind == "recache":
            past = clean if self._recent is None else torch.cat((self._recent, clean), dim=1)
            self._recent = past[:, -self.preset.switch.recent :].clone()


def frames_for(seconds: float, fps: float, pictures_per_frame: int = 1) -> int:
    """Latent frames that give at least ``seconds`` of video: 1 picture the first, pictures_per_frame each later one."""
    pictures = max(1, math.ceil(seconds * fps - 1e-9))
    return 1 + -(-(pictures - 1) // pictures_per_frame)
