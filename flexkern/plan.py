"""One chunk's view of the cache: which pages attention reads, where new ones go, and how far each frame is turned.

A plan is the same for every layer and every denoising step. Angles come from a position policy in float64; what the
device sees are cosines and sines in float32. Letters: see the glossary (flexkern/docs/architecture.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flexkern.policies import Phases

BASE = 10000.0


def band_split(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head that turn with time, row and column: (22, 21, 21) for head_dim 128. Source: Wan 2.1."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def turns(angle: Tensor) -> Tensor:
    """(cos, sin) in float32 of angles in float64: [...] -> [..., 2]."""
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def place_angles(rows: int, columns: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles of row and column pairs at each place: float64 [rows * columns, row pairs + column pairs]."""
    _, *pairs = band_split(head_dim)
    places = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )  # fmt: skip
    angles = [
        place.flatten().double()[:, None] * torch.pow(BASE, -torch.arange(n, dtype=torch.float64, device=device) / n)
        for place, n in zip(places, pairs, strict=True)
    ]
    return torch.cat(angles, dim=-1)


def place_turns(rows: int, columns: int, head_dim: int) -> Tensor:
    """(cos, sin) [rows * columns, row pairs + column pairs, 2], float32: the part of 3D RoPE that never changes."""
    return turns(place_angles(rows, columns, head_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """Everything attention must know about a chunk."""

    write_slots: Tensor
    """int32 [F]: page of each computed frame, -1 where it is not kept"""
    read_slots: Tensor
    """int32 [R]: pages to read, in list order"""
    turn: Tensor
    """float32 [F, R, G, T, 2]: rotation of a query frame that meets a key frame, by the difference of their phases"""
    query_turn: Tensor
    """float32 [F, G, T, 2]: with ``key_turn`` the same rotation, for backends that turn query and key separately"""
    key_turn: Tensor
    """float32 [K, R, G, T, 2]; K = F where each query frame has a modulation of its own, else 1"""
    place_turn: Tensor
    """float32 [S, D / 2 - T, 2]: rotation by row and column"""
    logit_scale: Tensor
    """float32 [F]: factor on the logits of a query frame"""
    bias: Tensor | None = None
    """float32 [F, R]: added to the logits, -inf hides a frame; None for none"""


def make_plan(
    phases: Phases, *, write_slots: Sequence[int], read_slots: Sequence[int], place_turn: Tensor
) -> ChunkPlan:
    """The plan of a chunk, from what policies and cache have decided; on the CPU, except for ``place_turn``."""
    query, key = torch.from_numpy(phases.query), torch.from_numpy(phases.key)
    if len(write_slots) != query.shape[0] or len(read_slots) != key.shape[1]:
        raise ValueError(
            f"phases are for {query.shape[0]} computed and {key.shape[1]} read frames, "
            f"got {len(write_slots)} and {len(read_slots)} slots"
        )
    return ChunkPlan(
        write_slots=torch.tensor(write_slots, dtype=torch.int32, device="cpu"),
        read_slots=torch.tensor(read_slots, dtype=torch.int32, device="cpu"),
        turn=turns(query[:, None] - key),
        query_turn=turns(query),
        key_turn=turns(key),
        place_turn=place_turn,
        logit_scale=torch.from_numpy(phases.logit_scale).float(),
    )


class PlanBuffers:
    """Device memory for the plans of one session.

    Plans of equal shape are held at the same addresses, so that a captured CUDA graph always reads the newest. A plan
    that was handed out is therefore overwritten by the next one of its shape.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._held: dict[tuple[torch.Size | None, ...], ChunkPlan] = {}

    def hold(self, plan: ChunkPlan) -> ChunkPlan:
        """The plan on the device. Copies are asynchronous, from pinned memory; nothing waits for the device.

        ``place_turn`` never changes: it must be on the device already, and is not copied.
        """
        tensors = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name != "place_turn"}
        shapes = tuple(None if tensor is None else tensor.shape for tensor in tensors.values())
        if shapes not in self._held:
            there = {name: torch.empty_like(t, device=self.device) for name, t in tensors.items() if t is not None}
            self._held[shapes] = replace(plan, **there)
        for name, tensor in tensors.items():
            if tensor is not None:
                source = tensor.pin_memory() if self.device.type == "cuda" else tensor
                getattr(self._held[shapes], name).copy_(source, non_blocking=True)
        return self._held[shapes]
