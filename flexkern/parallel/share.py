"""What a rank holds of one video, and what it does of each pass; the same on the rank that leads and on the others."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flexkern.backends import Backend
from flexkern.cache import FrameCache, Mix
from flexkern.model.wan import CausalWan, TextKV
from flexkern.parallel.group import Group
from flexkern.parallel.memory import ShardedMemory
from flexkern.parallel.split import Split
from flexkern.plan import ChunkPlan, PlanBuffers, place_turns

BY_HEAD = {"turn": 2, "query_turn": 1, "key_turn": 2}  # tensors of a plan, and their dimension of heads


class Share:
    """One rank's part of a video: the pages of its heads, the chunk's plan, the prompt.

    Args:
        group: The ranks.
        split: What this rank's part is.
        model: The transformer, whole on every rank.
        backend: The module that computes.
        cache: Pages of the rank's own heads.
        eps: Of the RMSNorm of queries and keys.
    """

    def __init__(
        self, group: Group, split: Split, model: CausalWan, backend: Backend, cache: FrameCache, eps: float
    ):  # fmt: skip
        self.group, self.split, self.model, self.backend, self.cache, self.eps = (
            group, split, model, backend, cache, eps,
        )  # fmt: skip
        device = cache.keys.device
        with torch.inference_mode(False):  # they outlive the mode they were made in
            self.place_turn = place_turns(split.rows, split.columns, cache.keys.shape[-1]).to(device)
        self.buffers = PlanBuffers(device)
        self.memory: ShardedMemory | None = None
        self.text: TextKV | None = None

    def blend(self, mixes: Sequence[Mix]) -> None:
        """Compute pages from others, of the rank's own heads."""
        self.cache.blend(mixes, self.place_turn)

    def follow(self, tables: Mapping[str, Tensor | None], spared: int) -> ShardedMemory:
        """What layers attend through from now on.

        Args:
            tables: Of the plan of all heads, on the CPU; ``place_turn`` is not among them.
            spared: As ``ShardedMemory``'s.
        """
        plan = self.buffers.hold(self._own(tables))
        self.memory = ShardedMemory(
            self.cache, plan, self.backend, self.eps, split=self.split, spared=spared, exchange=self.group.exchange
        )
        return self.memory

    def run(self, latents: Tensor, timestep: float, *, keys_only: bool) -> Tensor | None:
        """This rank's part of a pass.

        Args:
            latents: Of the whole frames, [B, F, in_dim, h, w].
            timestep: Of all frames.
            keys_only: Whether it runs for keys and values alone.

        Returns:
            The whole prediction [B, F, out_dim, h, w] on rank 0; None on others, and with keys_only.
        """
        assert self.memory is not None and self.text is not None, "a plan and a prompt come before a pass"
        timesteps = torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=latents.device)
        out = self.model(self.split.cut(latents), timesteps, self.text, self.memory, keys_only=keys_only)
        if out is None:
            return None
        rectangles = self.group.gather(out)
        return None if rectangles is None else self.split.joined(torch.stack(rectangles))

    def save(self, name: str, slots: Sequence[int]) -> Tensor | None:
        """The pages at these slots with the heads of all ranks, [L, B, R, S, H, D] on the CPU; None but on rank 0.

        name: keys or values.
        """
        pages: Tensor = getattr(self.cache, name)
        layers, batch, _, tokens, own, head_dim = pages.shape
        shape = layers, batch, len(slots), tokens, own * self.split.ranks, head_dim
        held = torch.empty(shape, dtype=pages.dtype, device="cpu") if self.group.rank == 0 else None
        for layer, one in enumerate(pages):
            parts = self.group.gather(one[:, list(slots)].contiguous())
            if held is not None and parts is not None:
                for part, rank in zip(parts, range(self.split.ranks), strict=True):
                    held[layer, ..., rank * own : (rank + 1) * own, :] = part
        return held

    def load(self, name: str, slots: Sequence[int], held: Tensor | None) -> None:
        """Put what ``save`` gave into the pages of every rank, each its own heads. held: None but on rank 0."""
        pages: Tensor = getattr(self.cache, name)
        layers, batch, _, tokens, own, head_dim = pages.shape
        for layer, one in enumerate(pages):
            parts = None if held is None else [part.contiguous() for part in held[layer].to(one.device).split(own, -2)]
            one[:, list(slots)] = self.group.scatter(parts, one.new_empty((batch, len(slots), tokens, own, head_dim)))

    def _own(self, tables: Mapping[str, Tensor | None]) -> ChunkPlan:
        """The plan of this rank's heads."""
        own: dict[str, Any] = dict(tables)
        for name, dim in BY_HEAD.items():
            if own[name].shape[dim] > 1:  # else all heads share one
                heads = self.split.own_heads
                own[name] = own[name].narrow(dim, heads.start, heads.stop - heads.start).contiguous()
        return ChunkPlan(place_turn=self.place_turn, **own)


def tables_of(plan: ChunkPlan) -> dict[str, Tensor | None]:
    """What of a plan changes from chunk to chunk, by name."""
    return {f.name: getattr(plan, f.name) for f in fields(plan) if f.name != "place_turn"}
