"""The package xformers: pages are gathered and turned, then attended in one call per modulation.

float32, float16 and bfloat16; a bias is expanded to one value per score.
"""

from importlib.metadata import version

import torch
from torch import Tensor
from xformers.ops import memory_efficient_attention

from flexkern.backends.gathered import attend_gathered, mask_of, without_unseeing
from flexkern.backends.reference import add_modulate, modulate, norm_rope_write, rms_norm
from flexkern.plan import ChunkPlan

__all__ = ["add_modulate", "describe", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]


def describe() -> str:
    """Which xformers runs."""
    return f"xformers {version('xformers')}"


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``.

    Raises NotImplementedError for other dtypes than float32, float16 and bfloat16, and head dims xformers cannot take.
    """
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend 'xformers' takes float32, float16 or bfloat16, got {query.dtype}")
    if (dim := query.shape[-1]) % 8:
        raise NotImplementedError(f"backend 'xformers' takes head dims that are multiples of 8, got {dim}")
    return attend_gathered(query, key_pages, value_pages, plan, attend)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """query [B, F, S, H, D], key and value [B, R, S, H, D], bias [F, R] or None -> [B, F, S, H, D]."""
    mask = None if bias is None else aligned(mask_of(bias, query.shape[2], query.dtype))
    heads_second = [x.flatten(1, 2) for x in (query, key, value)]
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[3], *mask.shape)
    out = memory_efficient_attention(*heads_second, attn_bias=mask, p=0.0, scale=query.shape[-1] ** -0.5)
    out = out.view_as(query)
    return out if bias is None else without_unseeing(out, bias)


def aligned(mask: Tensor) -> Tensor:
    """The mask, in memory whose rows begin at multiples of 8 values, as xformers demands."""
    rows, columns = mask.shape
    wide = mask.new_empty(rows, -(-columns // 8) * 8)
    wide[:, :columns] = mask
    return wide[:, :columns]
