"""torch's scaled_dot_product_attention: pages are gathered and turned, then attended in one call per modulation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexkern.backends.reference import gate_residual, modulate, norm_rope_write, rms_norm  # noqa: F401
from flexkern.plan import ChunkPlan


def turn_time(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the temporal pairs of x [B, N, S, H, D] by turn [N, G, T, 2], in float32, rounded once."""
    cos, sin = turn[:, None].unbind(-1)
    time, half = turn.shape[-2], x.shape[-1] // 2
    out = x.clone()
    real, imag = x[..., :time].to(cos.dtype), x[..., half : half + time].to(cos.dtype)
    out[..., :time] = (real * cos - imag * sin).to(x.dtype)
    out[..., half : half + time] = (real * sin + imag * cos).to(x.dtype)
    return out


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``."""
    slots = plan.read_slots.long()
    keys, values = key_pages[:, slots], value_pages[:, slots]
    query = turn_time(query, plan.query_turn)
    query = query * plan.logit_scale.to(query.dtype)[:, None, None, None]
    if len(plan.key_turn) == 1:
        return attend(query, turn_time(keys, plan.key_turn[0]), values, plan.bias)
    frames = range(query.shape[1])
    bias = [None if plan.bias is None else plan.bias[f, None] for f in frames]
    outputs = [attend(query[:, f, None], turn_time(keys, plan.key_turn[f]), values, bias[f]) for f in frames]
    return torch.cat(outputs, dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """query [B, F, S, H, D], key and value [B, R, S, H, D], bias [F, R] or None -> [B, F, S, H, D]."""
    tokens = query.shape[2]
    mask = None
    if bias is not None:
        mask = bias.to(query.dtype).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    heads_first = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).view_as(query)
    if bias is None:
        return out
    unseen = bias.isneginf().all(dim=1)[:, None, None, None]
    return out.masked_fill(unseen, 0)
