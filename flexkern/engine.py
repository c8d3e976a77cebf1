"""The autoregressive denoising loop: an ``Engine`` holds a model, a ``Session`` one video, for ever if need be.

    engine = Engine.from_pretrained("self_forcing_dmd.pt")  # VAE and text encoder are found beside it
    session = engine.session("a cat walks on grass", preset="flex", seed=0)
    for chunk in session: ...

A session's step: draw noise, let retention evict, plan positions, denoise in a few steps, run the clean result once
more so that the cache holds clean keys and values. Source: Self-Forcing pipeline/causal_inference.py, LongLive
pipeline/interactive_causal_inference.py.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from flexkern.backends import get_backend
from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.model.checkpoint import Checkpoint, Dtype, Parts, load_parts, validate_checkpoint
from flexkern.model.families import Family
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan
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
        size: tuple[int, int] = (60, 104), first_chunk: int | None = None,
    ):  # fmt: skip
        """schedule: default that of Self-Forcing. chunk: frames denoised together. size: default height and width of a
        latent frame. decoder: called without arguments for each session, gives its ``Decoder``. first_chunk: default
        frames of the first chunk, where it differs (1 for models trained with ``independent_first_frame``)."""
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 frame, got {chunk}")
        self.model, self.chunk, self.size = model, chunk, size
        self.first_chunk = first_chunk or chunk
        self.schedule = schedule or Schedule()
        self.backend = get_backend(backend, model.device)
        self.text_encoder, self.encoder, self.decoder = text_encoder, encoder, decoder

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        family: str | Family | None = None,
        schedule: Schedule | None = None,
        chunk: int | None = None,
        first_chunk: int | None = None,
        size: tuple[int, int] | None = None,
        vae: str | Path | None = None,
        text_encoder: TextEncoder | str | Path | None = None,
        tokenizer: str | Path | None = None,
        embeddings: str | Path | None = None,
        prompts: Sequence[str] = (),
        encoder: Encoder | None = None,
        decoder: Callable[[], Decoder] | None = None,
        pixels: bool | None = None,
        text: bool | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        ema: bool | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        backend: str = "sdpa",
    ) -> "Engine":
        """The engine for a checkpoint on disk, with what ``flexkern render`` finds for it: VAE, text encoder, schedule.

        Args:
            path: Weight file or folder, in any published layout.
            family: How it was trained, a name or a ``Family``. Default: the one that file or folder are named after,
                else self-forcing.
            schedule: Noise levels. Default: the family's, as for chunk, first chunk and size.
            chunk: Latent frames denoised together.
            first_chunk: Latent frames of the first chunk.
            size: Height and width of a latent frame.
            vae: Path of a VAE. Default: the one beside the weights, if there is one.
            text_encoder: Path of a text encoder, or one of your own. Default: the one beside the weights, if any.
            tokenizer: Folder of the tokenizer, where it is not beside the text encoder.
            embeddings: File of saved embeddings, in place of a text encoder.
            prompts: Encoded before the transformer is loaded; then the text encoder (11 GB) goes. Without any it stays.
            encoder: One of your own; then no VAE is looked for.
            decoder: One of your own, called without arguments for each session; then no VAE is looked for.
            pixels: True insists on a VAE, False leaves it out.
            text: True insists on a text encoder or embeddings, False leaves them out.
            lora: LoRA of the transformer, file or folder.
            lora_scale: Times alpha / rank of the LoRA.
            ema: None takes the averaged weights where there are any, True insists on them, False takes the raw ones.
            dtype: Of the transformer's weights: bfloat16, float16 or float32.
            device: cpu, cuda or cuda:N.
            backend: Of attention, one of ``flexkern.backends.BACKENDS``.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: Something does not fit; all is checked from headers, before weights are read.
            NotImplementedError: A kind of checkpoint that is not supported.
            ImportError: Names the extra that is not installed.
        """
        own_text = None if text_encoder is None or isinstance(text_encoder, str | Path) else text_encoder
        own_codec = encoder is not None or decoder is not None
        if own_codec and vae is not None:
            raise ValueError("give vae, or an encoder and a decoder of your own, not both")
        checkpoint = Checkpoint(
            weights=path,
            family=family,
            schedule=schedule,
            chunk=chunk,
            first_chunk=first_chunk,
            size=size,
            vae=vae,
            text_encoder=text_encoder if isinstance(text_encoder, str | Path) else None,
            tokenizer=tokenizer,
            embeddings=embeddings,
            lora=lora,
            lora_scale=lora_scale,
            ema=ema,
            dtype=cast(Dtype, str(dtype).removeprefix("torch.")),
        )
        parts = validate_checkpoint(
            checkpoint,
            prompts=prompts,
            pixels=False if own_codec else pixels,
            text=text if own_text is None else False,
            backend=backend,
            device=str(device),
        )
        for note in parts.notes:
            warnings.warn(note, stacklevel=2)
        return cls.from_parts(parts, text_encoder=own_text, encoder=encoder, decoder=decoder)

    @classmethod
    def from_parts(
        cls,
        parts: Parts,
        *,
        text_encoder: TextEncoder | None = None,
        encoder: Encoder | None = None,
        decoder: Callable[[], Decoder] | None = None,
    ) -> "Engine":
        """The engine of parts that were found and validated; the weights are read here.

        Args:
            parts: What ``flexkern.pipeline.check`` returned.
            text_encoder: One of your own, in place of the checkpoint's; so are encoder and decoder.
            encoder: Turns pictures into latents.
            decoder: Called without arguments for each session.
        """
        loaded, family = load_parts(parts), parts.family
        encode = None if loaded.vae is None else loaded.vae.encode
        return cls(
            loaded.model,
            schedule=family.schedule,
            backend=parts.backend,
            chunk=family.chunk,
            first_chunk=family.first_chunk,
            size=family.size,
            text_encoder=text_encoder or loaded.text_encoder,
            encoder=encoder or encode,
            decoder=decoder or loaded.decoder,
        )

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
        noise: takes the place of the preset's noise. first_chunk: frames of the first chunk, where it is not the
        engine's."""
        self.engine, self.preset, self.target = engine, get_preset(preset), frames
        self.size = tuple(size or engine.size)
        self.first_chunk = first_chunk or engine.first_chunk
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
