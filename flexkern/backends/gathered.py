"""Attention by a library that knows neither pages nor turns: gather, turn, then call it once per modulation.

Shared by the backends ``sdpa``, ``flash-attn`` and ``xformers``, each of which supplies its ``attend``. The price over
``triton`` is a copy of every key and value that is read, and a second rounding of the keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flexkern.plan import ChunkPlan

# query [B, F, S, H, D], key and value [B, R, S, H, D], bias [F, R] or None -> [B, F, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def turn_time(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the temporal pairs of x [B, N, S, H, D] by turn [N, G, T, 2], in float32, rounded once."""
    cos, sin = turn[:, None].unbind(-1)
    time, half = turn.shape[-2], x.shape[-1] // 2
    out = x.clone()
    real, imag = x[..., :time].to(cos.dtype), x[..., half : half + time].to(cos.dtype)
    out[..., :time] = (real * cos - imag * sin).to(x.dtype)
    out[..., half : half + time] = (real * sin + imag * cos).to(x.dtype)
    return out


def attend_gathered(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan, attend: Attend) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages through ``attend``; as ``reference``'s."""
    query = turn_time(query, plan.query_turn)
    query = query * plan.logit_scale.to(query.dtype)[:, None, None, None]
    return attend_turned(query, key_pages, value_pages, plan.read_slots, plan.key_turn, plan.bias, attend)


def attend_turned(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, key_turn: Tensor, bias: Tensor | None,
    attend: Attend,
) -> Tensor:  # fmt: skip
    """A turned and scaled query over the listed pages, keys turned by key_turn [K, R, G, T, 2]; K = F, or 1 for all."""
    keys, values = (pages.index_select(1, slots.long()) for pages in (key_pages, value_pages))
    if len(key_turn) == 1:
        return attend(query, turn_time(keys, key_turn[0]), values, bias)
    outputs = [
        attend(query[:, f, None], turn_time(keys, key_turn[f]), values, None if bias is None else bias[f, None])
        for f in range(query.shape[1])
    ]
    return torch.cat(outputs, dim=1)


def mask_of(bias: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The bias of frames [F, R] as one of tokens [F * S, R * S]."""
    return bias.to(dtype).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def without_unseeing(out: Tensor, bias: Tensor) -> Tensor:
    """Zeros for the query frames of out [B, F, S, H, D] that see no frame: a library leaves NaN there."""
    return out.masked_fill(bias.isneginf().all(dim=1)[:, None, None, None], 0)
