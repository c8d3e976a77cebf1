"""Colours as bytes: what the last convolution of the VAE's decoder makes, as a file or a screen takes it.

    out = round((clamp(x, -1, 1) + 1) * 127.5)        to even where it lies in the middle

Bytes: read x, write a byte each: 3 (itemsize + 1) for a pixel.
Numerics: float32. Not a number becomes 0: whether all are finite is looked at before.
Oracle: ``reference.to_bytes``. Source: the range of the VAE's pictures, Wan 2.1 wan/utils/utils.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import require_contiguous
from ..prepared import Prepared, keep

BLOCK = 2048
WHOLE = tl.constexpr(8388608.0)  # 2^23: float32 above it are whole numbers, so that adding it rounds to even


@triton.jit
def _to_bytes(x_ptr, out_ptr, count, stride_xb, stride_ob, BLOCK: tl.constexpr):
    # one program per BLOCK neighbouring colours of one video
    batch = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    x = tl.load(x_ptr + batch * stride_xb + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    rounded = ((x + 1.0) * 127.5 + WHOLE) - WHOLE
    tl.store(out_ptr + batch * stride_ob + offs, rounded.to(tl.uint8), mask=mask)


def to_bytes(x: Tensor, out: Tensor) -> None:
    """Write colours as bytes. Enqueues the kernel; nothing waits for the GPU.

    Args:
        x: [B, T, H, W, 3] in -1..1 and beyond.
        out: uint8, of the same shape.

    Raises:
        ValueError: The shapes differ, or a tensor is not contiguous, apart from its first dimension.
    """
    if x.shape != out.shape or out.dtype != torch.uint8:
        raise ValueError(f"out must be uint8 {list(x.shape)}, got {out.dtype} {list(out.shape)}")
    require_contiguous(x=x[0], out=out[0])
    prepare(x.shape[0], x[0].numel(), x.stride(0), out.stride(0), x.dtype)(x, out)


@keep
def prepare(batch: int, count: int, stride_xb: int, stride_ob: int, dtype: torch.dtype) -> Prepared:
    """The launch for ``count`` colours of each video, of that dtype."""
    return Prepared(
        _to_bytes, (triton.cdiv(count, BLOCK), batch), (count, stride_xb, stride_ob), {"BLOCK": BLOCK},
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
