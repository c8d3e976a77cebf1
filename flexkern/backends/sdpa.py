"""torch's scaled_dot_product_attention: pages are gathered and turned, then attended in one call per modulation."""

import torch.nn.functional as F
from torch import Tensor

from flexkern.backends.gathered import attend_gathered, mask_of, without_unseeing
from flexkern.backends.reference import add_modulate, modulate, norm_rope_write, rms_norm
from flexkern.plan import ChunkPlan

__all__ = ["add_modulate", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``."""
    return attend_gathered(query, key_pages, value_pages, plan, attend)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """query [B, F, S, H, D], key and value [B, R, S, H, D], bias [F, R] or None -> [B, F, S, H, D]."""
    mask = None if bias is None else mask_of(bias, query.shape[2], query.dtype)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).view_as(query)
    return out if bias is None else without_unseeing(out, bias)
