"""Check, then call: what the model's self-attention does with a paged cache."""

from types import ModuleType

from torch import Tensor

from flexkern.cache import FrameCache
from flexkern.plan import ChunkPlan, band_split


class PagedMemory:
    """One chunk's attention over the cache, through one backend: the ``Memory`` that a model is run with.

    Raises ValueError where plan and cache do not belong together, before any layer runs.
    """

    def __init__(self, cache: FrameCache, plan: ChunkPlan, backend: ModuleType, eps: float = 1e-6):
        _, _, pages, tokens, heads, head_dim = cache.keys.shape
        time, *place = band_split(head_dim)
        computed, read = len(plan.write_slots), len(plan.read_slots)
        expected = {
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
        self.cache, self.plan, self.ops, self.eps = cache, plan, backend, eps

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """Write the chunk's keys and values to their pages, then attend; see ``flexkern.model.wan.Memory``."""
        pages = self.cache.keys[layer], self.cache.values[layer]
        query = self.ops.norm_rope_write(
            query, key, value, *norms, self.plan.place_turn, *pages, self.plan.write_slots, self.eps
        )
        return None if query is None else self.ops.frame_attention(query, *pages, self.plan)
