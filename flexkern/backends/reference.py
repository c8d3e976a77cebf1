"""The oracle as a backend: pointwise work in float32 with one rounding, attention frame by frame."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flexkern.kernels import reference
from flexkern.plan import ChunkPlan

__all__ = ["frame_attention", "gate_residual", "modulate", "norm_rope_write", "rms_norm"]

Operation = TypeVar("Operation", bound=Callable[..., Tensor])


def in_float32(fn: Operation) -> Operation:
    """fn computed in float32 (float64 stays) and rounded once, to the dtype of its first argument."""

    @wraps(fn)
    def widened(x: Tensor, *rest: Any) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return fn(x, *rest)
        return fn(*(a.float() if isinstance(a, Tensor) else a for a in (x, *rest))).to(x.dtype)

    return cast(Operation, widened)


rms_norm = in_float32(reference.rms_norm)
modulate = in_float32(reference.modulate)
gate_residual = in_float32(reference.gate_residual)


def norm_rope_write(
    query: Tensor | None, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, place_turn: Tensor,
    key_pages: Tensor, value_pages: Tensor, slots: Tensor, eps: float,
) -> Tensor | None:  # fmt: skip
    """As ``kernels.reference.norm_rope_write``, computed in float32; the query comes back in the key's dtype."""
    wide = torch.promote_types(key.dtype, torch.float32)
    turned = reference.norm_rope_write(
        None if query is None else query.to(wide), key.to(wide), value.to(wide), query_weight.to(wide),
        key_weight.to(wide), place_turn, key_pages, value_pages, slots, eps,
    )  # fmt: skip
    return None if turned is None else turned.to(key.dtype)


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """As ``kernels.reference.frame_attention``, computed in float32. Returns the output [B, F, S, H, D]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out, _ = reference.frame_attention(
        query.to(wide), key_pages, value_pages, plan.read_slots, plan.turn, plan.logit_scale, plan.bias
    )
    return out.to(query.dtype)
