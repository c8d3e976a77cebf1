"""The ring of key and value tiles of the Hopper kernel, and the turns of its warpgroups: device functions, in Gluon.

Ring. Tile n is use n // STAGES of buffer n % STAGES, in a ring for keys and in one for values. Two barriers guard a
buffer: ``full`` completes a phase when TMA has written it (one arrival and its bytes), ``free`` when both warpgroups
have read it (two arrivals). Use u completes phase u of both barriers. A reader waits for ``full`` with parity u & 1;
the writer waits for ``free`` of use u - 1, parity (u & 1) ^ 1. A fresh barrier passes that wait, so the first use never
blocks. A warpgroup arrives through one thread, after a barrier of its four warps that Triton puts there.

Variants (hopper_variants.py) change who says that a buffer is free, and when:

signal "named"  Named barriers of the hardware stand in for ``free``: each warp of both warpgroups arrives for itself
                (``bar.arrive``), the fetching warp waits (``bar.sync``): 256 + 32 threads. They know no phase that is
                over before the first, so the first STAGES fetches do not wait, and at its end the fetching warp meets
                the arrivals that no fetch waited for. No arrival runs ahead by a use: the next use of a buffer is
                fetched after the barrier of this one. A warp arrives when its products have read the buffer, and the
                barrier orders that before the copy which overwrites it; FlashAttention-3 hands its query back so.
one_arrive      Keys of tile m and values of tile m - 1 are pair m: fetched after one wait, freed by one arrival, at the
                end of step m - 1, or after the scores of an item's first tile m, whose values were read by then.
                Step n needs pair n + 1, and its end the keys of pair n + 2, which are fetched once step
                n + 1 - STAGES <= n - 1 is over: two stages suffice.
ping_pong       Turn n issues what belongs to tile n: in a step the scores of tile n + 1 and the product of tile n, at
                the end of an item that product. Half 0 takes turn n after half 1 has passed on turn n - 1, half 1 after
                half 0 has passed on turn n. All roles skip the same frames, so both halves take the same turns. A turn
                is passed on when its products are issued, not when they are done. While a half holds it, it waits for
                values n alone, and those need arrivals of steps before n, which need no turn still to come: no wait
                closes a circle. By mbarrier: parity (n & 1) ^ (1 - half), and no half is more than a phase ahead. By
                name: half 1 arrives once in the beginning, half 0 meets the last pass.
early_free      The arrival stands in a loop that never repeats, out of which ptxas does not move it.

Named barriers: 6 and 7 for turns, 8 to 11 for keys or pairs, 12 to 15 for values. Triton takes 0, 1 and 2 in this
kernel; the compile gate fails if it ever takes one of ours. Judged and left out: ``mbarrier.expect`` of no bytes, the
same arrival by thread 0 without Triton's barrier. It takes ``wgmma.wait_group`` of one warp for the whole warpgroup's,
which PTX does not promise and no gate here can see, and Triton 3.8 guards it with a barrier as well.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..warpgroup import load_block
from .hopper_tiles import ROWS as KEYS

BLOCK_N = gl.constexpr(KEYS)  # rows of a buffer, but for those of rests
TURN, KEYS_FREE, VALUES_FREE = gl.constexpr(6), gl.constexpr(8), gl.constexpr(12)  # named barriers; 0: none
TURN_THREADS, FREE_THREADS = gl.constexpr(256), gl.constexpr(256 + 32)  # threads that meet there


class Buffers(NamedTuple):
    """Buffers [STAGES, 128, D] for tiles of keys or of values, and the two barriers of each buffer."""

    tiles: object
    rests: object  # buffers [STAGES, TILES.rest, D] of their rests (hopper_tiles.py); ``tiles`` where none has one
    full: object
    free: object  # ``full`` again, and not used, where a named barrier stands in for it or there is none
    name: object  # the first of the named barriers; 0 for values that are freed with the keys of their pair


class Ring(NamedTuple):
    """The buffers of keys and of values."""

    k: Buffers
    v: Buffers


class Turns(NamedTuple):
    """A warpgroup's half of the rows, 0 or 1, and the barriers of both halves' turns; 0 if named ones stand in."""

    half: object
    barriers: object


@gluon.jit
def allocate_buffers(
    dtype: gl.constexpr, NAME: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, VARIANT: gl.constexpr
):
    """Buffers for tiles of keys or of values and their barriers: one arrival fills, two free. Fields of ``Buffers``."""
    STAGES: gl.constexpr = VARIANT.stages
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], swizzled)
    rests = tiles
    REST: gl.constexpr = TILES.rest
    if REST > 0:
        rests = gl.allocate_shared_memory(dtype, [STAGES, REST, D], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if VARIANT.signal == "mbarrier" and NAME > 0:
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for b in gl.static_range(STAGES):
            mbarrier.init(full.index(b), count=1)
            mbarrier.init(free.index(b), count=2)
        return tiles, rests, full, free
    else:
        for b in gl.static_range(STAGES):
            mbarrier.init(full.index(b), count=1)
        return tiles, rests, full, full


@gluon.jit
def allocate_turns():
    """A barrier for each half's turns."""
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(0), count=1)
    mbarrier.init(barriers.index(1), count=1)
    return barriers


@gluon.jit
def arrive_at(name, THREADS: gl.constexpr):
    """Arrive at a named barrier, each warp for itself, and go on."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.u32 $0, 0;", "=r,r,n", [name, THREADS], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def arrive_here_at(name, THREADS: gl.constexpr):
    """The same in a loop that is never repeated, out of which ptxas does not move it."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.u32 p, $1, 15; again: bar.arrive $1, $2; @p bra.uni again; mov.u32 $0, 0; }",
        "=r,r,n", [name, THREADS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def meet_at(name, THREADS: gl.constexpr):
    """Wait at a named barrier until THREADS threads, these among them, have arrived."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.u32 $0, 0;", "=r,r,n", [name, THREADS], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tile_of(buffers, n, N: gl.constexpr, VARIANT: gl.constexpr):
    """The first N tokens of tile n's buffer: the last tile of a frame is shorter than the buffer."""
    return buffers.tiles.index(n % VARIANT.stages).slice(0, N)


@gluon.jit
def rest_of(buffers, n, N: gl.constexpr, VARIANT: gl.constexpr):
    """The first N tokens of the rest of tile n."""
    return buffers.rests.index(n % VARIANT.stages).slice(0, N)


@gluon.jit
def wait_full(buffers, n, more, VARIANT: gl.constexpr):
    """Wait until TMA has written tile n; return at once if there is none (``more`` is false)."""
    mbarrier.wait(buffers.full.index(n % VARIANT.stages), n // VARIANT.stages & 1, pred=more)


@gluon.jit
def wait_free(buffers, n, VARIANT: gl.constexpr):
    """Wait until both warpgroups have read what the buffer of tile n held before, if it held anything."""
    if VARIANT.signal == "mbarrier":
        mbarrier.wait(buffers.free.index(n % VARIANT.stages), (n // VARIANT.stages & 1) ^ 1)
    elif n >= VARIANT.stages:
        meet_at(buffers.name + n % VARIANT.stages, FREE_THREADS)


@gluon.jit
def free_tile(buffers, n, VARIANT: gl.constexpr):
    """Say that this warpgroup has read tile n, or pair n."""
    if VARIANT.signal == "mbarrier":
        mbarrier.arrive(buffers.free.index(n % VARIANT.stages), count=1)
    elif VARIANT.early_free:
        arrive_here_at(buffers.name + n % VARIANT.stages, FREE_THREADS)
    else:
        arrive_at(buffers.name + n % VARIANT.stages, FREE_THREADS)


@gluon.jit
def fetch(whole, box, buffers, n, page, start, column, TILE: gl.constexpr, BOX: gl.constexpr, VARIANT: gl.constexpr):
    """Have TMA write tokens of a page as tile n, once both warpgroups have read what the buffers held.

    whole, box: descriptors of blocks of 128 and of BOX tokens. Tokens behind the page's end arrive as zeros.
    """
    full = buffers.full.index(n % VARIANT.stages)
    FIRST: gl.constexpr = BOX if TILE.rows <= BOX else BLOCK_N
    FETCHED: gl.constexpr = FIRST + BOX if TILE.rest > 0 else FIRST
    if buffers.name > 0:  # values of a pair: its keys were waited for
        wait_free(buffers, n, VARIANT)
    mbarrier.expect(full, FETCHED * buffers.tiles.shape[2] * 2)
    first = tile_of(buffers, n, FIRST, VARIANT)
    if TILE.rows <= BOX:
        load_block(box, [page, start, column], full, first)
    else:
        load_block(whole, [page, start, column], full, first)
    if TILE.rest > 0:
        load_block(box, [page, start + TILE.rows, column], full, rest_of(buffers, n, BOX, VARIANT))


@gluon.jit
def drain(ring, n, VARIANT: gl.constexpr):
    """Meet the arrivals that no fetch has waited for: nobody may leave while some are missing at a named barrier."""
    STAGES: gl.constexpr = VARIANT.stages
    if VARIANT.signal == "named":
        for i in gl.static_range(STAGES):
            if i > 0 or not VARIANT.one_arrive:  # the last values have waited for pair n
                wait_free(ring.k, n + i, VARIANT)
            if not VARIANT.one_arrive:
                wait_free(ring.v, n + i, VARIANT)


@gluon.jit
def begin_turns(turns, VARIANT: gl.constexpr):
    """Half 0 may begin."""
    if VARIANT.ping_pong and VARIANT.signal == "named" and turns.half == 1:
        arrive_at(TURN, TURN_THREADS)


@gluon.jit
def end_turns(turns, VARIANT: gl.constexpr):
    """No pass of a turn is left at a named barrier."""
    if VARIANT.ping_pong and VARIANT.signal == "named" and turns.half == 0:
        meet_at(TURN, TURN_THREADS)


@gluon.jit
def take_turn(turns, n, VARIANT: gl.constexpr):
    """Wait for turn n of this half."""
    if VARIANT.ping_pong:
        if VARIANT.signal == "mbarrier":
            mbarrier.wait(turns.barriers.index(turns.half), (n & 1) ^ (1 - turns.half))
        else:
            meet_at(TURN + turns.half, TURN_THREADS)


@gluon.jit
def pass_turn(turns, VARIANT: gl.constexpr):
    """It is the other half's turn."""
    if VARIANT.ping_pong:
        if VARIANT.signal == "mbarrier":
            mbarrier.arrive(turns.barriers.index(1 - turns.half), count=1)
        else:
            arrive_at(TURN + 1 - turns.half, TURN_THREADS)
