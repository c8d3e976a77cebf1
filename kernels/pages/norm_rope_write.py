"""Normalise queries and keys, turn them by place, split their pairs and write keys and values to pages, in one pass.

    y = x * rsqrt(mean(x^2) + eps) * weight                     over all C channels of a token, for query and key
    (re, im) = (y[2i], y[2i + 1])                               interleaved pairs of a head
    (z[i], z[i + D / 2]) = R(place_turn[s, i - T]) (re, im)     R = 1 for the T temporal pairs i < T
    key_pages[slots[f], s] = z,  value_pages[slots[f], s] = v   where slots[f] >= 0;  the query's z is returned

Bytes: one read and one write of q, k and v, 6 * B * F * S * C * itemsize; weights and table stay in cache.
Numerics: float32, one rounding at the store; values are copied.
Oracle: ``reference.norm_rope_write``. Source: Wan 2.1 self-attention; the time is left to ``frame_attention``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast


@triton.jit
def _load_pairs(ptr, offs, mask):
    """Both channels of the pairs at ``offs``, in float32; a pair is loaded as one integer and taken apart in registers.

    So loads and stores are 16 bytes wide and no channel changes its thread; even and odd channels as two strided loads
    are 2 bytes wide, and tl.split of one tile is compiled to shuffles or a trip through shared memory.
    """
    dtype: tl.constexpr = ptr.dtype.element_ty
    bits: tl.constexpr = dtype.primitive_bitwidth
    pair_type: tl.constexpr = tl.uint64 if bits == 32 else tl.uint32
    half_type: tl.constexpr = tl.uint32 if bits == 32 else tl.uint16
    pair = tl.load(ptr.to(tl.pointer_type(pair_type)) + offs, mask=mask, other=0)
    real = pair.to(half_type).to(dtype, bitcast=True)
    imag = (pair >> bits).to(half_type).to(dtype, bitcast=True)
    return real.to(tl.float32), imag.to(tl.float32)


@triton.jit
def norm_turn(
    x_ptr, weight_ptr, turn_ptr, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token's channels, normalised and turned; x_ptr and turn_ptr point at its row.

    Returns real and imaginary parts [BLOCK_H, BLOCK_P] in float32, where the real ones go in a row of split layout (the
    imaginary ones PAIRS further), and which of them exist.
    """
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs_p = tl.arange(0, BLOCK_P)
    mask = (offs_h < HEADS) & (offs_p < PAIRS)[None, :]
    offs = offs_h * PAIRS + offs_p[None, :]
    real, imag = _load_pairs(x_ptr, offs, mask)
    real_weight, imag_weight = _load_pairs(weight_ptr, offs, mask)
    # temporal pairs stand in front and are not turned here
    turned = (offs_p >= PAIRS - PLACE_PAIRS) & (offs_p < PAIRS)
    cos, sin = _load_pairs(turn_ptr, offs_p - (PAIRS - PLACE_PAIRS), turned)
    cos, sin = tl.where(turned, cos, 1.0)[None, :], sin[None, :]

    inverse = tl.rsqrt(tl.sum(real * real + imag * imag) / (2 * HEADS * PAIRS) + eps)
    real, imag = real * inverse * real_weight, imag * inverse * imag_weight
    return real * cos - imag * sin, real * sin + imag * cos, offs_h * (2 * PAIRS) + offs_p[None, :], mask


@triton.jit
def _norm_rope(
    x_ptr, weight_ptr, turn_ptr, out_ptr, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Normalise and turn one token's channels; x_ptr, turn_ptr and out_ptr point at its row."""
    real, imag, offs, mask = norm_turn(x_ptr, weight_ptr, turn_ptr, eps, HEADS, PAIRS, PLACE_PAIRS, BLOCK_H, BLOCK_P)
    tl.store(out_ptr + offs, cast(real, out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offs + PAIRS, cast(imag, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rope_write(
    query_ptr, key_ptr, value_ptr, query_weight_ptr, key_weight_ptr, turn_ptr,
    key_page_ptr, value_page_ptr, slot_ptr, out_ptr,
    stride_pb, stride_pp, eps,
    PARTS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per token and part: 0 key, 1 value, 2 query. Apart, each waits for memory once, with its row in
    # registers; key and value in one program were compiled to load the value only after the key's sum
    CHANNELS: tl.constexpr = 2 * HEADS * PAIRS
    place, frame = tl.program_id(0), tl.program_id(1)
    batch, part = (tl.program_id(2) // PARTS).to(tl.int64), tl.program_id(2) % PARTS
    row = ((batch * tl.num_programs(1) + frame) * tl.num_programs(0) + place) * CHANNELS
    turn_ptr += place.to(tl.int64) * (2 * PLACE_PAIRS)
    if part == 2:
        _norm_rope(query_ptr + row, query_weight_ptr, turn_ptr, out_ptr + row, eps,
                   HEADS, PAIRS, PLACE_PAIRS, BLOCK_H, BLOCK_P)  # fmt: skip
    else:
        slot = tl.load(slot_ptr + frame).to(tl.int64)
        page = batch * stride_pb + slot * stride_pp + place.to(tl.int64) * CHANNELS
        if slot >= 0:
            if part == 0:
                _norm_rope(key_ptr + row, key_weight_ptr, turn_ptr, key_page_ptr + page, eps,
                           HEADS, PAIRS, PLACE_PAIRS, BLOCK_H, BLOCK_P)  # fmt: skip
            else:
                offs_c = tl.arange(0, BLOCK_C)
                value = tl.load(value_ptr + row + offs_c, mask=offs_c < CHANNELS, other=0.0)
                value = cast(value, value_page_ptr.dtype.element_ty)
                tl.store(value_page_ptr + page + offs_c, value, mask=offs_c < CHANNELS)


def row_tile(heads: int, dim: int) -> tuple[int, int, int]:
    """BLOCK_H, BLOCK_P and warps of a program that holds a token's row."""
    block_h, block_p = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
    # 64 channels a thread, padding included (which costs nothing): 12 heads of 128 fill one warp, which needs no
    # barrier. By its registers an SM holds 40 to 60 KB of rows at C = 1536 to 5120; 1 us at 4.8 TB/s is 36 KB an SM
    return block_h, block_p, min(max(block_h * block_p // 1024, 1), 16)


def norm_rope_write(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    place_turn: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
) -> Tensor | None:
    """Launch the kernel. Arguments as in ``reference.norm_rope_write``; place_turn in float32, slots in int32."""
    batch, frames, tokens, heads, dim = key.shape
    rows = (key, value, place_turn, key_pages[0, 0], value_pages[0, 0], *(() if query is None else (query,)))
    assert all(row.is_contiguous() for row in rows), "the channels of a token must be contiguous"
    assert key_pages.stride() == value_pages.stride(), "key and value pages must be laid out alike"
    out = None if query is None else torch.empty_like(query)
    parts = 2 if query is None else 3
    block_h, block_p, num_warps = row_tile(heads, dim)
    _norm_rope_write[(tokens, frames, batch * parts)](
        key if query is None else query, key, value, query_weight, key_weight, place_turn,
        key_pages, value_pages, slots, key if out is None else out,
        key_pages.stride(0), key_pages.stride(1), eps,
        PARTS=parts, HEADS=heads, PAIRS=dim // 2, PLACE_PAIRS=place_turn.shape[1],
        BLOCK_H=block_h, BLOCK_P=block_p, BLOCK_C=triton.next_power_of_2(heads * dim),
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
