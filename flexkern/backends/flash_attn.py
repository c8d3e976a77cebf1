"""FlashAttention 4, 3 or 2: pages are gathered and turned, then attended in one call per modulation.

``generations`` takes the best that is installed and that the GPU runs. float16 and bfloat16, no bias.
"""

import torch
from torch import Tensor

from flexkern.backends.gathered import attend_gathered
from flexkern.backends.generations import choose_for
from flexkern.backends.reference import add_modulate, modulate, norm_rope_write, rms_norm
from flexkern.plan import ChunkPlan

__all__ = ["add_modulate", "describe", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]


def describe() -> str:
    """Which FlashAttention runs on the current GPU, and what of it is broken. Raises ImportError where none does."""
    return str(choose_for())


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``.

    Raises NotImplementedError for what the installed FlashAttention cannot do: a bias, float32, other head dims.
    """
    if plan.bias is not None:
        raise NotImplementedError("backend 'flash-attn' takes no bias: use backend 'triton', 'sdpa' or 'xformers'")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend 'flash-attn' takes float16 or bfloat16, got {query.dtype}")
    dim, capability = query.shape[-1], torch.cuda.get_device_capability(query.device)
    chosen = choose_for(query.device)
    most = chosen.generation.most(capability)
    if dim % 8 or dim > most:
        raise NotImplementedError(
            f"backend 'flash-attn' takes head dims to {most} that are multiples of 8, got {dim}: it runs {chosen}"
        )
    return attend_gathered(query, key_pages, value_pages, plan, attend)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """query [B, F, S, H, D], key and value [B, R, S, H, D] -> [B, F, S, H, D]; there is no bias."""
    flat = [x.flatten(1, 2) for x in (query, key, value)]
    # by name: the fourth argument is a second query in 4, the scale in 3, the dropout in 2
    out = choose_for(query.device).attend(*flat, softmax_scale=query.shape[-1] ** -0.5, causal=False)
    return (out[0] if isinstance(out, tuple) else out).view_as(query)  # 4 returns the log-sum-exp too
