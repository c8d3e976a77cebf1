"""Device functions of the Hopper kernel, in Gluon: the turned query, the softmax, one step of the loop.

How tiles of keys and values come and go, and whose turn it is, stands in hopper_ring.py.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..warpgroup import four_warps, operand_layout, product_layout
from .hopper_ring import free_tile, pass_turn, rest_of, take_turn, tile_of, wait_full
from .work import Item, Sizes, Tables

ROWS = gl.constexpr(64)  # query rows of a warpgroup


class QueryRows(NamedTuple):
    """The 64 query rows of a warpgroup: where they lie, and what they need to be turned."""

    rows_ptr: object
    row: object  # first row, among the F * S rows of its head
    item: Item
    sizes: Sizes
    tables: Tables


@gluon.constexpr_function
def query_layout(pairs):
    """How its registers hold half the channels of 64 rows, 16 bytes of a row to a thread."""
    return gl.BlockedLayout([1, 8], [256 // pairs, pairs // 8], [4, 1], [1, 0])


@gluon.jit
def load_turn(query, frame, key_frame, T: gl.constexpr, D: gl.constexpr):
    """(cos, sin) [1, D / 2] for a query frame that meets a key frame, times the query frame's logit_scale."""
    pair = gl.arange(0, D // 2, gl.SliceLayout(0, query_layout(D // 2)))
    read, groups = query.sizes.read, query.sizes.groups
    turn_ptr = query.tables.turn_ptr
    turn_ptr += ((frame * read + key_frame) * groups + query.item.head % groups) * (2 * T)
    scale = gl.load(query.tables.scale_ptr + frame)
    cos = gl.load(turn_ptr + 2 * pair, mask=pair < T, other=1.0)
    sin = gl.load(turn_ptr + 2 * pair + 1, mask=pair < T, other=0.0)
    return (cos * scale)[None, :], (sin * scale)[None, :]


@gluon.jit
def load_query(query, key_frame, T: gl.constexpr, D: gl.constexpr):
    """This warpgroup's query rows, real and imaginary channels, and the turn of the tile's frame for a key frame."""
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, query_layout(D // 2)))
    pair = gl.arange(0, D // 2, gl.SliceLayout(0, query_layout(D // 2)))
    ptr = query.rows_ptr + offs_m[:, None] * (query.sizes.heads * D) + pair[None, :]
    mask_m = (query.row + offs_m < query.item.stop)[:, None]
    real = gl.load(ptr, mask=mask_m, other=0.0)
    imag = gl.load(ptr + D // 2, mask=mask_m, other=0.0)
    cos, sin = load_turn(query, query.item.frame, key_frame, T, D)
    return real, imag, cos, sin


@gluon.jit
def store_query(
    buffer, loaded, query, key_frame,
    S: gl.constexpr, T: gl.constexpr, D: gl.constexpr, CROSSES: gl.constexpr, VARIANT: gl.constexpr,
):  # fmt: skip
    """Turn in float32 what ``load_query`` loaded, round it once and store it where wgmma reads it."""
    real, imag, cos, sin = loaded
    real, imag = real.to(gl.float32), imag.to(gl.float32)
    if CROSSES:  # rows past the frame's end belong to the next one
        next_cos, next_sin = cos, sin
        if query.row + ROWS > (query.item.frame + 1) * S:
            next_frame = gl.minimum(query.item.frame + 1, query.sizes.frames - 1)
            next_cos, next_sin = load_turn(query, next_frame, key_frame, T, D)
        offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, query_layout(D // 2)))
        is_next = (query.row + offs_m >= (query.item.frame + 1) * S)[:, None]
        cos, sin = gl.where(is_next, next_cos, cos), gl.where(is_next, next_sin, sin)
    if VARIANT.signal == "named":
        four_warps()  # no warp still multiplies by what is overwritten
    turned = gl.join((real * cos - imag * sin).to(buffer.dtype), (real * sin + imag * cos).to(buffer.dtype))
    buffer.store(turned.permute((0, 2, 1)).reshape([ROWS, D]))
    fence_async_shared()  # wgmma reads through the asynchronous proxy
    if VARIANT.signal == "named":
        four_warps()


@gluon.jit
def hide_missing(score, N: gl.constexpr, KEYS: gl.constexpr):
    """Scores of N keys, of which the first KEYS exist."""
    if KEYS < N:
        keys = gl.arange(0, N, gl.SliceLayout(0, product_layout(N)))
        score = gl.where((keys < KEYS)[None, :], score, float("-inf"))
    return score


@gluon.jit
def softmax(score, rest, m_i, l_i, log2_scale, bias, TILE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Probabilities of a tile's keys and of its rest; new pivot and sum; the factor for the old accumulator.

    The pivot is in base 2 and holds the bias. Nothing leaves the threads that hold the scores.
    """
    N: gl.constexpr = TILE.rows
    REST: gl.constexpr = TILE.rest
    rows: gl.constexpr = gl.SliceLayout(1, product_layout(N))
    score = hide_missing(score, N, TILE.keys)
    m_old, l_old = gl.convert_layout(m_i, rows), gl.convert_layout(l_i, rows)
    if HAS_BIAS:  # the same for all keys of a frame: the pivot moves instead of the scores
        m_old -= bias
    highest = gl.max(score, 1)
    if REST > 0:
        rest = hide_missing(rest, REST, TILE.keys - N)
        highest = gl.maximum(highest, gl.convert_layout(gl.max(rest, 1), rows))
    m_new = gl.maximum(m_old, highest * log2_scale)
    alpha = gl.exp2(m_old - m_new)
    l_new, p_rest = l_old * alpha, 0
    if REST > 0:  # before the others: that takes fewer registers
        pivot = gl.convert_layout(m_new, gl.SliceLayout(1, product_layout(REST)))
        p_rest = gl.exp2(rest * log2_scale - pivot[:, None])
        l_new += gl.convert_layout(gl.sum(p_rest, 1), rows)
    p = gl.exp2(score * log2_scale - m_new[:, None])
    l_new += gl.sum(p, 1)
    if HAS_BIAS:
        m_new += bias
    return p, p_rest, m_new, l_new, alpha


@gluon.jit
def issue_scores(q, ring, n, TILE: gl.constexpr, VARIANT: gl.constexpr):
    """Issue the products of the query with the keys of tile n and of its rest."""
    N: gl.constexpr = TILE.rows
    REST: gl.constexpr = TILE.rest
    zeros = gl.zeros([ROWS, N], gl.float32, product_layout(N))
    k = tile_of(ring.k, n, N, VARIANT).permute((1, 0))
    score, rest = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True), 0
    if REST > 0:
        zeros = gl.zeros([ROWS, REST], gl.float32, product_layout(REST))
        k = rest_of(ring.k, n, REST, VARIANT).permute((1, 0))
        rest = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    return score, rest


@gluon.jit
def issue_product(p, rest, acc, ring, n, TILE: gl.constexpr, VARIANT: gl.constexpr):
    """Issue the products of the probabilities with the values of tile n and of its rest."""
    product = warpgroup_mma(p, tile_of(ring.v, n, TILE.rows, VARIANT), acc, is_async=True)
    if TILE.rest > 0:
        product = warpgroup_mma(rest, rest_of(ring.v, n, TILE.rest, VARIANT), product, is_async=True)
    return product


@gluon.jit
def wait_for(under_way: gl.constexpr, first, rest, TILE: gl.constexpr):
    """Wait until no more than so many products are under way: what was issued for a tile, and for its rest."""
    if TILE.rest > 0:
        first, rest = warpgroup_mma_wait(under_way, deps=(first, rest))
    else:
        first = warpgroup_mma_wait(under_way, deps=(first,))
    return first, rest


@gluon.jit
def operand_of(p, dtype: gl.constexpr, D: gl.constexpr, N: gl.constexpr):
    """Probabilities of N keys as left factor; 0 if there are none."""
    if N > 0:
        return gl.convert_layout(p.to(dtype), operand_layout(D))
    else:
        return 0


@gluon.jit
def no_operand(dtype: gl.constexpr, D: gl.constexpr, N: gl.constexpr):
    """The same of nobody's probabilities, where a loop ends and one must be named."""
    if N > 0:
        return gl.zeros([ROWS, N], dtype, operand_layout(D))
    else:
        return 0


@gluon.jit
def align_before_products(VARIANT: gl.constexpr):
    """One barrier of the four warps a step, which all variants but the plain one need, or Triton would put two.

    Triton takes a wait at an mbarrier for a write to shared memory, which the next product might read.
    """
    if VARIANT.signal == "mbarrier":
        if VARIANT.one_arrive or VARIANT.ping_pong:
            four_warps()
    elif not VARIANT.ping_pong:
        four_warps()


@gluon.jit
def align_under_products(VARIANT: gl.constexpr):
    """With turns by named barriers it stands where nobody waits for it: under the products."""
    if VARIANT.signal == "named" and VARIANT.ping_pong:
        four_warps()


@gluon.jit
def first_tile(
    q, ring, n, more, bias, log2_scale,
    TILE: gl.constexpr, D: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of an item's first tile, n, which no product overlaps: operands, pivot, sum."""
    state: gl.constexpr = gl.SliceLayout(1, product_layout(D))
    dtype: gl.constexpr = ring.k.tiles.dtype
    wait_full(ring.k, n, True, VARIANT)
    score, rest = issue_scores(q, ring, n, TILE, VARIANT)
    score, rest = wait_for(0, score, rest, TILE)
    free_tile(ring.k, n, VARIANT)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, state)
    l_i = gl.full([ROWS], 0.0, gl.float32, state)
    p, rest, m_i, l_i, alpha = softmax(score, rest, m_i, l_i, log2_scale, bias, TILE, HAS_BIAS)
    wait_full(ring.k, n + 1, more, VARIANT)
    p, rest = operand_of(p, dtype, D, TILE.rows), operand_of(rest, dtype, D, TILE.rest)
    return p, rest, gl.convert_layout(m_i, state), gl.convert_layout(l_i, state)


@gluon.jit
def step(
    q, p, rest, acc, m_i, l_i, ring, turns, n, more, bias, log2_scale,
    TILE: gl.constexpr, NEXT: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The product of tile n, a TILE, under the scores and softmax of tile n + 1, the NEXT.

    The keys of tile n + 1 have been waited for; those of tile n + 2 are then, if the item has ``more``.
    Returns the operands of tile n + 1, accumulator, pivot, sum.
    """
    D: gl.constexpr = acc.shape[1]
    state: gl.constexpr = gl.SliceLayout(1, product_layout(D))
    dtype: gl.constexpr = ring.k.tiles.dtype
    align_before_products(VARIANT)
    take_turn(turns, n, VARIANT)
    score, next_rest = issue_scores(q, ring, n + 1, NEXT, VARIANT)
    wait_full(ring.v, n, True, VARIANT)
    product = issue_product(p, rest, acc, ring, n, TILE, VARIANT)
    pass_turn(turns, VARIANT)
    align_under_products(VARIANT)
    score, next_rest = wait_for(2 if TILE.rest > 0 else 1, score, next_rest, NEXT)
    if not VARIANT.one_arrive:
        free_tile(ring.k, n + 1, VARIANT)
    p_next, next_rest, m_i, l_i, alpha = softmax(score, next_rest, m_i, l_i, log2_scale, bias, NEXT, HAS_BIAS)
    # without this wait here and p_next in the next one, ptxas puts the exponentials after the product
    wait_full(ring.k, n + 2, more, VARIANT)
    if NEXT.rest > 0:
        acc, p_next, next_rest = warpgroup_mma_wait(0, deps=(product, p_next, next_rest))
    else:
        acc, p_next = warpgroup_mma_wait(0, deps=(product, p_next))
    if VARIANT.one_arrive:
        free_tile(ring.k, n + 1, VARIANT)
    else:
        free_tile(ring.v, n, VARIANT)
    acc *= gl.convert_layout(alpha, state)[:, None]
    p_next, next_rest = operand_of(p_next, dtype, D, NEXT.rows), operand_of(next_rest, dtype, D, NEXT.rest)
    return p_next, next_rest, acc, gl.convert_layout(m_i, state), gl.convert_layout(l_i, state)


@gluon.jit
def last_product(p, rest, acc, ring, turns, n, TILE: gl.constexpr, VARIANT: gl.constexpr):
    """The product of an item's last tile, n, which nothing overlaps: accumulator."""
    take_turn(turns, n, VARIANT)
    wait_full(ring.v, n, True, VARIANT)
    acc = issue_product(p, rest, acc, ring, n, TILE, VARIANT)
    pass_turn(turns, VARIANT)
    if VARIANT.signal == "named" or VARIANT.one_arrive or VARIANT.ping_pong:
        four_warps()
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if not VARIANT.one_arrive:
        free_tile(ring.v, n, VARIANT)
    return acc
