"""The package flash-attn (FlashAttention-2): pages are gathered and turned, then attended in one call per modulation.

For machines with a CUDA GPU but no Triton. float16 and bfloat16, head dims to 256, no bias.
"""

import torch
from flash_attn import flash_attn_func
from torch import Tensor

from flexkern.backends.gathered import attend_gathered
from flexkern.backends.reference import gate_residual, modulate, norm_rope_write, rms_norm
from flexkern.plan import ChunkPlan

__all__ = ["frame_attention", "gate_residual", "modulate", "norm_rope_write", "rms_norm"]


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``.

    Raises NotImplementedError for what flash-attn cannot do: a bias, float32, other head dims.
    """
    if plan.bias is not None:
        raise NotImplementedError("backend 'flash-attn' takes no bias: use backend 'triton', 'sdpa' or 'xformers'")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend 'flash-attn' takes float16 or bfloat16, got {query.dtype}")
    if query.shape[-1] > 256:
        raise NotImplementedError(f"backend 'flash-attn' takes head dims to 256, got {query.shape[-1]}")
    return attend_gathered(query, key_pages, value_pages, plan, attend)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """query [B, F, S, H, D], key and value [B, R, S, H, D] -> [B, F, S, H, D]; there is no bias."""
    return flash_attn_func(*(x.flatten(1, 2) for x in (query, key, value))).view_as(query)
