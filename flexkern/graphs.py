"""CUDA graphs of a session's passes: what the host has launched once, it replays with one call from then on.

A pass is some hundreds of launches, and at one chunk of a small model the host needs longer for them than the GPU does.
All that a pass reads lies at fixed addresses: weights, pages, plans (``flexkern.plan.PlanBuffers``), and, in memory of
its own, latents, timesteps and the prompt. So a graph holds for every later chunk of the same shapes, and its results
are those of the launches, bit for bit.

A pass is captured when a second chunk needs it. While the window grows every chunk reads another number of frames, so
that its graphs would serve that chunk alone: four passes and a clean one, against two for warming up and capturing.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from flexkern.backends import runs_in_interpreter
from flexkern.memory import PagedMemory
from flexkern.model.protocols import VideoModel
from flexkern.model.wan import CausalWan, TextKV

LOG = logging.getLogger("flexkern")
MOST = 8  # graphs of a session, the one used longest ago goes; a video needs two, and two for every shape of prompt
REMEMBERED = 64  # passes that ran once
CAPTURABLE = ("triton",)  # the others go through the oracle's norm_rope_write, which asks the GPU which slots to write
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process
GLOBAL_HOOKS = "_global_forward_hooks", "_global_forward_pre_hooks"


class Graph(Protocol):
    """A captured pass."""

    def replay(self) -> Tensor | None:
        """Run it on what lies at its addresses now. The next replay of any graph may overwrite the result."""


class Recorder(Protocol):
    """What captures the passes of one session; all that talks to ``torch.cuda`` of graphs is behind it."""

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        """The graph of a function without arguments, which may be run on the way. Raises what the function raises."""

    def why_not(self) -> str | None:
        """Why nothing can be captured or replayed at the moment; None where it can."""

    @property
    def bytes(self) -> int:
        """Memory of the graphs."""


class CudaGraph:
    """A ``torch.cuda.CUDAGraph`` with its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor | None):
        self.graph, self.out = graph, out

    def replay(self) -> Tensor | None:
        """As ``Graph.replay``, on the current stream."""
        self.graph.replay()
        return self.out


class CudaRecorder:
    """Captures on a stream of its own. Its graphs share one pool of memory: they are never replayed side by side."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        """As ``Recorder.capture``. Runs the function once, so that libraries have what they allocate at first use."""
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                self.stream.wait_stream(current)
                with torch.cuda.stream(self.stream):
                    run()
                current.wait_stream(self.stream)
                # thread_local: others go on pinning memory and copying
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    out = run()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails does not
        return CudaGraph(graph, out)

    def why_not(self) -> str | None:
        """As ``Recorder.why_not``."""
        return "a capture is under way" if torch.cuda.is_current_stream_capturing() else None

    @property
    def bytes(self) -> int:
        """What the pool holds; the driver's own memory for the launches is not known."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self.pool))


def find_recorder(model: VideoModel, backend: str) -> Callable[[], Recorder] | None:
    """What makes the recorder of a session; None where passes cannot be captured, with the reason told to the log.

    Args:
        model: What is captured.
        backend: A key of ``flexkern.backends.BACKENDS``.
    """
    if why := why_eager(model, backend):
        tell(why)
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


@cache
def tell(why: str) -> None:
    """Tell the logger ``flexkern``, once, why passes are launched one by one."""
    LOG.info("passes are not replayed as CUDA graphs: %s", why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A graph with what it reads, which must live as long."""

    graph: Graph
    latents: Tensor
    timesteps: Tensor
    text: TextKV
    memory: PagedMemory


class Passes:
    """Runs the passes of one session, launch by launch or as replays of captured graphs.

    Args:
        model: The transformer.
        begin: Makes what captures; None for none.

    Attributes:
        why_not: Why passes are not captured; None where they are.
    """

    def __init__(self, model: VideoModel, begin: Callable[[], Recorder] | None = None):
        self.model, self.why_not = model, None if begin else "none are wanted, or the engine cannot have any"
        self._begin, self._recorder = begin, begin() if begin else None
        self._graphs: OrderedDict[object, _Captured] = OrderedDict()
        self._seen: OrderedDict[object, int] = OrderedDict()  # pass -> the first chunk that needed it
        self._texts: dict[object, TextKV] = {}
        self._text: TextKV | None = None
        self._memory: PagedMemory | None = None
        self._chunk = 0
        self._modules: list[nn.Module] = []
        self._weights: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Passes({f'eager: {self.why_not}' if self.why_not else f'{self.count} graphs, {self.bytes} bytes'})"

    @property
    def count(self) -> int:
        """Graphs that are held, at most ``MOST``."""
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Memory of the graphs and of what they read, but for weights, pages and plans."""
        texts = {id(t): t for text in self._texts.values() for layer in text for t in layer if t is not None}
        inputs = [t for held in self._graphs.values() for t in (held.latents, held.timesteps)]
        own = sum(t.numel() * t.element_size() for t in (*texts.values(), *inputs))
        return own + (self._recorder.bytes if self._recorder else 0)

    def hold(self, text: TextKV) -> TextKV:
        """The prompt, where passes read it: at the addresses of the last one of the same shapes. Nothing waits for it.

        Passes of a prompt that was not handed out by this are not captured. A prompt that was is overwritten by the
        next one of its shapes.
        """
        if self._recorder is None:
            return text
        flat = [tensor for layer in text for tensor in layer]
        order: dict[int, int] = {}
        same = tuple(order.setdefault(id(tensor), i) for i, tensor in enumerate(flat))  # layers may share a tensor
        shapes = tuple(tuple(None if t is None else (t.shape, t.dtype) for t in layer) for layer in text), same
        used = [held.text for held in self._graphs.values()]
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
        captured.latents.copy_(latents)
        captured.timesteps.fill_(timestep)
        out = captured.graph.replay()
        return None if out is None else out.clone()

    def _captured(
        self, latents: Tensor, timestep: float, text: TextKV, memory: PagedMemory, keys_only: bool
    ) -> _Captured | None:
        """The graph of the pass; None where it is to be launched."""
        if self._recorder is None:
            return None
        if memory is not self._memory:
            self._begin_chunk(memory)
        if why := self._why_launch(latents, text) or self._recorder.why_not():
            tell(why)
            return None
        key = keys_only, latents.shape, latents.dtype, id(text), _addresses(memory)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._seen.setdefault(key, self._chunk) == self._chunk:
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None
        with torch.inference_mode(False):
            held, timesteps = latents.detach().clone(), latents.new_empty(latents.shape[:2], dtype=torch.float32)
        timesteps.fill_(timestep)
        try:
            graph = self._recorder.capture(lambda: self.model(held, timesteps, text, memory, keys_only=keys_only))
        except Exception as error:  # whatever cannot be captured is launched, as it would be without graphs
            told = error.__context__ or error  # torch's own, of the end of a capture, hides what ended it
            self.why_not = f"a capture failed with {type(told).__name__}: {' '.join(str(told).split())[:200]}"
            tell(self.why_not)
            self._recorder = None
            self._graphs.clear()
            return None
        self._graphs[key] = _Captured(graph=graph, latents=held, timesteps=timesteps, text=text, memory=memory)
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _begin_chunk(self, memory: PagedMemory) -> None:
        """Another chunk: drop the graphs if weights were moved or replaced since the last one."""
        self._memory, self._chunk = memory, self._chunk + 1
        self._modules = [*self.model.modules()] if isinstance(self.model, nn.Module) else []
        held = [t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        weights = tuple(tensor.data_ptr() for tensor in held)
        if weights != self._weights and self._graphs and self._begin:
            self._graphs.clear()
            self._recorder = self._begin()  # a pool without graphs cannot be captured into again
        self._weights = weights

    def _why_launch(self, latents: Tensor, text: TextKV) -> str | None:
        """Why this pass is launched even so."""
        if text is not self._text:
            return "the prompt is not where the session has put it"
        if torch.is_autocast_enabled(latents.device.type):
            return "autocast is on"
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        if hooked or any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS):
            return "modules of the transformer have hooks"
        return None


def _addresses(memory: PagedMemory) -> tuple[Any, ...]:
    """Where a chunk's plan and pages lie, and their shapes."""
    plan = [getattr(memory.plan, f.name) for f in fields(memory.plan)]
    tensors = memory.cache.keys, memory.cache.values, *plan
    return tuple(None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in tensors)
