"""What self-attention finds its keys and values in: the ``Memory`` protocol, and the paged cache as one.

``PagedMemory`` is one chunk's view of the KV cache: write keys and values to their pages, then attend.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flexkern.backends import Backend, Pointwise
from flexkern.cache import FrameCache
from flexkern.plan import ChunkPlan, band_split


class Memory(Protocol):
    """Where self-attention finds its keys and values."""

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """Attention output [B, F, S, H, D] of a layer, None where there is no query.

        Args:
            layer: Index of the layer.
            query: [B, F, S, H, D] before normalisation and rotation; None where only keys and values are wanted.
            key: As the query.
            value: [B, F, S, H, D].
            norms: RMSNorm weights [C] of query and key.
        """

    @property
    def ops(self) -> Pointwise:
        """The backend's pointwise operations."""


class PagedMemory:
    """One chunk's attention over the cache, through one backend.

    Args:
        cache: Pages of every layer.
        plan: What attention must know about the chunk.
        backend: The module that computes.
        eps: Of the RMSNorm of queries and keys.
        hear: Called in each layer with its index and the queries, as ``norm_rope_write`` gives them, before attention.

    Raises:
        ValueError: Plan and cache do not belong together.
    """

    def __init__(
        self, cache: FrameCache, plan: ChunkPlan, backend: Backend, eps: float = 1e-6,
        hear: Callable[[int, Tensor], None] | None = None,
    ):  # fmt: skip
        _, _, pages, tokens, heads, head_dim = cache.keys.shape
        time, *place = band_split(head_dim)
        computed, read = len(plan.write_slots), len(plan.read_slots)
        expected: dict[str, tuple[tuple[int, ...], ...]] = {
            "turn": ((computed, read, heads, time, 2), (computed, read, 1, time, 2)),
            "place_turn": ((tokens, sum(place), 2),),
            "logit_scale": ((computed,),),
        }
        for name, shapes in expected.items():
            shape = tuple(getattr(plan, name).shape)
            if shape not in shapes:
                raise ValueError(f"plan.{name} must be {' or '.join(map(str, map(list, shapes)))}, got {list(shape)}")
        if plan.read_slots.device != cache.keys.device:
            raise ValueError(f"plan and cache must be on one device, got {plan.read_slots.device}, {cache.keys.device}")
        self.cache, self.plan, self.eps, self.hear = cache, plan, eps, hear
        self.ops: Backend = backend

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """Write the chunk's keys and values to their pages, then attend; as ``Memory.attend``."""
        plan, (key_pages, value_pages) = self.plan, self.cache.pages(layer)
        query = self.ops.norm_rope_write(
            query, key, value, *norms, plan.place_turn, key_pages, value_pages, plan.write_slots, self.eps
        )
        if self.hear is not None:
            assert query is not None, "where queries are heard, no pass is for keys and values alone"
            self.hear(layer, query)
        return None if query is None else self.ops.frame_attention(query, key_pages, value_pages, plan)
