"""Self-attention over ranks: each holds the pages of its own heads, and only the new chunk travels.

Outside of attention a rank has all heads of the tokens of its rectangle (``Split``), inside it has all tokens of its
heads. So a layer exchanges twice (all-to-all, as DeepSpeed-Ulysses does): query, key and value on the way in, the
attended values on the way out. The pages of past frames stay where they are.

    rectangle, H heads ── norm, turn by place ──▶ exchange ──▶ frame, H / ranks heads ── pages, attention ──▶ exchange

The norms of query and key are over all heads of a token. They come before the exchange, where a rank has whole rows:
behind it each row's sum of squares would have to be exchanged as well, and a kernel be written that takes it. The
backend's own norm_rope_write does it, into pages that are only sent on, so that what arrives has been rounded once and
is, bit for bit, what one rank would have written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flexkern.backends import Backend
from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.parallel.split import Split
from flexkern.plan import ChunkPlan

Exchange = Callable[[Tensor], Tensor]
"""[ranks, ...], entry r for rank r -> [ranks, ...], entry r from rank r"""


class ShardedMemory(PagedMemory):
    """One rank's part of a chunk's attention.

    Args:
        cache: Pages of the rank's own heads.
        plan: Of all heads; where each has a turn of its own, those of other ranks are left out.
        backend: The module that computes.
        eps: Of the RMSNorm of queries and keys.
        split: What the rank's part is.
        spared: How many frames, from the first on, are not written: their slots in the plan are -1.
        exchange: Hands each rank its entry.
    """

    def __init__(
        self, cache: FrameCache, plan: ChunkPlan, backend: Backend, eps: float, *,
        split: Split, spared: int, exchange: Exchange,
    ):  # fmt: skip
        super().__init__(cache, plan, backend, eps)
        self.split, self.spared, self.exchange = split, spared, exchange
        self.own_turn = split.own_places(plan.place_turn)
        self.written = plan.write_slots[spared:].long()
        self.order = torch.arange(len(plan.write_slots), dtype=torch.int32, device=plan.write_slots.device)

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """As ``Memory.attend``, for the rectangle's tokens: [B, F, S / ranks, H, D]."""
        split, pages = self.split, self.cache.pages(layer)
        new = pages.keys.new_empty((2, *key.shape))
        query = self.ops.norm_rope_write(
            query, key, value, *norms, self.own_turn, new[0], new[1], self.order, self.eps
        )  # fmt: skip
        parts = [*new] if query is None else [query, *new]
        batch, frames, places, heads, head_dim = key.shape
        shape = split.ranks, len(parts), batch, frames, places, heads // split.ranks, head_dim
        sent = torch.stack([split.by_heads(part) for part in parts], dim=1, out=new.new_empty(shape))
        got = split.over_frame(self.exchange(sent))
        for own, arrived in zip(pages, got[-2:], strict=True):
            own.unflatten(2, split.grid).index_copy_(1, self.written, arrived[:, self.spared :])
        if query is None:
            return None
        whole = got[0].flatten(2, 5).contiguous()
        out = self.ops.frame_attention(whole, *pages, self.plan)
        back = self.exchange(split.by_places(out).contiguous())
        return back.movedim(0, 3).flatten(3, 4)
