"""``frame_attention`` over e4m3 pages, with e4m3 products. Compiled, never run on a GPU; nothing selects it.

    logit[q, k] = logit_scale[f] * <R(turn[f, r]) q, k> / sqrt(D) + bias[f, r]    k = key_scale * stored key
    out = softmax(logit) v                                                        v = value_scale * stored value

What differs from frame_attention.py, whose schedule, parts of cut tiles and ``_merge`` these are:

- The turned query is rounded to e4m3 with one scale per row for all key frames, sqrt(2) max|q| |logit_scale| / 448: no
  turn makes a channel larger. The scales of query and key join the factor on the scores, one per row and frame.
- The pivot of a row is an integer, 8 below its running maximum rounded up. So the largest weight lies in (128, 256],
  within e4m3's 448, and whatever is rescaled later is rescaled by a power of two: without a bias, a weight above 2^-13
  of the largest is rounded alike in any order of keys and any cut of the schedule.
- The value's scale is a page's: the accumulator is multiplied by old / new once per key frame.
- Values are stored by channel, in the order of quantize.py: the product P V needs no transpose and no exchange of P.
- Tensor cores of sm_89 and sm_90 keep about 14 bits of a sum of 8-bit products and cut off the rest. Each tile's P V is
  therefore summed from zero and added to a float32 accumulator, in the multiply-add that also rescales it.

Bytes: keys and values 2 * R * S * C, query and output 2 * F * S * C * itemsize; parts of cut tiles, fp32.
Flops: 4 * F * S * R * S * C, in e4m3.
Numerics: q, k, v and P rounded to e4m3, each off by up to 2^-4, 2.6 % root mean square; everything else in float32. On
normal random numbers that makes 5.5 % of the output's root mean square (bfloat16: 0.3 %): 3.9 % by q and k, 2.7 % by P,
2.7 % by v; 9 % if the logits are three times as large.
Oracle: ``reference.frame_attention`` on the pages as numbers. Source: FlashAttention-3, section 3.3; SageAttention2 for
the sums of products.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import dot
from .frame_attention import load_page, turn_of
from .merge import plan_job, store_part, store_rows
from .quantize import in_value_order, refuse_without_fp8, to_e4m3
from .schedule import count_items, find_item, find_rows
from .tuned import FP8, INTERPRETER, Config, arch_of


@triton.jit
def load_query(query_ptr, rows, channels, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Real and imaginary channels of a tile [BLOCK_M, D / 2], zeros behind its last row."""
    offs_m = tl.arange(0, BLOCK_M)
    ptr = query_ptr + offs_m[:, None] * channels + tl.arange(0, D // 2)[None, :]
    mask_m = (offs_m < rows)[:, None]
    real = tl.load(ptr, mask=mask_m, other=0.0).to(tl.float32)
    imag = tl.load(ptr + D // 2, mask=mask_m, other=0.0).to(tl.float32)
    return real, imag


@triton.jit
def scale_of_rows(
    query_ptr, scale_ptr, rows, row, frames, channels, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A scale [BLOCK_M] for each row of the tile that suits it at any turn."""
    real, imag = load_query(query_ptr, rows, channels, D, BLOCK_M)
    frame = tl.minimum((row + tl.arange(0, BLOCK_M)) // S, frames - 1)
    largest = tl.max(tl.maximum(tl.abs(real), tl.abs(imag)), 1) * tl.abs(tl.load(scale_ptr + frame))
    return tl.where(largest > 0, largest * (1.4142136 / 448), 1.0)


@triton.jit
def turned_query(
    query_ptr, turn_ptr, scale_ptr, q_scale, rows, left, frame, frames, key_frame, read, group, groups, channels,
    T: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """The tile's query [BLOCK_M, D] over its scale, turned for one key frame; ``left`` rows belong to ``frame``."""
    real, imag = load_query(query_ptr, rows, channels, D, BLOCK_M)
    cos, sin = turn_of(turn_ptr, scale_ptr, frame, key_frame, read, group, groups, T, D // 2)
    if CROSSES:  # rows behind the frame's end belong to the next one
        next_frame = tl.minimum(frame + 1, frames - 1)
        next_cos, next_sin = turn_of(turn_ptr, scale_ptr, next_frame, key_frame, read, group, groups, T, D // 2)
        is_next = (tl.arange(0, BLOCK_M) >= left)[:, None]
        cos, sin = tl.where(is_next, next_cos, cos), tl.where(is_next, next_sin, sin)
    inverse = (1.0 / q_scale)[:, None]
    real, imag = real * inverse, imag * inverse
    turned = tl.join(to_e4m3(real * cos - imag * sin), to_e4m3(real * sin + imag * cos))
    return turned.permute(0, 2, 1).reshape(BLOCK_M, D)


@triton.jit
def load_values(pages, channel, start, PADDED: tl.constexpr, D: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr):
    """N places of a page's D channels [D, N] from ``start``, zeros behind the page's end."""
    if TMA:
        return pages.load([channel, start])
    else:
        offs_n = start + tl.arange(0, N)
        rows = pages + (channel.to(tl.int64) + tl.arange(0, D))[:, None] * PADDED
        return tl.load(rows + offs_n[None, :], mask=(offs_n < PADDED)[None, :], other=0.0)


@triton.jit
def softmax_step(score, value, acc, m_i, l_i, factor):
    """One tile of keys joins the running softmax: accumulator, pivot and sum, in base 2; factor [BLOCK_M] on scores."""
    m_new = tl.maximum(m_i, tl.ceil(tl.max(score, 1) * factor) - 8)
    p = tl.math.exp2(score * factor[:, None] - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    product = dot(in_value_order(to_e4m3(p)), value.T, tl.zeros_like(acc))
    return tl.fma(acc, alpha[:, None], product), m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _frame_attention_fp8(
    query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr, bias_ptr, slot_ptr,
    keys, values, last_keys, last_values, key_scale_ptr, value_scale_ptr,
    log2_scale, tiles, spans, frames, read, pages, heads, groups,
    S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, CROSSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # one program per SM walks through its items: a tile of query rows and a range of key frames
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = heads * D
    FULL: tl.constexpr = S // BLOCK_N * BLOCK_N
    PADDED: tl.constexpr = (S + 15) // 16 * 16
    for item in range(0, count_items(program, programs, tiles, read)):
        tile, begin, end, part = find_item(item, program, programs, tiles, read)
        batch, head, row, stop = find_rows(tile, heads, spans, SPAN, BLOCK_M)
        column, group, frame = head * D, head % groups, row // S
        tile_ptr = query_ptr + (batch.to(tl.int64) * frames * S + row) * channels + column
        left = (frame + 1) * S - row

        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        v_scale = 1.0
        q_scale = scale_of_rows(tile_ptr, scale_ptr, stop - row, row, frames, channels, S, D, BLOCK_M)
        # carried through the loop over frames: only then the compiler leaves it in shared memory, where wgmma reads it
        q = turned_query(
            tile_ptr, turn_ptr, scale_ptr, q_scale, stop - row, left, frame, frames, begin, read, group, groups,
            channels, T, D, BLOCK_M, CROSSES,
        )  # fmt: skip
        for key_frame in tl.range(begin, end):
            page = batch * pages + tl.load(slot_ptr + key_frame)
            factor = q_scale * (tl.load(key_scale_ptr + page * heads + head) * log2_scale)
            page_scale = tl.load(value_scale_ptr + page * heads + head)
            tokens = S
            if HAS_BIAS:  # the same for the whole frame: the pivot moves instead of the scores
                bias = tl.load(bias_ptr + frame * read + key_frame) * 1.4426950408889634
                tokens = tl.where(bias > float("-inf"), S, 0)
                page_scale = tl.where(bias > float("-inf"), page_scale, v_scale)
                bias = tl.where(bias > float("-inf"), bias, 0.0)
                m_i -= bias
            acc *= v_scale / page_scale
            v_scale = page_scale
            channel = (page * heads + head) * D
            for start in tl.range(0, tokens // BLOCK_N * BLOCK_N, BLOCK_N, num_stages=STAGES):
                k = load_page(keys, page, start, column, channels, S, D, BLOCK_N, TMA)
                score = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                v = load_values(values, channel, start, PADDED, D, BLOCK_N, TMA)
                acc, m_i, l_i = softmax_step(score, v, acc, m_i, l_i, factor)
            if LAST_N > 0 and tokens > 0:
                k = load_page(last_keys, page, FULL, column, channels, S, D, LAST_N, TMA)
                score = dot(q, k.T, tl.zeros([BLOCK_M, LAST_N], tl.float32))
                score = tl.where((FULL + tl.arange(0, LAST_N) < S)[None, :], score, float("-inf"))
                v = load_values(last_values, channel, FULL, PADDED, D, LAST_N, TMA)
                acc, m_i, l_i = softmax_step(score, v, acc, m_i, l_i, factor)
            if HAS_BIAS:
                m_i += bias
            q = turned_query(
                tile_ptr, turn_ptr, scale_ptr, q_scale, stop - row, left, frame, frames,
                tl.minimum(key_frame + 1, read - 1), read, group, groups, channels, T, D, BLOCK_M, CROSSES,
            )  # fmt: skip

        acc *= v_scale
        if end - begin == read:
            offs_m = row + tl.arange(0, BLOCK_M)
            store_rows(
                out_ptr, lse_ptr, acc, m_i, l_i, batch, head, offs_m, offs_m < stop, frames, heads, S, D, HAS_LSE
            )
        else:
            store_part(acc_ptr, sums_ptr, acc, m_i, l_i, part, D, BLOCK_M)


def frame_attention_fp8(
    query: Tensor,  # [B, F, S, H, D], as norm_rope_write returns it
    key_pages: Tensor,  # [B, P, S, H, D] e4m3
    value_pages: Tensor,  # [B, P, H, D, S_pad] e4m3, as norm_rope_write_fp8 leaves them
    key_scale: Tensor,  # [B, P, H] float32, above 0
    value_scale: Tensor,  # [B, P, H] float32, above 0
    slots: Tensor,  # [R] int32, pages to read
    turn: Tensor,  # [F, R, G, T, 2] float32
    logit_scale: Tensor,  # [F] float32
    bias: Tensor | None = None,  # [F, R] float32; -inf hides a frame, which is then not read
    *,
    want_lse: bool = False,
    config: Config | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernels. Otherwise as ``frame_attention``: arguments, output in the query's dtype, log-sum-exp.

    Raises NotImplementedError on a GPU without 8-bit products.
    """
    tokens, heads, dim = query.shape[2:]
    padded = triton.cdiv(tokens, 16) * 16
    assert value_pages.shape == (*key_pages.shape[:2], heads, dim, padded), "value pages must be [B, P, H, D, S_pad]"
    inputs = query, key_pages, value_pages, key_scale, value_scale, slots, turn, logit_scale
    contiguous = inputs if bias is None else (*inputs, bias)
    assert all(x.is_contiguous() for x in contiguous), "query, pages, scales and plan must be contiguous"
    refuse_without_fp8(query.device)
    arch = arch_of(query.device)
    config = config or (FP8[arch] if arch else INTERPRETER)
    job = plan_job(
        query, turn, bias, key_pages.shape[1], block_m=config.block_m, block_n=config.block_n, least_n=32,
        want_lse=want_lse, programs=programs,
    )  # fmt: skip

    def blocks(keys: int) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[Tensor, Tensor]:
        if not (config.tma and keys):
            return key_pages, value_pages
        return (
            TensorDescriptor.from_tensor(key_pages.view(-1, tokens, heads * dim), [1, keys, dim]),
            TensorDescriptor.from_tensor(value_pages.view(-1, padded), [dim, keys]),
        )

    _frame_attention_fp8[(job.programs,)](
        query, job.out, job.lse, job.acc, job.sums, turn, logit_scale, bias, slots,
        *blocks(config.block_n), *blocks(job.last_n), key_scale, value_scale,
        math.log2(math.e) / math.sqrt(dim), *job.sizes, **job.constants, BLOCK_M=job.block_m,
        STAGES=config.num_stages, TMA=config.tma,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    job.merge()
    return job.out, job.lse
