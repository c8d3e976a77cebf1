"""How the work of one attention call is divided: whole tiles first, then tiles cut by key frame, dealt evenly.

A tile is BLOCK_M query rows of one head; a unit is one (tile, key frame). Program p of G first takes the whole tiles
p, G + p, 2 G + p, ...; the tiles mod G left over are split evenly in units: program p takes units
[p * units / G, (p + 1) * units / G). That is less than one tile's R units, so it touches at most two tiles.
Programs start on neighbouring tiles and the same frame, and go on at one pace, so their reads share L2.

The last wave of an uncut grid leaves SMs idle: 444 tiles on 132 SMs take 4 waves for the work of 3.36. Cut, they take
ceil(444 * R / 132) / R = 3.42 at R = 12. Letters: see the glossary (flexkern/docs/architecture.md).
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """The numbers of one call."""

    tiles: int
    spans: int  # runs of query rows of a head that no tile crosses
    frames: int
    read: int  # key frames
    pages: int  # of a layer, per video
    heads: int
    groups: int  # G: 1, or H for an angle per head


class Tables(NamedTuple):
    """What the plan says of the listed frames: device pointers."""

    turn_ptr: object  # [F, R, G, T, 2]
    scale_ptr: object  # [F]
    bias_ptr: object  # [F, R] or None
    slot_ptr: object  # [R]


class Outputs(NamedTuple):
    """Where results go: device pointers."""

    out_ptr: object  # rows that met every key frame
    lse_ptr: object
    acc_ptr: object  # rows of a cut tile's fragment
    sums_ptr: object


class Item(NamedTuple):
    """A tile of query rows and the key frames [begin, end) that it meets."""

    batch: object
    head: object
    row: object  # first row, among the F * S rows of its head
    stop: object  # end of the tile's span
    frame: object  # frame of the first row
    begin: object
    end: object
    fragment: object  # where a cut tile's rows are left


@triton.jit
def share(program, programs, units):
    """First unit of a program; the next program's first unit is its end."""
    return program * units // programs


@triton.jit
def owner(unit, programs, units):
    """The program that holds a unit."""
    return ((unit + 1) * programs - 1) // units


@triton.jit
def count_items(program, programs, tiles, read):
    """How many items a program has: whole tiles, then fragments of at most two cut ones."""
    units = tiles % programs * read
    begin, end = share(program, programs, units), share(program + 1, programs, units)
    return tiles // programs + (end > begin).to(tl.int32) + (end > (begin // read + 1) * read).to(tl.int32)


@triton.jit
def find_item(index, program, programs, tiles, read):
    """Tile of an item, its key frames [begin, end), and the index of its fragment: 2 * program, or one more."""
    waves = tiles // programs
    units = tiles % programs * read
    begin, end = share(program, programs, units), share(program + 1, programs, units)
    second = tl.maximum(index - waves, 0)  # 1 for the second cut tile of a program
    cut = begin // read + second
    is_whole = index < waves
    tile = tl.where(is_whole, index * programs + program, waves * programs + cut)
    begin = tl.where(is_whole, 0, tl.maximum(begin - cut * read, 0))
    end = tl.where(is_whole, read, tl.minimum(end - cut * read, read))
    return tile, begin, end, 2 * program + second


@triton.jit
def find_rows(tile, heads, spans, SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """Batch and head of a tile, its first row and the end of its span.

    The F * S queries of one (batch, head) are rows, in ``spans`` spans that no tile crosses.
    """
    TILES: tl.constexpr = (SPAN + BLOCK_M - 1) // BLOCK_M
    span = tile // TILES % spans
    head = tile // TILES // spans
    return head // heads, head % heads, span * SPAN + tile % TILES * BLOCK_M, (span + 1) * SPAN


@triton.jit
def take_item(index, sizes, S: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """The index-th item of this program."""
    tile, begin, end, fragment = find_item(index, tl.program_id(0), tl.num_programs(0), sizes.tiles, sizes.read)
    batch, head, row, stop = find_rows(tile, sizes.heads, sizes.spans, SPAN, BLOCK_M)
    return Item(batch, head, row, stop, row // S, begin, end, fragment)
