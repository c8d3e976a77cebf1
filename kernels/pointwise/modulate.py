"""Layer norm without parameters, then scale and shift by frame.

    y = (x - mean) * rsqrt(var + eps) * (1 + scale[f]) + shift[f]      mean and variance over the C channels of a token

Bytes: one read and one write of x, 2 * B * F * S * C * itemsize; scale and shift stay in cache.
Numerics: float32; the variance from centred values, in registers; one rounding at the store.
Oracle: ``reference.modulate``. Source: Wan 2.1 block, adaptive layer norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast, require_contiguous, require_contiguous_channels, row_tile
from ..prepared import Prepared, keep


@triton.jit
def _modulate(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    stride_cb, stride_cf, stride_hb, stride_hf,
    frames, tokens, eps,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_S tokens of one frame, which stay in registers between their one load and their one store
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_s < tokens)[:, None] & mask_c[None, :]
    offs = ((batch * frames + frame) * tokens + offs_s)[:, None] * CHANNELS + offs_c[None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + batch * stride_cb + frame * stride_cf + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * stride_hb + frame * stride_hf + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    # padding must not count as deviation from the mean
    x = tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
    y = x * inverse[:, None] * (1.0 + scale)[None, :] + shift[None, :]
    tl.store(out_ptr + offs, cast(y, out_ptr.dtype.element_ty), mask=mask)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every token, then scale and shift by frame. Enqueues the kernel; nothing waits for the GPU.

    Args:
        x: [B, F, S, C].
        scale, shift: [B, F, C]; may be views strided by B and F.
        eps: added to the variance.

    Returns:
        LayerNorm(x) * (1 + scale) + shift, [B, F, S, C] in x's dtype.

    Raises:
        ValueError: if x, or the channels of scale or shift, are not contiguous.
    """
    require_contiguous(x=x)
    require_contiguous_channels(scale=scale, shift=shift)
    out = torch.empty_like(x)
    prepared = prepare(x.shape, scale.stride(), shift.stride(), eps, x.dtype, scale.dtype, shift.dtype)
    prepared(x, scale, shift, out)
    return out


@keep
def prepare(
    shape: torch.Size, scale_strides: tuple[int, ...], shift_strides: tuple[int, ...], eps: float, *dtypes: torch.dtype
) -> Prepared:
    """The launch for x [B, F, S, C], scale and shift of these strides, of these dtypes."""
    batch, frames, tokens, channels = shape
    block_s, block_c, num_warps = row_tile(channels)
    return Prepared(
        _modulate, (triton.cdiv(tokens, block_s), frames, batch),
        (*scale_strides[:2], *shift_strides[:2], frames, tokens, float(eps)),
        {"CHANNELS": channels, "BLOCK_S": block_s, "BLOCK_C": block_c},
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
