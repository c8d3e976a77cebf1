"""``norm_rope_write`` into e4m3 pages, in one pass as there. Compiled, never run on a GPU; nothing selects it.

    key_pages[slots[f], s] = e4m3(z / key_scale[slots[f]])        z as in norm_rope_write.py, where slots[f] >= 0
    value_pages[slots[f], ..., place(s)] = e4m3(v / value_scale[slots[f]])          place(s) as in quantize.py
    value_seen[slots[f]] = max(value_seen[slots[f]], max |v|)     by head; a maximum does not depend on the order

Bytes: q, k and v read once, q written once in its dtype, k and v in one byte a channel.
Numerics: float32, one rounding at the store, saturated at 448 times the scale.
Oracle: ``reference.norm_rope_write``, then rounded to e4m3. The query is what norm_rope_write.py returns, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_rope_write import _norm_rope, norm_turn, row_tile
from .quantize import refuse_without_fp8, to_e4m3, token_at


@triton.jit
def _norm_rope_write_fp8(
    query_ptr, key_ptr, query_weight_ptr, key_weight_ptr, turn_ptr, key_page_ptr, key_scale_ptr, slot_ptr, out_ptr,
    stride_pb, stride_pp, pages, eps,
    PARTS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # one program per token and part: 0 key, 1 query
    CHANNELS: tl.constexpr = 2 * HEADS * PAIRS
    place, frame = tl.program_id(0), tl.program_id(1)
    batch, part = (tl.program_id(2) // PARTS).to(tl.int64), tl.program_id(2) % PARTS
    row = ((batch * tl.num_programs(1) + frame) * tl.num_programs(0) + place) * CHANNELS
    turn_ptr += place.to(tl.int64) * (2 * PLACE_PAIRS)
    if part == 1:
        _norm_rope(query_ptr + row, query_weight_ptr, turn_ptr, out_ptr + row, eps,
                   HEADS, PAIRS, PLACE_PAIRS, BLOCK_H, BLOCK_P)  # fmt: skip
    else:
        slot = tl.load(slot_ptr + frame).to(tl.int64)
        if slot >= 0:
            real, imag, offs, mask = norm_turn(
                key_ptr + row, key_weight_ptr, turn_ptr, eps, HEADS, PAIRS, PLACE_PAIRS, BLOCK_H, BLOCK_P
            )
            offs_h = tl.arange(0, BLOCK_H)[:, None]
            scale_ptr = key_scale_ptr + (batch * pages + slot) * HEADS
            inverse = 1.0 / tl.load(scale_ptr + offs_h, mask=offs_h < HEADS, other=1.0)
            page_ptr = key_page_ptr + batch * stride_pb + slot * stride_pp + place.to(tl.int64) * CHANNELS
            tl.store(page_ptr + offs, to_e4m3(real * inverse), mask=mask)
            tl.store(page_ptr + offs + PAIRS, to_e4m3(imag * inverse), mask=mask)


@triton.jit
def _write_values_fp8(
    value_ptr, value_page_ptr, value_scale_ptr, value_seen_ptr, slot_ptr,
    stride_pb, stride_pp, frames, tokens, padded, pages,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # one program per head, block of places and frame: loads the channels of a token, stores the tokens of a channel
    head, heads = tl.program_id(0), tl.num_programs(0)
    batch, frame = (tl.program_id(2) // frames).to(tl.int64), tl.program_id(2) % frames
    slot = tl.load(slot_ptr + frame).to(tl.int64)
    if slot >= 0:
        offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
        offs_d = tl.arange(0, BLOCK_D)
        token = token_at(offs_s)
        row = (((batch * frames + frame) * tokens + token) * heads + head)[:, None] * D
        mask = (token < tokens)[:, None] & (offs_d < D)[None, :]
        value = tl.load(value_ptr + row + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)

        scale = (batch * pages + slot) * heads + head
        # magnitudes are ordered like the integers that their bits spell
        largest = tl.max(tl.max(tl.abs(value), 1), 0).to(tl.int32, bitcast=True)
        tl.atomic_max(value_seen_ptr.to(tl.pointer_type(tl.int32)) + scale, largest, sem="relaxed")
        code = to_e4m3(value * (1.0 / tl.load(value_scale_ptr + scale)))
        page = batch * stride_pb + slot * stride_pp + (head * D + offs_d)[:, None] * padded
        mask = (offs_d < D)[:, None] & (offs_s < padded)[None, :]
        tl.store(value_page_ptr + page + offs_s[None, :], code.T, mask=mask)


def norm_rope_write_fp8(
    query: Tensor | None,  # [B, F, S, H, D], interleaved pairs; None writes the pages only
    key: Tensor,  # [B, F, S, H, D], interleaved pairs
    value: Tensor,  # [B, F, S, H, D]
    query_weight: Tensor,  # [C]
    key_weight: Tensor,  # [C]
    place_turn: Tensor,  # [S, D / 2 - T, 2] float32
    key_pages: Tensor,  # [B, P, S, H, D] e4m3, written in place
    value_pages: Tensor,  # [B, P, H, D, S_pad] e4m3, written in place
    key_scale: Tensor,  # [B, P, H] float32
    value_scale: Tensor,  # [B, P, H] float32
    value_seen: Tensor,  # [B, P, H] float32, at least 0; raised in place
    slots: Tensor,  # [F] int32, page of each frame; a negative slot is not written
    eps: float = 1e-6,
) -> Tensor | None:
    """Launch the kernels. Returns the query [B, F, S, H, D] in split layout, in its own dtype."""
    batch, frames, tokens, heads, dim = key.shape
    rows = (key, value, place_turn, key_pages[0, 0], value_pages[0, 0], key_scale, value_scale, value_seen)
    assert all(row.is_contiguous() for row in rows), "inputs, pages and scales must be contiguous"
    assert query is None or query.is_contiguous(), "the query must be contiguous"
    refuse_without_fp8(key.device)
    out = None if query is None else torch.empty_like(query)
    parts = 1 if query is None else 2
    block_h, block_p, num_warps = row_tile(heads, dim)
    pages, padded = value_pages.shape[1], value_pages.shape[-1]
    _norm_rope_write_fp8[(tokens, frames, batch * parts)](
        key if query is None else query, key, query_weight, key_weight, place_turn,
        key_pages, key_scale, slots, key if out is None else out,
        key_pages.stride(0), key_pages.stride(1), pages, eps,
        PARTS=parts, HEADS=heads, PAIRS=dim // 2, PLACE_PAIRS=place_turn.shape[1], BLOCK_H=block_h, BLOCK_P=block_p,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    _write_values_fp8[(heads, triton.cdiv(padded, 64), batch * frames)](
        value, value_pages, value_scale, value_seen, slots,
        value_pages.stride(0), value_pages.stride(1), frames, tokens, padded, pages,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_S=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
