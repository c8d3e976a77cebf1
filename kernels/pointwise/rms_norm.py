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

from ..common import cast, require_contiguous, row_tile
from ..prepared import Prepared, keep


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
    """Normalise every row. Enqueues the kernel; nothing waits for the GPU.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square.

    Returns:
        x over its root mean square, times weight, in x's shape and dtype.

    Raises:
        ValueError: if x or weight is not contiguous.
    """
    require_contiguous(x=x, weight=weight)
    out = torch.empty_like(x)
    prepare(x.numel(), x.shape[-1], eps, x.dtype, weight.dtype)(x, weight, out)
    return out


@keep
def prepare(count: int, channels: int, eps: float, *dtypes: torch.dtype) -> Prepared:
    """The launch for ``count`` numbers in rows of that many channels, of these dtypes."""
    rows, (block_r, block_c, num_warps) = count // channels, row_tile(channels)
    return Prepared(
        _rms_norm, (triton.cdiv(rows, block_r),), (rows, float(eps)),
        {"CHANNELS": channels, "BLOCK_R": block_r, "BLOCK_C": block_c},
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
