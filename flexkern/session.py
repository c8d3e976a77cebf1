"""The autoregressive denoising loop: a ``Session`` is one video of any length, made chunk by chunk.

    session = engine.session(text_embedding, preset="flex", size=(60, 104), seed=0)
    for chunk in session: ...

A session's step: draw noise, let retention evict, plan positions, denoise in a few steps, run the clean result once
more so that the cache holds clean keys and values. Source: Self-Forcing pipeline/causal_inference.py, LongLive
pipeline/interactive_causal_inference.py.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flexkern.backends import Backend
from flexkern.cache import FrameCache
from flexkern.capture import Recorder
from flexkern.checks import latent_size, require, shown, whole
from flexkern.finite import HANDED_IN, Watch, validate_finite
from flexkern.graphs import passes_of
from flexkern.memory import PagedMemory
from flexkern.model.protocols import Decoder, Encoder, VideoModel
from flexkern.model.schedule import Schedule
from flexkern.modes import ordinary, without_gradients
from flexkern.noise import Draw, Noise, PolicyNoise
from flexkern.plan import band_split
from flexkern.policies import Preset, get_preset
from flexkern.state import State, nest, plain, require_same, stateful, within
from flexkern.stopwatch import Spent, mark
from flexkern.window import CacheWindow

if TYPE_CHECKING:  # there are builds of torch without what it needs
    from flexkern.parallel import Ranks

Prompt = str | Sequence[str] | Tensor
"""A text, one for each video of a batch, or what the text encoder makes of them, [B, L, text_dim]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one step made."""

    index: int
    """number of the step, from 0; -1 for what a video was given to begin with"""
    frames: tuple[int, ...]
    """absolute indices of its latent frames"""
    latents: Tensor
    """[B, F, C, h, w]"""
    pixels: Tensor | None
    """uint8 [B, pictures, height, width, 3]; None where the engine has no decoder"""
    spent: Spent | None = None
    """what its steps took; None for what was given"""

    def __repr__(self) -> str:
        pixels = None if self.pixels is None else list(self.pixels.shape)
        return f"Chunk({self.index}, frames {self.frames}, latents {list(self.latents.shape)}, pixels {pixels})"


class Loop(Protocol):
    """What a session asks of its engine; see ``flexkern.engine.Engine``."""

    model: VideoModel
    backend: Backend
    backend_name: str
    schedule: Schedule
    chunk: int
    first_chunk: int
    horizon: int
    size: tuple[int, int]
    encoder: Encoder | None
    decoder: Callable[[], Decoder] | None
    recorder: Callable[[], Recorder] | None
    ranks: "Ranks | None"

    def embed(self, prompt: Prompt, /) -> Tensor:
        """The text encoder's output [B, L, text_dim]; a tensor is returned as it is."""

    def encode(self, prompt: Prompt, /) -> Sequence[tuple[Tensor, ...]]:
        """What the model reads of a prompt."""


class Session:
    """One video, chunk by chunk: iterate over it, or call ``step``. Arguments and errors are ``Engine.session``'s.

    Attributes:
        passes: Runs the transformer; says how many CUDA graphs it holds, and how many bytes, or why none.
    """

    def __init__(
        self, engine: Loop, prompt: Prompt, *, preset: str | Preset = "flex", seed: int = 0,
        frames: int | None = None, size: tuple[int, int] | None = None, noise: Noise | None = None,
        first_chunk: int | None = None,
    ):  # fmt: skip
        self.engine, self.preset = engine, get_preset(preset)
        self.size = engine.size if size is None else latent_size(size)
        self.first_chunk = engine.first_chunk if first_chunk is None else whole("first_chunk", first_chunk, 1)
        self.target = frames = None if frames is None else whole("frames", frames, 1)
        seed = whole("seed", seed)
        draws = noise is None or all(callable(getattr(noise, name, None)) for name in ("initial", "renoise"))
        wanted = "noise must have initial() and renoise()"
        require(draws, f"{wanted}, got {shown(noise)}; a preset's is its field noise.kind")
        model, config = engine.model, engine.model.config
        rows, columns = model.grid(*self.size)
        bands, heads = band_split(config.head_dim)[0], config.num_heads
        most, least = max(engine.chunk, self.first_chunk), engine.chunk if noise is None else None
        chosen = self.preset.for_horizon(engine.horizon)
        chosen.validate(chunk=most, least=least, bands=bands, heads=heads, target=frames)
        began = time.perf_counter()
        self._embedding = engine.embed(prompt)
        led = None if engine.ranks is None else engine.ranks.begin(model)
        self.passes = passes_of(chosen, model, engine.recorder) if led is None else led.passes()
        self.text = self.passes.hold(engine.encode(self._embedding))
        self.prompt_seconds = time.perf_counter() - began  # of the host
        self.batch = self.text[0][0].shape[0]
        allocate = CacheWindow if led is None else led.window
        self.window = allocate(
            chosen, engine.backend, layers=config.num_layers, heads=heads, head_dim=config.head_dim,
            eps=config.eps, dtype=model.dtype, device=model.device, batch=self.batch, rows=rows, columns=columns,
            target=frames,
        )  # fmt: skip
        shape = (config.out_dim, *self.size)
        self._drawn: PolicyNoise | None = None  # ahead, on a thread; of other noise nobody knows what it depends on
        if noise is None:
            noise = self._drawn = PolicyNoise(
                self.window.preset.noise, seed, self.batch, shape, frames,
                pinned=torch.device(model.device).type == "cuda",
            )  # fmt: skip
        self.noise: Noise = noise
        self.decode: Decoder | None = engine.decoder() if engine.decoder else None
        self.next_frame = 0
        self.chunks = 0
        self._recent: Tensor | None = None  # clean latents that a recache would run again
        self._cut = False
        self._watch = Watch(model)

    def __repr__(self) -> str:
        made = f"{self.next_frame} of {self.target if self.target is not None else 'any number of'} frames"
        videos = f"{self.batch} video{'s' * (self.batch > 1)} of {self.size[0]}x{self.size[1]} latents"
        return f"Session(preset {self.preset.name!r}, {made} in {self.chunks} chunks, {videos})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Session is not copied: begin another, and let it restore() the state() of this one")

    @property
    def cache(self) -> FrameCache:
        """The frames that later chunks see."""
        return self.window.cache

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks without end, or until ``frames`` latent frames are made."""
        while self.target is None or self.next_frame < self.target:
            yield self.step()
        self.validate_chunks()

    @without_gradients
    def step(self) -> Chunk:
        """Denoise the next chunk and leave its clean keys and values in the cache.

        Raises:
            NotFiniteError: This chunk is not finite; on a GPU, where that is known only later, one before it was not.
        """
        self._watch.validate(wait=False)
        self._watch.moved_on()
        first, began = self.next_frame == 0, mark(self.engine.model.device)
        count = self.first_chunk if first else self.engine.chunk
        frames = list(range(self.next_frame, self.next_frame + count))
        memory = self._prepare(frames, cut=self._cut)
        schedule, kind = self.engine.schedule, self.engine.model.config.prediction
        timesteps = schedule.timesteps(first_chunk=first)
        self._draw_ahead(frames, len(timesteps))
        z = self._on_device(self.noise.initial(frames))
        passes = []
        for i, timestep in enumerate(timesteps):
            passes.append((z, timestep))
            clean = schedule.clean(z, self._predict(z, timestep, memory), timestep, kind)
            if i + 1 < len(timesteps):
                noise = self.noise.renoise(frames, i) if schedule.fresh else schedule.noise(z, clean, timestep)
                z = schedule.noisy(clean, self._on_device(noise), timesteps[i + 1])
        clean = ordinary(clean)
        self._finish(clean, frames, memory)
        denoised = mark(self.engine.model.device)
        pixels = ordinary(self.decode(clean)) if self.decode else None
        spent = Spent(began=began, denoised=denoised, decoded=mark(self.engine.model.device))
        chunk = Chunk(index=self.chunks, frames=tuple(frames), latents=clean, pixels=pixels, spent=spent)
        predict = partial(self._predict, memory=memory)
        self._watch.add(f"chunk {chunk.index}", clean, self.decode, index=chunk.index, passes=passes, predict=predict)
        self.chunks += 1
        self._cut = False
        self._watch.validate(wait=False)
        return chunk

    @without_gradients
    def validate_chunks(self) -> None:
        """Wait for the chunks so far, and raise where one is not finite.

        ``step`` does so without waiting: on a CPU at once, on a GPU once the device has told, at the next step at the
        earliest. Code that reads a chunk's pictures waits for them anyway, and should call this before using them.

        Raises:
            NotFiniteError: Says where it began.
        """
        self._watch.validate(wait=True)

    @without_gradients
    def prefill(self, given: Tensor) -> Chunk:
        """Continue from given clean latents, or from pictures, which go through the engine's encoder.

        Args:
            given: Latents [B, n, C, h, w], or pictures, uint8 [B, pictures, height, width, 3]. n, the number of latent
                frames, must be whole chunks, the first of ``first_chunk`` frames where nothing was made yet. Noise that
                is correlated in time begins anew after them.

        Returns:
            What was given, as a chunk of index -1. The decoder has seen it too, so that what follows is decoded as its
            continuation.

        Raises:
            ValueError: It is no such tensor, its shape does not fit, it is longer than the video was to be, or there
                is no encoder for pictures.
            NotFiniteError: What is given, or what encoder or decoder make of it, is not finite.
        """
        floating = isinstance(given, Tensor) and (given.is_floating_point() or given.dtype == torch.uint8)
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        require(floating, f"latents must be a floating-point tensor, pictures one of uint8, got {got}")
        self.validate_chunks()
        latents = given
        if given.dtype == torch.uint8:
            if self.engine.encoder is None:
                raise ValueError("this engine has no encoder for pictures: pass latents [B, n, C, h, w]")
            latents = self.engine.encoder(given)
        expected = [self.batch, self.engine.model.config.in_dim, *self.size]
        if latents.dim() != 5 or [latents.shape[0], *latents.shape[2:]] != expected:
            raise ValueError(f"latents must be [B, n, C, h, w] with B, C, h, w = {expected}, got {list(latents.shape)}")
        sizes: list[int] = []
        left = latents.shape[1]
        while left > 0:
            sizes.append(self.engine.chunk if sizes or self.next_frame else self.first_chunk)
            left -= sizes[-1]
        if left < 0 or not sizes:
            raise ValueError(
                f"latents must be whole chunks of {self.engine.chunk} frames (the first of a video "
                f"{self.first_chunk}), got {latents.shape[1]} frames"
            )
        whole_video = self.target is None or self.next_frame + latents.shape[1] <= self.target
        begun = f"{self.next_frame} are there, and {latents.shape[1]} are given"
        require(whole_video, f"the video was to have {self.target} frames: {begun}")
        if latents is given:
            validate_finite("the given latents", latents, advice=HANDED_IN)
        else:
            advice = "its weights may be damaged" if latents.dtype == torch.float32 else "try it in float32"
            validate_finite("the latents of the given pictures", latents, advice=f"the encoder made them: {advice}")
        latents, first = ordinary(latents.to(self.engine.model.device)), self.next_frame
        if self._drawn is not None:
            self._drawn.restart()
        for block in latents.split(sizes, dim=1):
            frames = list(range(self.next_frame, self.next_frame + block.shape[1]))
            self._finish(block, frames, self._prepare(frames))
        pixels = ordinary(self.decode(latents)) if self.decode else None
        self._watch.add("what the video begins with", latents, self.decode)
        self.validate_chunks()
        return Chunk(index=-1, frames=tuple(range(first, self.next_frame)), latents=latents, pixels=pixels)

    @without_gradients
    def switch(self, prompt: Prompt) -> None:
        """Follow another prompt from the next chunk on; the preset's ``switch`` policy decides what the cache keeps.

        Raises:
            ValueError: The prompt is for another number of videos, or does not fit the model.
            NotFiniteError: Its embedding, or a chunk so far, is not finite.
        """
        self.validate_chunks()
        embedding = self.engine.embed(prompt)
        text = self.engine.encode(embedding)
        if text[0][0].shape[0] != self.batch:
            raise ValueError(f"prompt must be for {self.batch} videos, got {text[0][0].shape[0]}")
        self._embedding, self.text = embedding, self.passes.hold(text)
        if count := self.window.switch():
            assert self._recent is not None, "a preset that recaches remembers its last frames"
            self._fill(self._recent[:, -count:], self.window.memory)

    def cut(self) -> None:
        """Cut to a new scene: only the next chunk is moved to the preset's ``cut_position`` (Infinity-RoPE).

        Raises:
            ValueError: The preset's positions are absolute.
        """
        if self.preset.position.index != "slot":
            raise ValueError(f"a cut needs position.index 'slot', the preset {self.preset.name!r} has 'absolute'")
        self._cut = True

    @without_gradients
    def state(self) -> State:
        """All that later chunks depend on, copied: cache, noise, decoder, prompt and counters.

        Tensors are on the CPU and fit safetensors, all else fits JSON. Weights are not in it.

        Raises:
            TypeError: A noise or a decoder of one's own has no ``state``.
            NotFiniteError: A chunk so far is not finite.
        """
        self.validate_chunks()
        state = {
            **nest("made_for", self._identity()), **nest("window", self.window.state()),
            **nest("noise", stateful(self.noise, "noise").state()),
            "embedding": self._embedding.cpu().clone(), "next_frame": self.next_frame, "chunks": self.chunks,
            "cut": self._cut,
        }  # fmt: skip
        if self.decode is not None:
            held = stateful(self.decode, "decoder").state()
            state |= nest("decoder", {name: tensor.cpu().clone() for name, tensor in held.items()})
        if self._recent is not None:
            state["recent"] = self._recent.cpu().clone()
        return state

    @without_gradients
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``, bit for bit on the same device, backend and weights.

        The session must have been begun as the other was: with an equal model, preset, size, seed and length. Its
        prompt may be any; that of the state is followed.

        Raises:
            ValueError: The state is of another session; the message names what differs.
            TypeError: A noise or a decoder of one's own has no ``restore``.
        """
        require_same("session", self._identity(), within("made_for", state))
        noise = stateful(self.noise, "noise")
        decoder = None if self.decode is None else stateful(self.decode, "decoder")
        noise.restore(within("noise", state))
        self.window.restore(within("window", state))
        if decoder is not None:
            decoder.restore(within("decoder", state))
        device = self.engine.model.device
        self._embedding = state["embedding"].to(device)
        self.text = self.passes.hold(self.engine.encode(self._embedding))
        self._recent = state["recent"].to(device) if "recent" in state else None
        self.next_frame, self.chunks, self._cut = state["next_frame"], state["chunks"], state["cut"]
        self._watch = Watch(self.engine.model)

    def _identity(self) -> State:
        """What a state must have been made with, for this session to continue from it."""
        engine, named = self.engine, lambda thing: None if thing is None else type(thing).__name__
        loop = {"chunk": engine.chunk, "first_chunk": self.first_chunk, "size": self.size, "frames": self.target}
        return plain({
            **nest("model", engine.model.config.to_dict()), **nest("preset", self.window.preset.describe()),
            **nest("schedule", asdict(engine.schedule)), **loop, "batch": self.batch,
            "noise": named(self.noise), "decoder": named(self.decode),
        })  # fmt: skip

    def _prepare(self, frames: Sequence[int], cut: bool = False) -> PagedMemory:
        """What the passes over these frames attend through: frames evicted, pages allocated, positions planned."""
        return self.window.prepare(frames[0], len(frames), cut=cut)

    @torch.inference_mode()
    def _predict(self, z: Tensor, timestep: float, memory: PagedMemory) -> Tensor:
        """The model's prediction for noisy latents."""
        prediction = self.passes(z, timestep, self.text, memory)
        assert prediction is not None, "only a pass for keys and values alone predicts nothing"
        return prediction

    @torch.inference_mode()
    def _fill(self, clean: Tensor, memory: PagedMemory) -> None:
        """The clean pass: afterwards the pages hold keys and values of clean latents."""
        alone = self.window.chooser is None  # else the last layer's queries choose too
        self.passes(clean, self.engine.schedule.context_timestep, self.text, memory, keys_only=alone)

    def _on_device(self, noise: Tensor) -> Tensor:
        """Noise where the model is. That of the session is not waited for: it is pinned, and nobody overwrites it."""
        return noise.to(self.engine.model.device, non_blocking=self._drawn is not None)

    def _draw_ahead(self, frames: Sequence[int], steps: int) -> None:
        """Let a thread draw the noise of this chunk and the next while the model is at work."""
        if self._drawn is None:
            return
        schedule, end = self.engine.schedule, frames[-1] + 1
        chunks = [(tuple(frames), steps)]
        if self.target is None or end < self.target:
            chunks.append((tuple(range(end, end + self.engine.chunk)), len(schedule.steps)))
        draws: list[Draw] = []
        for chunk, passes in chunks:
            draws.append((chunk, None))
            draws += [(chunk, i) for i in range(passes - 1) if schedule.fresh]
        self._drawn.expect(draws)

    def _finish(self, clean: Tensor, frames: Sequence[int], memory: PagedMemory) -> None:
        """The clean pass, and the bookkeeping after a chunk."""
        self._fill(clean, memory)
        self.next_frame = frames[-1] + 1
        if recent := self.window.recent:
            past = clean if self._recent is None else torch.cat((self._recent, clean), dim=1)
            self._recent = past[:, -recent:].clone()
