"""Add an update, gated by frame, to the residual stream, and hand its modulated norm to what reads it next.

    total = x + update * gate[f]                                               a gate of 1 where there is none
    y = (total - mean) * rsqrt(var + eps) * (offset + scale[f]) + shift[f]     mean and variance over its C channels

Bytes: two reads and two writes of [B, F, S, C], 4 * B * F * S * C * itemsize, where ``gate_residual`` and then
``modulate`` move five; gate, scale and shift stay in cache.
Numerics: float32; the norm is of the sum before it is rounded; the variance from centred values, in registers; one
rounding at each store.
Oracle: ``reference.add_modulate``. Source: Wan 2.1 block: every residual is followed by a norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast, require_contiguous, require_contiguous_channels, row_tile
from ..prepared import Prepared, keep
from .tokens import load_row, modulated_norm, token_tile


@triton.jit
def _add_modulate(
    x_ptr, update_ptr, gate_ptr, scale_ptr, shift_ptr, total_ptr, out_ptr,
    stride_gb, stride_gf, stride_cb, stride_cf, stride_hb, stride_hf,
    frames, tokens, eps, offset,
    HAS_GATE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_S tokens of one frame, which stay in registers between their loads and their stores
    batch, frame, offs_c, mask_c, offs, mask = token_tile(frames, tokens, CHANNELS, BLOCK_S, BLOCK_C)

    total = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        update *= load_row(gate_ptr, batch, frame, stride_gb, stride_gf, offs_c, mask_c)[None, :]
    total += update
    tl.store(total_ptr + offs, cast(total, total_ptr.dtype.element_ty), mask=mask)
    scale = load_row(scale_ptr, batch, frame, stride_cb, stride_cf, offs_c, mask_c)
    shift = load_row(shift_ptr, batch, frame, stride_hb, stride_hf, offs_c, mask_c)
    y = modulated_norm(total, offset + scale, shift, mask_c, eps, CHANNELS)
    tl.store(out_ptr + offs, cast(y, out_ptr.dtype.element_ty), mask=mask)


def add_modulate(
    x: Tensor, update: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6,
    offset: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add an update, then normalise every token of the sum, scale and shift. Enqueues; nothing waits for the GPU.

    Args:
        x, update: [B, F, S, C].
        gate: [B, F, C], a factor on the update; None for 1.
        scale, shift: [B, F, C]; as gate, they may be views strided by B and F.
        eps: added to the variance.
        offset: added to scale: 1 for a modulation, 0 for the weight of a layer norm.

    Returns:
        x + update * gate, and LayerNorm of it * (offset + scale) + shift, both [B, F, S, C] in x's dtype.

    Raises:
        ValueError: if x or update, or the channels of gate, scale or shift, are not contiguous.
    """
    require_contiguous(x=x, update=update)
    require_contiguous_channels(**({} if gate is None else {"gate": gate}), scale=scale, shift=shift)
    total, out = torch.empty_like(x), torch.empty_like(x)
    prepared = prepare(
        x.shape, None if gate is None else gate.stride(), scale.stride(), shift.stride(), eps, offset,
        None if gate is None else gate.dtype, x.dtype, update.dtype, scale.dtype, shift.dtype,
    )  # fmt: skip
    prepared(x, update, scale if gate is None else gate, scale, shift, total, out)
    return total, out


@keep
def prepare(
    shape: torch.Size, gate_strides: tuple[int, ...] | None, scale_strides: tuple[int, ...],
    shift_strides: tuple[int, ...], eps: float, offset: float, *dtypes: torch.dtype | None,
) -> Prepared:  # fmt: skip
    """The launch for x [B, F, S, C], gate, scale and shift of these strides, of these dtypes."""
    batch, frames, tokens, channels = shape
    block_s, block_c, num_warps = row_tile(channels)
    strides = (*(gate_strides or (0, 0))[:2], *scale_strides[:2], *shift_strides[:2])
    return Prepared(
        _add_modulate, (triton.cdiv(tokens, block_s), frames, batch),
        (*strides, frames, tokens, float(eps), float(offset)),
        {"HAS_GATE": gate_strides is not None, "CHANNELS": channels, "BLOCK_S": block_s, "BLOCK_C": block_c},
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
