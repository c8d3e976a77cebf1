"""CUDA graphs: what the host has launched once, it replays with one call from then on.

A graph launches the same kernels at the same addresses, so its results are those of the launches, bit for bit. Whoever
captures a function sees to it that all it reads lies where it lay: ``flexkern.graphs`` for the passes of a session,
``flexkern.model.vae.graphs`` for the chunks of a decoder.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

LOG = logging.getLogger("flexkern")
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process
GLOBAL_HOOKS = "_global_forward_hooks", "_global_forward_pre_hooks"
UNWANTED = "none are wanted, or the engine cannot have any"

Inputs = TypeVar("Inputs")
Out = TypeVar("Out")
Made = TypeVar("Made", covariant=True)


class Graph(Protocol[Made]):
    """A captured function."""

    def replay(self) -> Made:
        """Run it on what lies at its addresses now. The next replay of any graph may overwrite the result."""


class Recorder(Protocol):
    """What captures for one owner; all that talks to ``torch.cuda`` of graphs is behind it."""

    def capture(self, run: Callable[[], Out]) -> Graph[Out]:
        """The graph of a function without arguments, which may be run on the way. Raises what the function raises."""

    def why_not(self) -> str | None:
        """Why nothing can be captured or replayed at the moment; None where it can."""

    @property
    def bytes(self) -> int:
        """Memory of the graphs."""


class CudaGraph(Generic[Out]):
    """A ``torch.cuda.CUDAGraph`` with its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Out):
        self.graph, self.out = graph, out

    def replay(self) -> Out:
        """As ``Graph.replay``, on the current stream."""
        self.graph.replay()
        return self.out


class CudaRecorder:
    """Captures on a stream of its own. Its graphs share one pool of memory: they are never replayed side by side."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Out]) -> Graph[Out]:
        """As ``Recorder.capture``. Runs the function once, so that libraries have what they allocate at first use."""
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                self.stream.wait_stream(current)
                try:
                    with torch.cuda.stream(self.stream):
                        run()
                finally:  # also where it failed: what it had launched writes to memory of the current stream
                    current.wait_stream(self.stream)
                try:
                    # thread_local: others go on pinning memory and copying
                    with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                        out = run()
                except BaseException:
                    self._forget()
                    raise
            finally:
                torch.cuda.set_stream(current)  # a capture that fails does not
        return CudaGraph(graph, out)

    def _forget(self) -> None:
        """The allocator knows that the capture is over. Before torch 2.12 it does not hear of one whose end fails, and
        from then on refuses ``torch.cuda.empty_cache`` to the whole process (pytorch/pytorch#180395).
        """
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        with suppress(RuntimeError):  # it knows
            if end is not None:
                end(torch.cuda.current_device(), self.pool)

    def why_not(self) -> str | None:
        """As ``Recorder.why_not``."""
        return "a capture is under way" if torch.cuda.is_current_stream_capturing() else None

    @property
    def bytes(self) -> int:
        """What the pool holds; the driver's own memory for the launches is not known."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self.pool))


@cache
def tell(what: str, why: str, level: int = logging.INFO) -> None:
    """Tell the logger ``flexkern``, once, why something is launched kernel by kernel."""
    LOG.log(level, "%s are not replayed as CUDA graphs: %s", what, why)


class Captures(Generic[Inputs, Out]):
    """The graphs that one owner holds, each with what it reads, which must live as long.

    Once a capture has failed, none is tried again: everything is launched, as it would be without graphs.

    Args:
        begin: Makes what captures; None for none.
        what: What is captured, in the plural, for the log.
        most: Graphs that are held; the one used longest ago goes.
        level: Of what the log is told.
        unwanted: Why there is no ``begin``.

    Attributes:
        why_not: Why nothing is captured; None where something may be.
    """

    def __init__(
        self, begin: Callable[[], Recorder] | None, *, what: str, most: int, level: int = logging.INFO,
        unwanted: str = UNWANTED,
    ):  # fmt: skip
        self.why_not = None if begin else unwanted
        self._begin, self._recorder = begin, begin() if begin else None
        self._what, self._most, self._level = what, most, level
        self._held: OrderedDict[object, tuple[Inputs, Graph[Out]]] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._weights: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Inputs]:
        """What the graphs read."""
        return (inputs for inputs, _ in self._held.values())

    @property
    def bytes(self) -> int:
        """Memory of the graphs, but for what they read."""
        return self._recorder.bytes if self._recorder else 0

    def tell(self, why: str) -> None:
        """Tell the log, once, why something is launched."""
        tell(self._what, why, self._level)

    def follow(self, model: object) -> None:
        """Drop the graphs if weights were moved or replaced since the last call."""
        self._modules = [*model.modules()] if isinstance(model, nn.Module) else []
        held = [t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        weights = tuple(tensor.data_ptr() for tensor in held)
        if weights != self._weights:
            self.drop()
        self._weights = weights

    def drop(self) -> None:
        """Give the graphs up, with their memory."""
        if self._held and self._begin:
            self._held.clear()
            self._recorder = self._begin()  # a pool without graphs cannot be captured into again

    def why_launch(self, device: torch.device) -> str | None:
        """Why this call is launched, whether or not it was captured; None where a graph may serve."""
        if self._recorder is None:
            return self.why_not
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        if hooked or any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS):
            return f"modules of {type(self._modules[0]).__name__ if self._modules else 'the model'} have hooks"
        return self._recorder.why_not()

    def find(self, key: object) -> tuple[Inputs, Graph[Out]] | None:
        """What was captured for that key; None if nothing was."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def capture(
        self, key: object, prepare: Callable[[], tuple[Inputs, Callable[[], Out]]]
    ) -> tuple[Inputs, Graph[Out]] | None:
        """Capture a function; None where that failed.

        Args:
            key: What ``find`` will ask for.
            prepare: Makes what the function reads, and the function.
        """
        assert self._recorder is not None, "why_launch says so"
        try:
            inputs, run = prepare()
            graph = self._recorder.capture(run)
        except Exception as error:  # of any kind, and the launches may work
            told = error.__context__ or error  # torch's own, of the end of a capture, hides what ended it
            self.why_not = f"a capture failed with {type(told).__name__}: {' '.join(str(told).split())[:200]}"
            self.tell(self.why_not)
            self._recorder = None
            self._held.clear()
            return None
        self._held[key] = inputs, graph
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return self._held[key]
