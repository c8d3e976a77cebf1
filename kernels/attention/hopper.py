"""``frame_attention`` for sm_90 with specialised warps: compiled, never run. Not yet measured, and nothing selects it.

One warp fetches keys and values by TMA; two warpgroups of 64 query rows each multiply. Against the portable kernel:

- The fetching warp runs ahead across the edges of frames and of items, so that none of them waits for memory.
- A warpgroup runs the product p @ v of a tile under the scores and softmax of the next, FlashAttention-3's order.
  This goes on across the edges of frames: only the end of an item drains.
- The query for the next key frame is loaded under the frame's last tile, and turned when that tile's scores are done.

All three roles walk through the same items, skip the same hidden frames and so count the same tiles n = 0, 1, 2, ...;
hopper.py says how a tile passes from one to the other, and tests/kernels/test_frame_attention_hopper.py plays it out.

Bytes, flops, numerics, schedule and parts of cut tiles: as in frame_attention.py; merge.py adds the parts.
Oracle: ``reference.frame_attention``. Source: FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2.
"""

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_device import (
    ROWS,
    QueryTile,
    Ring,
    fetch,
    first_tile,
    last_product,
    load_query,
    operand_layout,
    product_layout,
    step,
    store_query,
)
from .launch import prepare_launch
from .work import count_items, find_item, find_rows

BLOCK_M = gl.constexpr(2 * ROWS.value)


@gluon.jit
def load_bias(bias_ptr, frame, read, key_frame, HAS_BIAS: gl.constexpr):
    """A frame's bias, for exponents of 2."""
    if HAS_BIAS:
        return gl.load(bias_ptr + frame * read + key_frame) * 1.4426950408889634
    else:
        return 0.0


@gluon.jit
def next_visible(bias_ptr, frame, read, key_frame, end, HAS_BIAS: gl.constexpr):
    """The first key frame from ``key_frame`` on, before ``end``, that the query frame sees; else not before ``end``."""
    if HAS_BIAS:
        bias_ptr += frame * read
        while (key_frame < end) & (gl.load(bias_ptr + gl.minimum(key_frame, end - 1)) == float("-inf")):
            key_frame += 1
    return key_frame


@gluon.jit
def produce(
    descriptors, ring, bias_ptr, slot_ptr, sizes,
    S: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, BLOCK_N: gl.constexpr, LAST_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The fetching warp: all tiles of all items of this program, the keys of tile n before the values of tile n - 1."""
    keys, values, last_keys, last_values = descriptors
    tiles, spans, frames, read, pages, heads, groups = sizes
    program, programs = gl.program_id(0), gl.num_programs(0)
    TILES: gl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    FINAL_N: gl.constexpr = LAST_N if LAST_N > 0 else BLOCK_N
    FINAL: gl.constexpr = (TILES - 1) * BLOCK_N
    n, last_page, last_column = 0, 0, 0
    for item in range(count_items(program, programs, tiles, read)):
        tile, begin, end, part = find_item(item, program, programs, tiles, read)
        batch, head, row, stop = find_rows(tile, heads, spans, SPAN, BLOCK_M)
        frame, column = row // S, head * D
        key_frame = next_visible(bias_ptr, frame, read, begin, end, HAS_BIAS)
        while key_frame < end:
            page = batch * pages + gl.load(slot_ptr + key_frame)
            for j in range(TILES):
                start, before = j * BLOCK_N, (j - 1) * BLOCK_N
                if LAST_N > 0 and j == TILES - 1:
                    fetch(last_keys, ring.k, ring.k_full, ring.k_free, n, page, start, column, STAGES, FINAL_N)
                else:
                    fetch(keys, ring.k, ring.k_full, ring.k_free, n, page, start, column, STAGES, BLOCK_N)
                if j > 0:
                    fetch(values, ring.v, ring.v_full, ring.v_free, n - 1, page, before, column, STAGES, BLOCK_N)
                elif n > 0:
                    fetch(
                        last_values, ring.v, ring.v_full, ring.v_free, n - 1, last_page, FINAL, last_column,
                        STAGES, FINAL_N,
                    )  # fmt: skip
                n += 1
            last_page, last_column = page, column
            key_frame = next_visible(bias_ptr, frame, read, key_frame + 1, end, HAS_BIAS)
    if n > 0:
        fetch(last_values, ring.v, ring.v_full, ring.v_free, n - 1, last_page, FINAL, last_column, STAGES, FINAL_N)


@gluon.jit
def attend(
    q, ring, query, bias_ptr, key_frame, end, n, log2_scale,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, CROSSES: gl.constexpr,
    BLOCK_N: gl.constexpr, LAST_N: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 rows against the visible key frames of [key_frame, end), at least one: accumulator, pivot, sum, next tile."""
    frame, read = query.frame, query.read
    TILES: gl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    FIRST_N: gl.constexpr = BLOCK_N if S >= BLOCK_N else LAST_N
    FIRST_KEYS: gl.constexpr = BLOCK_N if S >= BLOCK_N else S
    FINAL_N: gl.constexpr = LAST_N if LAST_N > 0 else BLOCK_N
    FINAL_KEYS: gl.constexpr = S - (TILES - 1) * BLOCK_N
    EARLY: gl.constexpr = FINAL_N * D < 128 * 128  # a full last tile leaves the next query no registers to wait in
    store_query(q, load_query(query, key_frame, T, D), query, key_frame, S, T, D, CROSSES)
    following = next_visible(bias_ptr, frame, read, key_frame + 1, end, HAS_BIAS)
    bias = load_bias(bias_ptr, frame, read, key_frame, HAS_BIAS)
    p, m_i, l_i = first_tile(
        q, ring, n, (following < end) | (TILES > 1), bias, log2_scale,
        FIRST_N, FIRST_KEYS, D, STAGES, HAS_BIAS,
    )  # fmt: skip
    acc = gl.zeros([ROWS, D], gl.float32, product_layout(D))
    while key_frame < end:  # p holds the first tile of the frame, whose product is still to come
        if TILES > 2:
            for _ in range(TILES - 2):
                p, acc, m_i, l_i = step(
                    q, p, acc, m_i, l_i, ring, n, True, bias, log2_scale, BLOCK_N, BLOCK_N, BLOCK_N, STAGES, HAS_BIAS
                )
                n += 1
        turned_for = gl.minimum(following, end - 1)
        if EARLY:
            loaded = load_query(query, turned_for, T, D)
        p_final = p
        if TILES > 1:
            p_final, acc, m_i, l_i = step(
                q, p, acc, m_i, l_i, ring, n, following < end, bias, log2_scale,
                BLOCK_N, FINAL_N, FINAL_KEYS, STAGES, HAS_BIAS,
            )  # fmt: skip
            n += 1
        if not EARLY:
            loaded = load_query(query, turned_for, T, D)
        # every product that reads q is over: the step before has waited for it
        store_query(q, loaded, query, turned_for, S, T, D, CROSSES)
        beyond = next_visible(bias_ptr, frame, read, following + 1, end, HAS_BIAS)
        if following < end:
            bias = load_bias(bias_ptr, frame, read, following, HAS_BIAS)
            p, acc, m_i, l_i = step(
                q, p_final, acc, m_i, l_i, ring, n, (beyond < end) | (TILES > 1), bias, log2_scale,
                FINAL_N, FIRST_N, FIRST_KEYS, STAGES, HAS_BIAS,
            )  # fmt: skip
        else:
            acc = last_product(p_final, acc, ring, n, STAGES, FINAL_N)
            p = gl.zeros([ROWS, FIRST_N], p_final.dtype, operand_layout(D))
        n += 1
        key_frame, following = following, beyond
    return acc, m_i, l_i, n


@gluon.jit
def store_rows(
    out_ptr, lse_ptr, acc, m_i, l_i, batch, head, row, stop, frames, heads,
    S: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """Divide by the sum and leave the rows in the output; rows that saw no key become 0 and -inf."""
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(D)))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, product_layout(D)))
    mask_m = offs_m < stop
    seen = gl.where(l_i > 0, l_i, 1.0)
    rows = (batch.to(gl.int64) * frames * S + offs_m) * heads + head
    out = (acc / seen[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + rows[:, None] * D + offs_d[None, :], out, mask=mask_m[:, None])
    if HAS_LSE:
        rows = ((batch.to(gl.int64) * frames + offs_m // S) * heads + head) * S + offs_m % S
        gl.store(lse_ptr + rows, (m_i + gl.log2(seen)) * 0.6931471805599453, mask=mask_m)


@gluon.jit
def store_part(acc_ptr, sums_ptr, acc, m_i, l_i, first, D: gl.constexpr):
    """Leave the rows of a cut tile's part for ``_merge``."""
    rows = first.to(gl.int64) + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(D)))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, product_layout(D)))
    gl.store(acc_ptr + rows[:, None] * D + offs_d[None, :], acc)
    gl.store(sums_ptr + 2 * rows, m_i)
    gl.store(sums_ptr + 2 * rows + 1, l_i)


@gluon.jit
def consume(
    q, ring, pointers, bias_ptr, sizes, log2_scale, half,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, CROSSES: gl.constexpr,
    BLOCK_N: gl.constexpr, LAST_N: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: the first (half 0) or last (1) 64 rows of every item of this program."""
    query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr = pointers
    tiles, spans, frames, read, pages, heads, groups = sizes
    program, programs = gl.program_id(0), gl.num_programs(0)
    n = 0
    for item in range(count_items(program, programs, tiles, read)):
        tile, begin, end, part = find_item(item, program, programs, tiles, read)
        batch, head, first, stop = find_rows(tile, heads, spans, SPAN, BLOCK_M)
        # the frame of the tile's first row, for both halves: all three roles must see the same frames
        frame, row, channels = first // S, first + half * ROWS, heads * D
        rows_ptr = query_ptr + (batch.to(gl.int64) * frames * S + row) * channels + head * D
        query = QueryTile(
            rows_ptr, turn_ptr, scale_ptr, row, stop, frame, frames, read, channels, head % groups, groups
        )
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, product_layout(D)))
        l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, product_layout(D)))
        acc = gl.zeros([ROWS, D], gl.float32, product_layout(D))
        key_frame = next_visible(bias_ptr, frame, read, begin, end, HAS_BIAS)
        if not HAS_BIAS or key_frame < end:
            acc, m_i, l_i, n = attend(
                q, ring, query, bias_ptr, key_frame, end, n, log2_scale,
                S, T, D, CROSSES, BLOCK_N, LAST_N, STAGES, HAS_BIAS,
            )  # fmt: skip
        if end - begin == read:
            store_rows(out_ptr, lse_ptr, acc, m_i, l_i, batch, head, row, stop, frames, heads, S, D, HAS_LSE)
        else:
            store_part(acc_ptr, sums_ptr, acc, m_i, l_i, part * BLOCK_M + half * ROWS, D)


@gluon.jit
def _frame_attention_hopper(
    query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr, bias_ptr, slot_ptr,
    keys, values, last_keys, last_values,
    log2_scale, tiles, spans, frames, read, pages, heads, groups,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, CROSSES: gl.constexpr,
    BLOCK_N: gl.constexpr, LAST_N: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    # one program per SM walks through its items: a tile of query rows and a range of key frames; three roles share it
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    first_q = gl.allocate_shared_memory(dtype, [ROWS, D], swizzled)
    last_q = gl.allocate_shared_memory(dtype, [ROWS, D], swizzled)
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], swizzled)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], swizzled)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(STAGES):
        mbarrier.init(k_full.index(b), count=1)
        mbarrier.init(v_full.index(b), count=1)
        mbarrier.init(k_free.index(b), count=2)
        mbarrier.init(v_free.index(b), count=2)
    fence_async_shared()  # TMA meets the barriers through the asynchronous proxy

    ring = Ring(k_buffers, v_buffers, k_full, k_free, v_full, v_free)
    sizes = tiles, spans, frames, read, pages, heads, groups
    pointers = query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr
    descriptors = keys, values, last_keys, last_values
    gl.warp_specialize(
        [
            (consume, (
                first_q, ring, pointers, bias_ptr, sizes, log2_scale, 0,
                S, T, D, SPAN, CROSSES, BLOCK_N, LAST_N, STAGES, HAS_BIAS, HAS_LSE,
            )),
            (consume, (
                last_q, ring, pointers, bias_ptr, sizes, log2_scale, 1,
                S, T, D, SPAN, CROSSES, BLOCK_N, LAST_N, STAGES, HAS_BIAS, HAS_LSE,
            )),
            (produce, (
                descriptors, ring, bias_ptr, slot_ptr, sizes, S, D, SPAN, BLOCK_N, LAST_N, STAGES, HAS_BIAS,
            )),
        ],
        [4, 1],
        [232, 40],  # registers of a thread: 256 threads of 232 and 128 of 40 are the 64 K of an SM
    )  # fmt: skip


def frame_attention_hopper(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    turn: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
    *,
    want_lse: bool = False,
    programs: int | None = None,
    stages: int = 2,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernels. Arguments as in ``frame_attention``, in bfloat16 or float16, head dim 64 or 128.

    stages: tiles of keys, and of values, that may wait in shared memory; three fit at 128 channels.
    """
    contiguous = query, key_pages, value_pages, slots, turn, logit_scale, *(() if bias is None else (bias,))
    assert all(x.is_contiguous() for x in contiguous), "query, pages and plan must be contiguous"
    tokens, heads, dim = query.shape[2:]
    assert query.dtype.itemsize == 2 and dim in (64, 128), "half precision and 64 or 128 channels a head"
    block_m, block_n = BLOCK_M.value, 128
    launch = prepare_launch(
        query, turn, bias, key_pages.shape[1], block_m=block_m, block_n=block_n, least_m=block_m,
        want_lse=want_lse, programs=programs,
    )  # fmt: skip

    def blocks(pages: Tensor, rows: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
        return TensorDescriptor.from_tensor(pages.view(-1, tokens, heads * dim), [1, rows, dim], layout)

    _frame_attention_hopper[(launch.programs,)](
        query, launch.out, launch.lse, launch.acc, launch.sums, turn, logit_scale, bias, slots,
        *(blocks(pages, rows) for rows in (block_n, launch.last_n or block_n) for pages in (key_pages, value_pages)),
        math.log2(math.e) / math.sqrt(dim), *launch.sizes, **launch.constants, STAGES=stages,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    launch.merge()
    return launch.out, launch.lse
