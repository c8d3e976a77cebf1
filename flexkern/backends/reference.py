"""The oracle as a backend: pointwise work in float32 with one rounding, attention frame by frame."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexkern.kernels import reference
from flexkern.plan import ChunkPlan

__all__ = ["add_modulate", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]

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


def add_modulate(
    x: Tensor, update: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, offset: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As ``kernels.reference.add_modulate``, computed in float32, each result rounded once."""
    wide = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))
    gate = None if gate is None else wide(gate)
    if offset == 0 and not any((*scale.stride()[:2], *shift.stride()[:2])):  # one weight and bias for all frames
        total = wide(x) + wide(update) if gate is None else reference.gate_residual(wide(x), wide(update), gate)
        out = F.layer_norm(total, total.shape[-1:], wide(scale[0, 0]), wide(shift[0, 0]), eps)
    else:
        total, out = reference.add_modulate(wide(x), wide(update), gate, wide(scale), wide(shift), eps, offset)
    return total.to(x.dtype), out.to(x.dtype)


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
