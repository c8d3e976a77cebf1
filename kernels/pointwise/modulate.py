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
from .tokens import load_row, modulated_norm, token_tile


@triton.jit
def _modulate(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    stride_cb, stride_cf, stride_hb, stride_hf,
    frames, tokens, eps,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_S tokens of one frame, which stay in registers between their one load and their one store
    batch, frame, offs_c, mask_c, offs, mask = token_tile(frames, tokens, CHANNELS, BLOCK_S, BLOCK_C)

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = load_row(scale_ptr, batch, frame, stride_cb, stride_cf, offs_c, mask_c)
    shift = load_row(shift_ptr, batch, frame, stride_hb, stride_hf, offs_c, mask_c)
    y = modulated_norm(x, 1.0 + scale, shift, mask_c, eps, CHANNELS)
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
