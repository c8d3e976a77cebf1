"""Everything between two convolutions of the VAE's decoder: residual, norm, SiLU, and the frames before in front.

    sum = x + addend
    y = silu(sum / max(|sum|, 1e-12) * sqrt(C) * gamma)        |.| over the channels of a place
    buffer = past, then y;  kept = the last two frames of buffer

Bytes: read x, addend and past, write sum (in x), buffer and kept: (4 T + 6) H W C itemsize, without an addend 2 T + 6.
Numerics: the sum is rounded as it is stored, and normalised as it was rounded; else float32, one rounding at the store.
Oracle: ``reference.add_norm_silu``. Source: Wan 2.1 wan/modules/vae.py (RMS_norm, SiLU, CausalConv3d with its cache).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LOG2_E, cast, require_contiguous, row_tile
from ..prepared import Prepared, keep

BEFORE = tl.constexpr(2)  # frames that a causal convolution of three sees besides the present one


@triton.jit
def _add_norm_silu(
    x_ptr, addend_ptr, gamma_ptr, past_ptr, buffer_ptr, kept_ptr,
    places, count, stride_xb, stride_ab,
    CHANNELS: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_PAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_R places of one frame of the buffer: a frame of the past, or a new one
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_r < places)[:, None] & mask_c[None, :]
    offs = offs_r[:, None] * CHANNELS + offs_c[None, :]
    step = places.to(tl.int64) * CHANNELS

    y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if frame < BEFORE:
        if HAS_PAST:
            y = tl.load(past_ptr + (batch * BEFORE + frame) * step + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        x_ptr += batch * stride_xb + (frame - BEFORE) * step
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            addend_ptr += batch * stride_ab + (frame - BEFORE) * step
            x += tl.load(addend_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            rounded = cast(x, x_ptr.dtype.element_ty)
            tl.store(x_ptr + offs, rounded, mask=mask)
            x = rounded.to(tl.float32)
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
        y = x * (tl.sqrt(CHANNELS * 1.0) / length)[:, None] * gamma[None, :]
        y = y / (1.0 + tl.exp2(-y * LOG2_E))

    out = cast(y, buffer_ptr.dtype.element_ty)
    tl.store(buffer_ptr + (batch * (count + BEFORE) + frame) * step + offs, out, mask=mask)
    if frame >= count:
        tl.store(kept_ptr + (batch * BEFORE + frame - count) * step + offs, out, mask=mask)


def add_norm_silu(
    x: Tensor, addend: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the next causal convolution reads. Enqueues the kernel; nothing waits for the GPU.

    Args:
        x: [B, T, H, W, C]; overwritten with the sum where there is an addend.
        addend: The same shape, or None for zero.
        gamma: [C].
        past: [B, 2, H, W, C], the frames of the buffer before these; None for zeros.

    Returns:
        The sum, which is x; the buffer [B, T + 2, H, W, C]; a copy of its last two frames, for the next call.

    Raises:
        ValueError: A tensor is not contiguous, the first dimension of x and addend apart.
    """
    require_contiguous(x=x[0], addend=None if addend is None else addend[0], gamma=gamma, past=past)
    batch, count, height, width, channels = x.shape
    buffer = x.new_empty(batch, count + BEFORE.value, height, width, channels)
    kept = x.new_empty(batch, BEFORE.value, height, width, channels)
    added, before = (x if each is None else each for each in (addend, past))  # never read where there is none
    strides = x.stride(0), added.stride(0)
    which = addend is not None, past is not None
    launch = prepare(*x.shape, *strides, *which, x.dtype, added.dtype, gamma.dtype, before.dtype)
    launch(x, added, gamma, before, buffer, kept)
    return x, buffer, kept


@keep
def prepare(
    batch: int, count: int, height: int, width: int, channels: int, stride_xb: int, stride_ab: int,
    has_addend: bool, has_past: bool, *dtypes: torch.dtype,
) -> Prepared:  # fmt: skip
    """The launch for x of that shape, of these dtypes."""
    places, (block_r, block_c, num_warps) = height * width, row_tile(channels)
    return Prepared(
        _add_norm_silu, (triton.cdiv(places, block_r), count + BEFORE.value, batch),
        (places, count, stride_xb, stride_ab),
        {"CHANNELS": channels, "HAS_ADDEND": has_addend, "HAS_PAST": has_past, "BLOCK_R": block_r, "BLOCK_C": block_c},
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
