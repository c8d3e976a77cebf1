"""Device functions of the Hopper kernel, in Gluon: the turned query, the softmax, one step of the loop.

How tiles of keys and values come and go, and whose turn it is, stands in hopper_ring.py.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..warpgroup import four_warps, operand_layout, product_layout
from .hopper_ring import free_tile, pass_turn, take_turn, tile_of, wait_full
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
def softmax(score, m_i, l_i, log2_scale, bias, N: gl.constexpr, KEYS: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Probabilities of N keys, of which the first KEYS exist; new pivot and sum; the factor for the old accumulator.

    The pivot is in base 2 and holds the bias. Nothing leaves the threads that hold the scores.
    """
    layout: gl.constexpr = product_layout(N)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    if KEYS < N:
        score = gl.where((gl.arange(0, N, gl.SliceLayout(0, layout)) < KEYS)[None, :], score, float("-inf"))
    m_old, l_old = gl.convert_layout(m_i, rows), gl.convert_layout(l_i, rows)
    if HAS_BIAS:  # the same for all keys of a frame: the pivot moves instead of the scores
        m_old -= bias
    m_new = gl.maximum(m_old, gl.max(score, 1) * log2_scale)
    p = gl.exp2(score * log2_scale - m_new[:, None])
    alpha = gl.exp2(m_old - m_new)
    l_new = l_old * alpha + gl.sum(p, 1)
    if HAS_BIAS:
        m_new += bias
    return p, m_new, l_new, alpha


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
    N: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of an item's first tile, n, which no product overlaps: operand p, pivot, sum."""
    state: gl.constexpr = gl.SliceLayout(1, product_layout(D))
    wait_full(ring.k, n, True, VARIANT)
    zeros = gl.zeros([ROWS, N], gl.float32, product_layout(N))
    score = warpgroup_mma(q, tile_of(ring.k, n, N, VARIANT).permute((1, 0)), zeros, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))
    free_tile(ring.k, n, VARIANT)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, state)
    l_i = gl.full([ROWS], 0.0, gl.float32, state)
    p, m_i, l_i, alpha = softmax(score, m_i, l_i, log2_scale, bias, N, KEYS, HAS_BIAS)
    wait_full(ring.k, n + 1, more, VARIANT)
    p = gl.convert_layout(p.to(ring.k.tiles.dtype), operand_layout(D))
    return p, gl.convert_layout(m_i, state), gl.convert_layout(l_i, state)


@gluon.jit
def step(
    q, p, acc, m_i, l_i, ring, turns, n, more, bias, log2_scale,
    N: gl.constexpr, NEXT_N: gl.constexpr, KEYS: gl.constexpr, VARIANT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The product of tile n (N keys) under the scores and softmax of tile n + 1 (NEXT_N keys, the first KEYS exist).

    The keys of tile n + 1 have been waited for; those of tile n + 2 are then, if the item has ``more``.
    Returns operand p of tile n + 1, accumulator, pivot, sum.
    """
    D: gl.constexpr = acc.shape[1]
    state: gl.constexpr = gl.SliceLayout(1, product_layout(D))
    zeros = gl.zeros([ROWS, NEXT_N], gl.float32, product_layout(NEXT_N))
    k = tile_of(ring.k, n + 1, NEXT_N, VARIANT).permute((1, 0))
    align_before_products(VARIANT)
    take_turn(turns, n, VARIANT)
    score = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    wait_full(ring.v, n, True, VARIANT)
    product = warpgroup_mma(p, tile_of(ring.v, n, N, VARIANT), acc, is_async=True)
    pass_turn(turns, VARIANT)
    align_under_products(VARIANT)
    score = warpgroup_mma_wait(1, deps=(score,))
    if not VARIANT.one_arrive:
        free_tile(ring.k, n + 1, VARIANT)
    p_next, m_i, l_i, alpha = softmax(score, m_i, l_i, log2_scale, bias, NEXT_N, KEYS, HAS_BIAS)
    # without this wait here and p_next in the next one, ptxas puts the exponentials after the product
    wait_full(ring.k, n + 2, more, VARIANT)
    acc, p_next = warpgroup_mma_wait(0, deps=(product, p_next))
    if VARIANT.one_arrive:
        free_tile(ring.k, n + 1, VARIANT)
    else:
        free_tile(ring.v, n, VARIANT)
    acc *= gl.convert_layout(alpha, state)[:, None]
    p_next = gl.convert_layout(p_next.to(ring.k.tiles.dtype), operand_layout(D))
    return p_next, acc, gl.convert_layout(m_i, state), gl.convert_layout(l_i, state)


@gluon.jit
def last_product(p, acc, ring, turns, n, N: gl.constexpr, VARIANT: gl.constexpr):
    """The product of an item's last tile, n, which nothing overlaps: accumulator."""
    take_turn(turns, n, VARIANT)
    wait_full(ring.v, n, True, VARIANT)
    acc = warpgroup_mma(p, tile_of(ring.v, n, N, VARIANT), acc, is_async=True)
    pass_turn(turns, VARIANT)
    if VARIANT.signal == "named" or VARIANT.one_arrive or VARIANT.ping_pong:
        four_warps()
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if not VARIANT.one_arrive:
        free_tile(ring.v, n, VARIANT)
    return acc
