"""A decoded chunk as one CUDA graph: one call of the host instead of hundreds of launches. Off unless asked for.

A graph reads and writes where it did when it was captured. Latents are copied to it, and what each causal convolution
leaves for the next chunk is copied over what it left before (``InPlace``), so that a replay finds it there. Nothing
that a replay overwrites is handed out: its pictures are clamped and rounded into memory of the caller's, on the stream
that replays, and ``WanDecoder.state`` is a copy.

Captured is the chunk of a video that is shaped as the one before it. A video's first chunk, a last one that is shorter,
and tiles are launched.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexkern.backends import runs_in_interpreter
from flexkern.capture import Captures, CudaRecorder, Graph, Recorder
from flexkern.model.vae.net import DecoderNet, Past


def find_recorder(net: DecoderNet) -> Callable[[], Recorder]:
    """What makes the recorder of a decoder.

    Raises:
        ValueError: Nothing can be captured where the network is.
    """
    if net.device.type != "cuda":
        raise ValueError(f"graphs need a CUDA GPU, the decoder is on {str(net.device)!r}")
    if runs_in_interpreter():
        raise ValueError("graphs need compiled kernels, Triton interprets them")
    return lambda: CudaRecorder(net.device)


class InPlace(dict[str, Tensor]):
    """A past at addresses that stay: what it is given is copied over what it holds."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self[name].copy_(tensor)


Read = tuple[Tensor, InPlace]
"""The latents and the past that a graph reads."""
Pieces = tuple[Tensor, ...]
"""Pictures [B, T, H, W, colours] that follow on each other."""


class ChunkGraphs:
    """Replays the chunks of one decoder. It holds one graph at most, for the chunk that last came twice in a row.

    Args:
        net: The network.
        begin: Makes what captures.

    Attributes:
        why_not: Why the last chunk that goes on with a video was launched; None if it was replayed.
    """

    def __init__(self, net: DecoderNet, begin: Callable[[], Recorder]):
        self.net = net
        self.why_not: str | None = "no video has gone on"
        self._graphs: Captures[Read, Pieces] = Captures(
            begin, what="chunks of the VAE's decoder", most=1, level=logging.WARNING
        )
        self._last: object = None
        self._takes = 0

    def __repr__(self) -> str:
        eager = f"; launched: {self.why_not}" if self.why_not else ""
        return f"ChunkGraphs({self.count} graphs, {self.bytes} bytes{eager})"

    @property
    def count(self) -> int:
        """Graphs that are held, at most one."""
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Memory of the graph and of what it reads, but for weights."""
        read = [tensor for latents, past in self._graphs for tensor in (latents, *past.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in read) + self._graphs.bytes

    def __call__(self, frames: Tensor, past: Past, at_once: Sequence[int], *, takes: int, room: int) -> Pieces | None:
        """The pictures of a chunk that goes on with a video; None where it is to be launched.

        Args:
            frames: [B, F, C, h, w].
            past: Of the video so far, afterwards also of these frames; as it was where the chunk is to be launched.
            at_once: As ``net.Decoder.forward`` takes it.
            takes: Bytes that a graph of the chunk holds.
            room: Bytes that it may hold.

        Returns:
            The pictures, which the next chunk may overwrite.
        """
        found = self._find(frames, past, at_once, takes, room)
        if found is None:
            return None
        (latents, standing), graph = found
        if past.held is not standing:  # begun, restored or launched since
            for name, tensor in past.held.items():
                standing[name] = tensor
            past.held = standing
        latents.copy_(frames)
        return graph.replay()

    def _find(
        self, frames: Tensor, past: Past, at_once: Sequence[int], takes: int, room: int
    ) -> tuple[Read, Graph[Pieces]] | None:
        """The graph of the chunk with what it reads; None where it is to be launched."""
        graphs, key = self._graphs, (frames.shape, frames.dtype, tuple(at_once))
        again, self._last = key == self._last, key
        graphs.follow(self.net)
        why = graphs.why_launch(frames.device)
        if why is None and key not in graphs:
            if not again:
                self.why_not = "it is not shaped as the chunk before it"
                return None
            if takes > room:
                left = f"memory leaves {max(room, 0) / 1e9:.3g} GB beside what a launched chunk takes"
                why = f"a graph takes {takes / 1e9:.3g} GB, {left}"
        if why is not None:
            graphs.tell(why)
            self.why_not = why
            return None
        found = graphs.find(key) or self._capture(key, frames, past, at_once, takes)
        self.why_not = graphs.why_not
        return found

    def _capture(
        self, key: object, frames: Tensor, past: Past, at_once: Sequence[int], takes: int
    ) -> tuple[Read, Graph[Pieces]] | None:
        """The new graph, in the place of the one so far; None where that failed. The past stays as it is."""
        self._graphs.drop()
        self._takes = takes

        def prepare() -> tuple[Read, Callable[[], Pieces]]:
            with torch.inference_mode(False):  # they outlive the mode they were made in
                latents = frames.detach().clone()
                standing = InPlace({name: tensor.clone() for name, tensor in past.held.items()})
            return (latents, standing), lambda: tuple(self.net(latents, Past(standing), at_once))

        return self._graphs.capture(key, prepare)

    def give_way(self, room: int) -> None:
        """Drop the graph if it holds more bytes than there are, so that what is launched fits beside it."""
        if self.count and self._takes > room:
            self._graphs.drop()
