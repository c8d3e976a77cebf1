"""``frame_attention`` for sm_90 with specialised warps. select.py says where it is selected; figures are in README.md.

One warp fetches keys and values by TMA; two warpgroups of 64 query rows each multiply. Against the portable kernel:

- The fetching warp runs ahead across the edges of frames and of items, so that none of them waits for memory.
- A warpgroup runs the product p @ v of a tile under the scores and softmax of the next, FlashAttention-3's order.
  This goes on across the edges of frames: the pipeline empties only at the end of an item.
- The query for the next key frame is loaded under the frame's last tile, and turned when that tile's scores are done.

All three roles walk through the same items, skip the same hidden frames and so count the same tiles n = 0, 1, 2, ...
hopper_tiles.py cuts frames into tiles, hopper_ring.py describes how one passes from role to role, and
tests/kernels/test_frame_attention_hopper.py runs all this on a CPU, in random order. Variants of the loop that wait for
a measurement stand in hopper_variants.py, each with a prediction.

Bytes, flops, numerics: as in portable.py; work.py divides the work, and launch.py merges the fragments of cut tiles.
Oracle: ``reference.frame_attention``. Source: FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common import LN_2, LOG2_E
from ..prepared import Blocks, Prepared, keep
from ..warpgroup import product_layout
from .hopper_device import (
    ROWS,
    QueryRows,
    first_tile,
    last_product,
    load_query,
    no_operand,
    step,
    store_query,
)
from .hopper_ring import (
    BLOCK_N,
    KEYS_FREE,
    VALUES_FREE,
    Buffers,
    Ring,
    Turns,
    allocate_buffers,
    allocate_turns,
    begin_turns,
    drain,
    end_turns,
    fetch,
    wait_free,
)
from .hopper_tiles import cut_frame
from .hopper_variants import SELECTED, Variant, get_variant
from .launch import Launch, Shapes, prepare_launch, shapes_of, validate_inputs
from .work import Outputs, Sizes, Tables, count_items, take_item

BLOCK_M = gl.constexpr(2 * ROWS.value)


class Descriptors(NamedTuple):
    """TMA descriptors of the pages, for blocks of 128 tokens and of TILES.box."""

    k: object
    v: object
    box_k: object
    box_v: object


@gluon.jit
def load_bias(bias_ptr, frame, read, key_frame, HAS_BIAS: gl.constexpr):
    """A frame's bias, for exponents of 2."""
    if HAS_BIAS:
        return gl.load(bias_ptr + frame * read + key_frame) * LOG2_E
    else:
        return 0.0


@gluon.jit
def next_visible(bias_ptr, frame, read, key_frame, end, HAS_BIAS: gl.constexpr):
    """The first key frame in [key_frame, end) that the query frame sees; ``end`` or later if it sees none."""
    if HAS_BIAS:
        bias_ptr += frame * read
        while (key_frame < end) & (gl.load(bias_ptr + gl.minimum(key_frame, end - 1)) == float("-inf")):
            key_frame += 1
    return key_frame


@gluon.jit
def produce(
    descriptors, ring, tables, sizes,
    S: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, TILES: gl.constexpr, VARIANT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The fetching warp: all tiles of all items of this program, the keys of tile n before the values of tile n - 1."""
    keys, box_k, values, box_v = descriptors.k, descriptors.box_k, descriptors.v, descriptors.box_v
    WHOLE: gl.constexpr = TILES.whole
    LAST: gl.constexpr = TILES.last
    BOX: gl.constexpr = TILES.box
    STEP: gl.constexpr = WHOLE.keys
    FINAL: gl.constexpr = (TILES.count - 1) * STEP
    n, last_page, last_column = 0, 0, 0
    for index in range(count_items(gl.program_id(0), gl.num_programs(0), sizes.tiles, sizes.read)):
        item = take_item(index, sizes, S, SPAN, BLOCK_M)
        column = item.head * D
        key_frame = next_visible(tables.bias_ptr, item.frame, sizes.read, item.begin, item.end, HAS_BIAS)
        while key_frame < item.end:
            page = item.batch * sizes.pages + gl.load(tables.slot_ptr + key_frame)
            for j in range(TILES.count):
                if LAST != WHOLE and j == TILES.count - 1:
                    fetch(keys, box_k, ring.k, n, page, j * STEP, column, LAST, BOX, VARIANT)
                else:
                    fetch(keys, box_k, ring.k, n, page, j * STEP, column, WHOLE, BOX, VARIANT)
                if j > 0:
                    fetch(values, box_v, ring.v, n - 1, page, (j - 1) * STEP, column, WHOLE, BOX, VARIANT)
                elif n > 0:
                    fetch(values, box_v, ring.v, n - 1, last_page, FINAL, last_column, LAST, BOX, VARIANT)
                n += 1
            last_page, last_column = page, column
            key_frame = next_visible(tables.bias_ptr, item.frame, sizes.read, key_frame + 1, item.end, HAS_BIAS)
    if n > 0:
        if VARIANT.one_arrive:  # a last pair that has no keys
            wait_free(ring.k, n, VARIANT)
        fetch(values, box_v, ring.v, n - 1, last_page, FINAL, last_column, LAST, BOX, VARIANT)
        drain(ring, n, VARIANT)


@gluon.jit
def attend(
    q, ring, turns, query, key_frame, n, log2_scale,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, CROSSES: gl.constexpr,
    TILES: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 rows against the item's visible key frames, ``key_frame`` first: accumulator, pivot, sum, next tile."""
    bias_ptr, frame, end, read = query.tables.bias_ptr, query.item.frame, query.item.end, query.sizes.read
    FIRST: gl.constexpr = TILES.first
    WHOLE: gl.constexpr = TILES.whole
    LAST: gl.constexpr = TILES.last
    EARLY: gl.constexpr = LAST.rows * D < 128 * 128  # beside a full last tile the next query finds no registers
    store_query(q, load_query(query, key_frame, T, D), query, key_frame, S, T, D, CROSSES, VARIANT)
    following = next_visible(bias_ptr, frame, read, key_frame + 1, end, HAS_BIAS)
    bias = load_bias(bias_ptr, frame, read, key_frame, HAS_BIAS)
    p, rest, m_i, l_i = first_tile(
        q, ring, n, (following < end) | (TILES.count > 1), bias, log2_scale,
        TILE=FIRST, D=D, VARIANT=VARIANT, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip
    acc = gl.zeros([ROWS, D], gl.float32, product_layout(D))
    while key_frame < end:  # p holds the first tile of the frame, not yet multiplied by its values
        if TILES.count > 2:
            for _ in range(TILES.count - 2):
                p, rest, acc, m_i, l_i = step(
                    q, p, rest, acc, m_i, l_i, ring, turns, n, True, bias, log2_scale,
                    TILE=WHOLE, NEXT=WHOLE, VARIANT=VARIANT, HAS_BIAS=HAS_BIAS,
                )  # fmt: skip
                n += 1
        turned_for = gl.minimum(following, end - 1)
        if EARLY:
            loaded = load_query(query, turned_for, T, D)
        p_last, rest_last = p, rest
        if TILES.count > 1:
            p_last, rest_last, acc, m_i, l_i = step(
                q, p, rest, acc, m_i, l_i, ring, turns, n, following < end, bias, log2_scale,
                TILE=WHOLE, NEXT=LAST, VARIANT=VARIANT, HAS_BIAS=HAS_BIAS,
            )  # fmt: skip
            n += 1
        if not EARLY:
            loaded = load_query(query, turned_for, T, D)
        # no product reads q any more: the step before has waited for the last one
        store_query(q, loaded, query, turned_for, S, T, D, CROSSES, VARIANT)
        beyond = next_visible(bias_ptr, frame, read, following + 1, end, HAS_BIAS)
        if following < end:
            bias = load_bias(bias_ptr, frame, read, following, HAS_BIAS)
            more = (beyond < end) | (TILES.count > 1)
            p, rest, acc, m_i, l_i = step(
                q, p_last, rest_last, acc, m_i, l_i, ring, turns, n, more, bias, log2_scale,
                TILE=LAST, NEXT=FIRST, VARIANT=VARIANT, HAS_BIAS=HAS_BIAS,
            )  # fmt: skip
        else:
            acc = last_product(p_last, rest_last, acc, ring, turns, n, LAST, VARIANT)
            p = no_operand(p_last.dtype, D, FIRST.rows)
            rest = no_operand(p_last.dtype, D, FIRST.rest)
        n += 1
        key_frame, following = following, beyond
    return acc, m_i, l_i, n


@gluon.jit
def store_rows(outputs, query, acc, m_i, l_i, S: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr):
    """Divide by the sum and store the rows in the output; rows that saw no key become 0 and -inf."""
    item, sizes = query.item, query.sizes
    offs_m = query.row + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(D)))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, product_layout(D)))
    mask_m = offs_m < item.stop
    seen = gl.where(l_i > 0, l_i, 1.0)
    rows = (item.batch.to(gl.int64) * sizes.frames * S + offs_m) * sizes.heads + item.head
    out = (acc / seen[:, None]).to(outputs.out_ptr.dtype.element_ty)
    gl.store(outputs.out_ptr + rows[:, None] * D + offs_d[None, :], out, mask=mask_m[:, None])
    if HAS_LSE:
        rows = ((item.batch.to(gl.int64) * sizes.frames + offs_m // S) * sizes.heads + item.head) * S + offs_m % S
        gl.store(outputs.lse_ptr + rows, (m_i + gl.log2(seen)) * LN_2, mask=mask_m)


@gluon.jit
def store_fragment(outputs, acc, m_i, l_i, first, D: gl.constexpr):
    """Store the rows of a cut tile's fragment in the workspace, for ``_merge``."""
    rows = first.to(gl.int64) + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(D)))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, product_layout(D)))
    gl.store(outputs.acc_ptr + rows[:, None] * D + offs_d[None, :], acc)
    gl.store(outputs.sums_ptr + 2 * rows, m_i)
    gl.store(outputs.sums_ptr + 2 * rows + 1, l_i)


@gluon.jit
def consume(
    q, ring, turns, query_ptr, tables, outputs, sizes, log2_scale,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, CROSSES: gl.constexpr,
    TILES: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: the first (half 0) or last (1) 64 rows of every item of this program."""
    channels = sizes.heads * D
    n = 0
    begin_turns(turns, VARIANT)
    for index in range(count_items(gl.program_id(0), gl.num_programs(0), sizes.tiles, sizes.read)):
        # item.frame is that of the tile's first row, for both halves: all three roles must see the same frames
        item = take_item(index, sizes, S, SPAN, BLOCK_M)
        row = item.row + turns.half * ROWS
        rows_ptr = query_ptr + (item.batch.to(gl.int64) * sizes.frames * S + row) * channels + item.head * D
        query = QueryRows(rows_ptr, row, item, sizes, tables)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, product_layout(D)))
        l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, product_layout(D)))
        acc = gl.zeros([ROWS, D], gl.float32, product_layout(D))
        key_frame = next_visible(tables.bias_ptr, item.frame, sizes.read, item.begin, item.end, HAS_BIAS)
        if not HAS_BIAS or key_frame < item.end:
            acc, m_i, l_i, n = attend(
                q, ring, turns, query, key_frame, n, log2_scale, S, T, D, CROSSES, TILES, VARIANT, HAS_BIAS
            )
        if item.end - item.begin == sizes.read:
            store_rows(outputs, query, acc, m_i, l_i, S, D, HAS_LSE)
        else:
            store_fragment(outputs, acc, m_i, l_i, item.fragment * BLOCK_M + turns.half * ROWS, D)
    end_turns(turns, VARIANT)


@gluon.jit
def _frame_attention_hopper(
    query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr, bias_ptr, slot_ptr,
    keys, values, box_keys, box_values,
    log2_scale, tiles, spans, frames, read, pages, heads, groups,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, SPAN: gl.constexpr, CROSSES: gl.constexpr,
    TILES: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    # one program per SM, in three roles, goes through its items: a tile of query rows and a range of key frames each
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    first_q = gl.allocate_shared_memory(dtype, [ROWS, D], swizzled)
    last_q = gl.allocate_shared_memory(dtype, [ROWS, D], swizzled)
    values_free: gl.constexpr = 0 if VARIANT.one_arrive else VALUES_FREE.value  # 0: freed with the keys
    k_tiles, k_rests, k_full, k_free = allocate_buffers(dtype, KEYS_FREE, TILES, D, VARIANT)
    v_tiles, v_rests, v_full, v_free = allocate_buffers(dtype, values_free, TILES, D, VARIANT)
    turns = 0
    if VARIANT.ping_pong and VARIANT.signal == "mbarrier":
        turns = allocate_turns()
    fence_async_shared()  # TMA meets the barriers through the asynchronous proxy

    # Triton 3.6 forgets that a number is constant, and so a branch decided, where a function returns it
    ring = Ring(
        Buffers(k_tiles, k_rests, k_full, k_free, KEYS_FREE), Buffers(v_tiles, v_rests, v_full, v_free, values_free)
    )
    sizes = Sizes(tiles, spans, frames, read, pages, heads, groups)
    tables = Tables(turn_ptr, scale_ptr, bias_ptr, slot_ptr)
    outputs = Outputs(out_ptr, lse_ptr, acc_ptr, sums_ptr)
    descriptors = Descriptors(keys, values, box_keys, box_values)
    gl.warp_specialize(
        [
            (consume, (
                first_q, ring, Turns(0, turns), query_ptr, tables, outputs, sizes, log2_scale,
                S, T, D, SPAN, CROSSES, TILES, VARIANT, HAS_BIAS, HAS_LSE,
            )),
            (consume, (
                last_q, ring, Turns(1, turns), query_ptr, tables, outputs, sizes, log2_scale,
                S, T, D, SPAN, CROSSES, TILES, VARIANT, HAS_BIAS, HAS_LSE,
            )),
            (produce, (descriptors, ring, tables, sizes, S, D, SPAN, TILES, VARIANT, HAS_BIAS)),
        ],
        [4, 1],
        [VARIANT.registers, VARIANT.fetch_registers],
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
    variant: str | Variant = SELECTED,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the listed pages, as ``frame_attention`` does, on a GPU of compute capability 9.0.

    Args:
        query, key_pages, value_pages: in bfloat16 or float16, head dim 64 or 128.
        slots, turn, logit_scale, bias, want_lse, programs: as in ``frame_attention``.
        variant: name of a loop of hopper_variants.py, or one that is not listed there.

    Returns:
        The output and the log-sum-exp, as ``frame_attention``.

    Raises:
        ValueError: if a tensor is not contiguous, dtypes differ, dtype or head dim is not supported, or no variant has
            that name.
    """
    variant = get_variant(variant) if isinstance(variant, str) else variant
    validate_inputs(query, key_pages, value_pages, slots, turn, logit_scale, bias)
    dim = query.shape[-1]
    if query.dtype.itemsize != 2 or dim not in (64, 128):
        raise ValueError(f"head dim must be 64 or 128, in bfloat16 or float16, got {dim} in {query.dtype}")
    shapes = shapes_of(query, key_pages, slots, turn, logit_scale, bias, want_lse=want_lse, programs=programs)
    launch, attend, blocks = prepare(shapes, variant)
    results = launch.allocate(query)
    described = [of.of(pages) for of in blocks for pages in (key_pages, value_pages)]
    attend(query, *results, turn, logit_scale, bias, slots, *described)
    launch.merge(results)
    return results.out, results.lse


@keep
def prepare(shapes: Shapes, variant: Variant) -> tuple[Launch, Prepared, tuple[Blocks, Blocks]]:
    """The launch, the kernel, and how blocks of 128 tokens and of ``Tiles.box`` are read."""
    launch = prepare_launch(shapes, block_m=BLOCK_M.value, least_m=BLOCK_M.value)
    batch, _, tokens, heads, dim = shapes.query
    tiles = cut_frame(tokens, wide=variant.wide, fold_last=variant.fold_last)
    attend = Prepared(
        _frame_attention_hopper, (launch.programs,), launch.numbers,
        {**launch.constants, "TILES": tiles, "VARIANT": variant}, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)

    def blocks(rows: int) -> Blocks:
        described = batch * shapes.pages, tokens, heads * dim
        return Blocks(TensorDescriptor, shapes.dtypes[0], described, [1, rows, dim], layout)

    return launch, attend, (blocks(BLOCK_N.value), blocks(tiles.box))
