"""Single tokens of frames that leave the window, chosen by the queries of the chunk that makes them leave.

In the first pass of that chunk, in every layer before its attention, each token of the frames that leave gets a score:

    score = sum over query tokens and heads of q . k,   both turned as in attention, no softmax

The queries are those of the last ``votes`` frames: of the pass itself, and before it of the clean pass of the chunks
before. The best tokens are gathered into pages, key and value; a token keeps the row, the column and the time
that it had, since a page's keys carry the turn between its own frame and theirs. Every layer chooses for itself, all
heads alike.
Source: Deep Forcing (arXiv 2512.05081), code release, which keeps the turned keys of these tokens as they are, and
fewer of them where all others have been chosen as often as they may.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexkern.cache import FrameCache, Pick
from flexkern.kernels.reference import pad_turn, rotate
from flexkern.plan import turns
from flexkern.state import State


class TokenChooser:
    """What of one video has been chosen, and what chooses.

    Args:
        cache: Pages of every layer.
        frequencies: Temporal frequencies of the model, float64 [T], radians per frame.
        votes: Frames whose queries choose.
        reuse: How many times a token may be chosen, one after the other, before all that were chosen less often.
    """

    def __init__(self, cache: FrameCache, frequencies: Tensor, *, votes: int, reuse: int):
        layers, batch, pages, tokens, _, _ = cache.keys.shape
        self.cache, self.frequencies, self.votes, self.reuse = cache, frequencies, votes, reuse
        device = cache.keys.device
        self.counts = torch.zeros((layers, batch, pages, tokens), dtype=torch.int32, device=device)  # times chosen
        self.begin()

    def begin(self) -> None:
        """Forget every frame."""
        self._heard: list[tuple[list[int], Tensor] | None] = [None] * len(self.counts)  # of each layer, as in _choose
        self._frames: Sequence[int] = ()
        self._pick: Pick | None = None
        self._waits: set[int] = set()

    def prepare(self, frames: Sequence[int], slots: Sequence[int], pick: Pick | None) -> None:
        """A chunk is to be computed.

        Args:
            frames: Absolute indices of its frames.
            slots: Of their pages.
            pick: What is to be chosen in its first pass.
        """
        self.counts[:, :, list(slots)] = 0
        self._frames, self._pick, self._waits = frames, pick, set(range(len(self.counts))) if pick else set()

    def hear(self, layer: int, query: Tensor) -> None:
        """Choose, where that is still to be done in this layer; the queries [B, F, S, H, D] vote.

        Queries are normalised and turned by place, as ``norm_rope_write`` gives them.
        """
        frames, votes = list(self._frames), query.to(torch.promote_types(query.dtype, torch.float32)).sum(2)
        if (before := self._heard[layer]) is not None:  # a frame has one vote, that of its last pass
            others = [i for i, frame in enumerate(before[0]) if frame not in frames]
            frames, votes = [*(before[0][i] for i in others), *frames], torch.cat((before[1][:, others], votes), 1)
        self._heard[layer] = frames, votes = frames[-self.votes :], votes[:, -self.votes :]
        if layer in self._waits:
            self._waits.remove(layer)
            self._choose(layer, frames, votes)

    def state(self) -> State:
        """All that later choices depend on."""
        heard = [one for one in self._heard if one is not None]
        sums = torch.stack([sums for _, sums in heard]).cpu() if heard else None
        return {
            "counts": self.counts[:, :, self.cache.slots].cpu(), "sums": sums,
            "heard": list(heard[0][0]) if heard else [],
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a cache that has been restored."""
        self.begin()
        self.counts.zero_()
        self.counts[:, :, self.cache.slots] = state["counts"].to(self.counts.device)
        if state["sums"] is not None:
            self._heard = [(state["heard"], sums) for sums in state["sums"].to(self.counts.device)]

    def _choose(self, layer: int, frames: Sequence[int], votes: Tensor) -> None:
        """frames: those that vote. votes: [B, R, H, D], the sums of their queries."""
        pick, (keys, values), counts = self._pick, self.cache.pages(layer), self.counts[layer]
        assert pick is not None, "a choice waits"
        slots, tokens = [page.slot for page in pick.sources], keys.shape[2]
        # [N, R, D / 2, 2], a frame that votes against a page; the sum of the turned votes, [B, N, H, D]
        apart = self._turn([[frame - page.frame for frame in frames] for page in pick.sources])
        vote = rotate(votes[:, None], apart[:, :, None]).sum(2)
        score = torch.einsum("bnshd,bnhd->bns", keys[:, slots].to(vote.dtype), vote).flatten(1)
        behind = 2 * (score.amax(1, keepdim=True) - score.amin(1, keepdim=True)) + 1  # all others
        score = score - behind * (counts[:, slots] >= self.reuse).flatten(1)
        best = score.topk(tokens * len(pick.slots), dim=1).indices.sort(1).values  # in the order of the window
        own = torch.arange(len(best), device=best.device)[:, None]
        back = self._turn([page.frame - pick.frame for page in pick.sources])[best // tokens][:, :, None]
        chosen = keys[:, slots].flatten(1, 2)[own, best]  # [B, tokens, H, D]
        chosen = rotate(chosen.to(vote.dtype), back).to(keys.dtype)
        kept, times = values[:, slots].flatten(1, 2)[own, best], counts[:, slots].flatten(1)[own, best] + 1
        for pages, picked in ((keys, chosen), (values, kept), (counts, times)):
            pages[:, pick.slots] = picked.unflatten(1, (len(pick.slots), tokens))

    def _turn(self, frames: Sequence[Any]) -> Tensor:
        """The rotation of so many frames in time, for a (nested) list of them: float32 [..., D / 2, 2]."""
        angle = torch.tensor(frames, dtype=torch.float64, device="cpu")[..., None] * self.frequencies
        return pad_turn(turns(angle), self.cache.keys.shape[-1] // 2).to(self.counts.device)
