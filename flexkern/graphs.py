"""CUDA graphs of a session's passes: what the host has launched once, it replays with one call from then on.

A pass is some hundreds of launches, and at one chunk of a small model the host needs longer for them than the GPU does.
All that a pass reads lies at fixed addresses: weights, pages, plans (``flexkern.plan.PlanBuffers``), and, in memory of
its own, latents, timesteps and the prompt. So a graph holds for every later chunk of the same shapes, and its results
are those of the launches, bit for bit.

A pass is captured when a second chunk needs it. While the window grows every chunk reads another number of frames, so
that its graphs would serve that chunk alone: four passes and a clean one, against two for warming up and capturing.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flexkern.backends import runs_in_interpreter
from flexkern.capture import UNWANTED, Captures, CudaRecorder, Graph, Recorder, tell
from flexkern.memory import PagedMemory
from flexkern.model.protocols import VideoModel
from flexkern.model.wan import CausalWan, TextKV
from flexkern.policies import Preset

WHAT = "passes"
CHOSEN = "tokens are chosen in some passes and not in others"
MOST = 8  # graphs of a session, the one used longest ago goes; a video needs two, and two for every shape of prompt
REMEMBERED = 64  # passes that ran once
CAPTURABLE = ("triton",)  # the others go through the oracle's norm_rope_write, which asks the GPU which slots to write


def find_recorder(model: VideoModel, backend: str) -> Callable[[], Recorder] | None:
    """What makes the recorder of a session; None where passes cannot be captured, with the reason told to the log.

    Args:
        model: What is captured.
        backend: A key of ``flexkern.backends.BACKENDS``.
    """
    if why := why_eager(model, backend):
        tell(WHAT, why)
        return None
    device = torch.device(model.device)
    return lambda: CudaRecorder(device)


def why_eager(model: VideoModel, backend: str) -> str | None:
    """Why no pass of that model can be captured; None where it can."""
    if type(model) is not CausalWan:
        return f"{type(model).__name__} is not flexkern's own transformer"
    if torch.device(model.device).type != "cuda":
        return f"device '{model.device}' is not a CUDA GPU"
    if backend not in CAPTURABLE:
        return f"backend {backend!r} waits for values of the GPU in each layer"
    return "Triton interprets its kernels" if runs_in_interpreter() else None


def passes_of(preset: Preset, model: VideoModel, begin: Callable[[], Recorder] | None) -> "Passes":
    """The passes of a session with that preset. begin: makes what captures them; None for none."""
    return Passes(model, unwanted=CHOSEN) if preset.chooses_tokens else Passes(model, begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What a graph reads, weights apart."""

    latents: Tensor
    timesteps: Tensor
    text: TextKV
    memory: PagedMemory


class Passes:
    """Runs the passes of one session, launch by launch or as replays of captured graphs.

    Args:
        model: The transformer.
        begin: Makes what captures; None for none.
        unwanted: Why there is none.
    """

    def __init__(
        self, model: VideoModel, begin: Callable[[], Recorder] | None = None, *, unwanted: str = UNWANTED
    ):  # fmt: skip
        self.model = model
        self._graphs: Captures[_Inputs, Tensor | None] = Captures(begin, what=WHAT, most=MOST, unwanted=unwanted)
        self._seen: OrderedDict[object, int] = OrderedDict()  # pass -> the first chunk that needed it
        self._texts: dict[object, TextKV] = {}
        self._text: TextKV | None = None
        self._memory: PagedMemory | None = None
        self._chunk = 0

    def __repr__(self) -> str:
        return f"Passes({f'eager: {self.why_not}' if self.why_not else f'{self.count} graphs, {self.bytes} bytes'})"

    @property
    def why_not(self) -> str | None:
        """Why passes are not captured; None where they are."""
        return self._graphs.why_not

    @property
    def count(self) -> int:
        """Graphs that are held, at most ``MOST``."""
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Memory of the graphs and of what they read, but for weights, pages and plans."""
        texts = {id(t): t for text in self._texts.values() for layer in text for t in layer if t is not None}
        inputs = [t for read in self._graphs for t in (read.latents, read.timesteps)]
        return sum(t.numel() * t.element_size() for t in (*texts.values(), *inputs)) + self._graphs.bytes

    def hold(self, text: TextKV) -> TextKV:
        """The prompt, where passes read it: at the addresses of the last one of the same shapes. Nothing waits for it.

        Passes of a prompt that was not handed out by this are not captured. A prompt that was is overwritten by the
        next one of its shapes.
        """
        if self.why_not:
            return text
        flat = [tensor for layer in text for tensor in layer]
        order: dict[int, int] = {}
        same = tuple(order.setdefault(id(tensor), i) for i, tensor in enumerate(flat))  # layers may share a tensor
        shapes = tuple(tuple(None if t is None else (t.shape, t.dtype) for t in layer) for layer in text), same
        used = [read.text for read in self._graphs]
        self._texts = {key: kept for key, kept in self._texts.items() if key == shapes or any(kept is u for u in used)}
        if shapes not in self._texts:
            with torch.inference_mode(False):  # they outlive the mode they were made in
                made = {id(t): t if t is None else torch.empty_like(t) for t in flat}
            self._texts[shapes] = [tuple(made[id(t)] for t in layer) for layer in text]
        self._text = self._texts[shapes]
        with torch.no_grad():
            for layer, given in zip(self._text, text, strict=True):
                for tensor, value in zip(layer, given, strict=True):
                    if tensor is not None:
                        tensor.copy_(value)
        return self._text

    def __call__(
        self, latents: Tensor, timestep: float, text: TextKV, memory: PagedMemory, *, keys_only: bool = False
    ) -> Tensor | None:
        """What the model gives for these arguments, in memory of the caller's.

        Args:
            latents: [B, F, in_dim, h, w].
            timestep: Of all frames, 0 (clean) to 1000 (noise).
            text: From ``hold``.
            memory: Of the chunk.
            keys_only: Whether it runs for keys and values alone.
        """
        captured = self._captured(latents, timestep, text, memory, keys_only)
        if captured is None:
            timesteps = torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=latents.device)
            return self.model(latents, timesteps, text, memory, keys_only=keys_only)
        inputs, graph = captured
        inputs.latents.copy_(latents)
        inputs.timesteps.fill_(timestep)
        out = graph.replay()
        return None if out is None else out.clone()

    def _captured(
        self, latents: Tensor, timestep: float, text: TextKV, memory: PagedMemory, keys_only: bool
    ) -> tuple[_Inputs, Graph[Tensor | None]] | None:
        """The graph of the pass; None where it is to be launched."""
        if self.why_not:
            return None
        if memory is not self._memory:
            self._memory, self._chunk = memory, self._chunk + 1
            self._graphs.follow(self.model)
        moved = None if text is self._text else "the prompt is not where the session has put it"
        if why := moved or self._graphs.why_launch(latents.device):
            self._graphs.tell(why)
            return None
        key = keys_only, latents.shape, latents.dtype, id(text), _addresses(memory)
        if found := self._graphs.find(key):
            return found
        if self._seen.setdefault(key, self._chunk) == self._chunk:
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None

        def prepare() -> tuple[_Inputs, Callable[[], Tensor | None]]:
            with torch.inference_mode(False):  # they outlive the mode they were made in
                held, timesteps = latents.detach().clone(), latents.new_empty(latents.shape[:2], dtype=torch.float32)
            timesteps.fill_(timestep)
            inputs = _Inputs(latents=held, timesteps=timesteps, text=text, memory=memory)
            return inputs, lambda: self.model(held, timesteps, text, memory, keys_only=keys_only)

        return self._graphs.capture(key, prepare)


def _addresses(memory: PagedMemory) -> tuple[Any, ...]:
    """Where a chunk's plan and pages lie, and their shapes."""
    plan = [getattr(memory.plan, f.name) for f in fields(memory.plan)]
    tensors = memory.cache.keys, memory.cache.values, *plan
    return tuple(None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in tensors)
