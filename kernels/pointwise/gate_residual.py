"""Add an update, gated by frame, to the residual stream.

    y = x + update * gate[f]

Bytes: two reads and one write of [B, F, S, C], 3 * B * F * S * C * itemsize; the gate stays in cache.
Numerics: float32, one rounding at the store.
Oracle: ``reference.gate_residual``. Source: Wan 2.1 block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast, require_contiguous, require_contiguous_channels
from ..prepared import Prepared, keep
from .tokens import load_row


@triton.jit
def _gate_residual(
    x_ptr, update_ptr, gate_ptr, out_ptr,
    stride_gb, stride_gf,
    frames, tokens,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_S tokens of one frame and BLOCK_C of their channels
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    offs_s = tl.program_id(0) // column_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_s < tokens)[:, None] & mask_c[None, :]
    offs = ((batch * frames + frame) * tokens + offs_s)[:, None] * CHANNELS + offs_c[None, :]

    gate = load_row(gate_ptr, batch, frame, stride_gb, stride_gf, offs_c, mask_c)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x + update * gate[None, :]
    tl.store(out_ptr + offs, cast(y, out_ptr.dtype.element_ty), mask=mask)


def gate_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Add an update, gated by frame. Enqueues the kernel; nothing waits for the GPU.

    Args:
        x, update: [B, F, S, C].
        gate: [B, F, C]; may be a view strided by B and F.

    Returns:
        x + update * gate, [B, F, S, C] in x's dtype.

    Raises:
        ValueError: if x or update, or the channels of gate, are not contiguous.
    """
    require_contiguous(x=x, update=update)
    require_contiguous_channels(gate=gate)
    out = torch.empty_like(x)
    prepare(x.shape, gate.stride(), x.dtype, update.dtype, gate.dtype)(x, update, gate, out)
    return out


@keep
def prepare(shape: torch.Size, gate_strides: tuple[int, ...], *dtypes: torch.dtype) -> Prepared:
    """The launch for x [B, F, S, C] and a gate of these strides, of these dtypes."""
    batch, frames, tokens, channels = shape
    # 512 divides every C in use, and 64 threads hold it 16 bytes each, so the gate is loaded once and stays with its
    # thread; four tokens keep nine such loads of a thread in flight, 8 KB a program
    block_c = min(triton.next_power_of_2(channels), 512)
    block_s = 2048 // block_c
    return Prepared(
        _gate_residual, (triton.cdiv(tokens, block_s) * triton.cdiv(channels, block_c), frames, batch),
        (*gate_strides[:2], frames, tokens), {"CHANNELS": channels, "BLOCK_S": block_s, "BLOCK_C": block_c},
        num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
