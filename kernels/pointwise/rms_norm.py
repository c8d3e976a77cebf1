"""Root-mean-square norm of every row: the query and key norms of cross-attention.

    y = x * rsqrt(mean(x^2) + eps) * weight

Bytes: one read and one write of x, 2 * rows * C * itemsize; the weight stays in cache.
Numerics: float32, one rounding at the store.
Oracle: ``reference.rms_norm``. Source: Wan 2.1 (the norm runs over all heads of a token).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr,
    rows, eps,
    CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_R rows, which stay in registers between their one load and their one store
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_r < rows)[:, None] & mask_c[None, :]
    offs = offs_r[:, None] * CHANNELS + offs_c[None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
    y = x * inverse[:, None] * weight[None, :]
    tl.store(out_ptr + offs, cast(y, out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Launch the kernel. Arguments as in ``reference.rms_norm``."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    assert x.is_contiguous() and weight.is_contiguous(), "the channels of a token must be contiguous"
    out = torch.empty_like(x)
    block_c = triton.next_power_of_2(channels)
    # 64 channels a thread, padding included (which costs nothing): C = 1536, 3072 and 5120 fill their warps exactly.
    # By its registers an SM holds at least 50 KB of rows; 1 us at 4.8 TB/s is 36 KB an SM
    block_r = max(2048 // block_c, 2 if block_c <= 4096 else 1)
    num_warps = min(max(block_r * block_c // 2048, 1), 16)
    _rms_norm[(triton.cdiv(rows, block_r),)](
        x, weight, out,
        rows, eps,
        CHANNELS=channels, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
