"""Normalise queries and keys, turn them by place, split their pairs and write keys and values to pages, in one pass.

    y = x * rsqrt(mean(x^2) + eps) * weight                     over all C channels of a token, for query and key
    (re, im) = (y[2i], y[2i + 1])                               interleaved pairs of a head
    (z[i], z[i + D / 2]) = R(place_turn[s, i - T]) (re, im)     R = 1 for the T temporal pairs i < T
    key_pages[slots[f], s] = z,  value_pages[slots[f], s] = v   where slots[f] >= 0;  the query's z is returned

Bytes: one read and one write of q, k and v, 6 * B * F * S * C * itemsize; weights and table stay in cache.
Numerics: float32, one rounding at the store; values are copied.
Oracle: ``reference.norm_rope_write``. Source: Wan 2.1 self-attention; the temporal turn is left to ``frame_attention``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast, count_warps, is_dense, require_contiguous
from ..prepared import Prepared, keep


@triton.jit
def load_pairs(ptr, offs, mask):
    """The pairs at ``offs``, each as one integer, for ``split_pairs`` to take apart.

    So loads and stores are 16 bytes wide and no channel changes its thread; even and odd channels as two strided loads
    are 2 bytes wide, and tl.split of one tile is compiled to shuffles or a trip through shared memory.
    """
    pair_type: tl.constexpr = tl.uint64 if ptr.dtype.element_ty.primitive_bitwidth == 32 else tl.uint32
    return tl.load(ptr.to(tl.pointer_type(pair_type)) + offs, mask=mask, other=0)


@triton.jit
def split_pairs(pairs, dtype: tl.constexpr):
    """Both channels of pairs of that dtype, in float32."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half_type: tl.constexpr = tl.uint32 if bits == 32 else tl.uint16
    real = pairs.to(half_type).to(dtype, bitcast=True)
    imag = (pairs >> bits).to(half_type).to(dtype, bitcast=True)
    return real.to(tl.float32), imag.to(tl.float32)


@triton.jit
def load_place_turn(turn_ptr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """(cos, sin) [1, BLOCK_P] of one place; temporal pairs come first and are not turned here."""
    offs_p = tl.arange(0, BLOCK_P)
    turned = (offs_p >= PAIRS - PLACE_PAIRS) & (offs_p < PAIRS)
    turns = load_pairs(turn_ptr, offs_p - (PAIRS - PLACE_PAIRS), turned)
    cos, sin = split_pairs(turns, turn_ptr.dtype.element_ty)
    return tl.where(turned, cos, 1.0)[None, :], sin[None, :]


@triton.jit
def norm_rope(
    pairs, dtype: tl.constexpr, weight_ptr, cos, sin, out_ptr, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Normalise and turn one token's channels, loaded as pairs of that dtype, and store them at its row."""
    offs_h, offs_p = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_P)[None, :]
    mask = (offs_h < HEADS) & (offs_p < PAIRS)
    real, imag = split_pairs(pairs, dtype)
    inverse = tl.rsqrt(tl.sum(real * real + imag * imag) / (2 * HEADS * PAIRS) + eps)
    # only now: loaded before the sum, the weights would take registers from rows on their way
    weights = load_pairs(weight_ptr, offs_h * PAIRS + offs_p, mask)
    real_weight, imag_weight = split_pairs(weights, weight_ptr.dtype.element_ty)
    real, imag = real * inverse * real_weight, imag * inverse * imag_weight
    out_ptr += offs_h * (2 * PAIRS) + offs_p
    tl.store(out_ptr, cast(real * cos - imag * sin, out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + PAIRS, cast(real * sin + imag * cos, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rope_write(
    query_ptr, key_ptr, value_ptr, query_weight_ptr, key_weight_ptr, turn_ptr,
    key_page_ptr, value_page_ptr, slot_ptr, out_ptr,
    stride_pb, stride_pp, eps,
    HAS_QUERY: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PLACE_PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program per token: its query, key and value, its turn and its slot are all on their way before one is used.
    # The value is stored first, which frees its registers for the norms
    CHANNELS: tl.constexpr = 2 * HEADS * PAIRS
    query_dtype: tl.constexpr = query_ptr.dtype.element_ty
    key_dtype: tl.constexpr = key_ptr.dtype.element_ty
    place, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = (batch * tl.num_programs(1) + frame) * tl.num_programs(0) + place
    row = token * ROW
    slot = tl.load(slot_ptr + frame).to(tl.int64)
    offs_h, offs_p = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_P)[None, :]
    offs, mask = offs_h * PAIRS + offs_p, (offs_h < HEADS) & (offs_p < PAIRS)
    if HAS_QUERY:
        query = load_pairs(query_ptr + row, offs, mask)
    key = load_pairs(key_ptr + row, offs, mask)
    offs_c = tl.arange(0, BLOCK_C)
    value = tl.load(value_ptr + row + offs_c, mask=offs_c < CHANNELS, other=0.0)
    turn_ptr += place.to(tl.int64) * (2 * PLACE_PAIRS)
    cos, sin = load_place_turn(turn_ptr, PAIRS, PLACE_PAIRS, BLOCK_P)

    page = batch * stride_pb + slot * stride_pp + place.to(tl.int64) * CHANNELS
    value = cast(value, value_page_ptr.dtype.element_ty)
    # the slot is widened, then compared: a bool of one number, widened, is no mask in the interpreter of Triton 3.9
    written = (offs_c < CHANNELS) & (tl.broadcast_to(slot, BLOCK_C) >= 0)
    tl.store(value_page_ptr + page + offs_c, value, mask=written)
    if HAS_QUERY:
        norm_rope(query, query_dtype, query_weight_ptr, cos, sin, out_ptr + token * CHANNELS, eps,
                  HEADS, PAIRS, BLOCK_H, BLOCK_P)  # fmt: skip
    if slot >= 0:
        norm_rope(key, key_dtype, key_weight_ptr, cos, sin, key_page_ptr + page, eps,
                  HEADS, PAIRS, BLOCK_H, BLOCK_P)  # fmt: skip


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
    """Write a chunk's keys and values to their pages. Enqueues the kernel; nothing waits for the GPU.

    Args:
        query: [B, F, S, H, D], interleaved pairs; None writes the pages only.
        key, value: [B, F, S, H, D], interleaved pairs. All three may be views out of one product, [B, F, S, 3 C]:
            tokens at equal distances, of whole pairs.
        query_weight, key_weight: [C], weights of the norms.
        place_turn: [S, D / 2 - T, 2] float32, cosine and sine for each place.
        key_pages, value_pages: [B, P, S, H, D], written in place; may be strided by B and P.
        slots: [F] int32, the page of each frame; a negative slot is not written.
        eps: added to the mean square.

    Returns:
        The query [B, F, S, H, D], normalised, turned and in split layout; None without a query.

    Raises:
        ValueError: if the tokens of query, key and value are not contiguous or not at one distance, a page or another
            tensor is not contiguous, or key and value pages differ in strides.
    """
    require_contiguous(query_weight=query_weight, key_weight=key_weight, place_turn=place_turn, slots=slots)
    out = None if query is None else torch.empty(query.shape, dtype=query.dtype, device=query.device)
    prepared = prepare(
        key.shape, key.stride(), value.stride(), None if query is None else query.stride(),
        place_turn.shape[1], key_pages.shape, key_pages.stride(), value_pages.stride(), eps,
        None if query is None else query.dtype, key.dtype, value.dtype, query_weight.dtype, key_weight.dtype,
        place_turn.dtype, key_pages.dtype, value_pages.dtype, slots.dtype,
    )  # fmt: skip
    prepared(
        key if query is None else query, key, value, query_weight, key_weight, place_turn,
        key_pages, value_pages, slots, key if out is None else out,
    )  # fmt: skip
    return out


def require_rows(shape: torch.Size, **strides: tuple[int, ...] | None) -> int:
    """How far the tokens of tensors [B, F, S, H, D] of these strides lie apart, in channels; None is skipped.

    Raises ValueError unless all have contiguous tokens at one distance, even, so that pairs can be loaded whole.
    """
    *counts, heads, dim = shape
    rows = {}
    for name, one in strides.items():
        if one is None:
            continue
        row = token_row(counts, one)
        if row is None or not is_dense((heads, dim), one[3:]):
            of = f"shape {list(shape)}, strides {one}"
            raise ValueError(f"tokens of {name} must be contiguous and at one distance, got {of}")
        rows[name] = row
    found = {row for row in rows.values() if row}  # 0: of a single token
    if len(found) > 1 or any(row % 2 for row in found):
        raise ValueError(f"query, key and value must have their tokens at one even distance, got {rows}")
    return max(found, default=heads * dim)


def token_row(counts: Sequence[int], strides: Sequence[int]) -> int | None:
    """How far the tokens of a tensor [B, F, S, ...] lie apart; 0 for a single one, None where distances differ."""
    row, within = 0, 1
    for count, stride in zip(reversed(counts), reversed(strides[: len(counts)]), strict=True):
        if count > 1:
            if stride <= 0 or stride % within or (row and stride != row * within):
                return None
            row = row or stride // within
        within *= count
    return row


@keep
def prepare(
    shape: torch.Size, key_row: tuple[int, ...], value_row: tuple[int, ...], query_row: tuple[int, ...] | None,
    place_pairs: int, pages: torch.Size, key_strides: tuple[int, ...], value_strides: tuple[int, ...], eps: float,
    query_dtype: torch.dtype | None, *dtypes: torch.dtype,
) -> Prepared:  # fmt: skip
    """The launch for keys [B, F, S, H, D] and pages of these shapes and strides, of these dtypes."""
    batch, frames, tokens, heads, dim = shape
    row = require_rows(shape, query=query_row, key=key_row, value=value_row)
    for name, strides in (("key_pages", key_strides), ("value_pages", value_strides)):
        if not is_dense(pages[2:], strides[2:]):
            found = f"shape {list(pages[2:])}, strides {strides[2:]}"
            raise ValueError(f"a page of {name} must be contiguous, got {found}")
    if key_strides != value_strides:
        raise ValueError(f"key_pages and value_pages must have the same strides, got {key_strides} and {value_strides}")
    block_h, block_p = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
    constants = {
        "HAS_QUERY": query_dtype is not None, "ROW": row, "HEADS": heads, "PAIRS": dim // 2,
        "PLACE_PAIRS": place_pairs,
        "BLOCK_H": block_h, "BLOCK_P": block_p, "BLOCK_C": triton.next_power_of_2(heads * dim),
    }  # fmt: skip
    return Prepared(
        _norm_rope_write, (tokens, frames, batch), (*key_strides[:2], float(eps)), constants,
        num_warps=count_warps(2 * block_h * block_p), enable_fp_fusion=True,
    )  # fmt: skip
