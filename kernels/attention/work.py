"""Who computes which part of an attention: whole tiles first, then tiles cut by key frame, dealt evenly.

A tile is BLOCK_M query rows of one (batch, head) against all R frames. With G programs, program p takes the whole
tiles p, G + p, 2 G + p, ...: all programs begin together, on neighbouring tiles and the same frame, and go on at one
pace, so that what they read of the cache at a time is little enough for L2. The tiles mod G tiles that remain are
``units`` (tile, frame) pairs; program p takes [p * units / G, (p + 1) * units / G). That is less than R units, so it
touches at most two tiles.

The last wave of an uncut grid leaves SMs idle: 444 tiles on 132 SMs take 4 waves for the work of 3.36. Cut, they take
ceil(444 * R / 132) / R = 3.42 at R = 12.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """One call in numbers: tiles, spans, F, R, pages of a layer, H, and G (1, or H for an angle per head)."""

    tiles: int
    spans: int
    frames: int
    read: int
    pages: int
    heads: int
    groups: int


class Item(NamedTuple):
    """A tile of query rows and the key frames [begin, end) that it meets; ``part`` is where a cut tile is left."""

    batch: object
    head: object
    row: object
    stop: object
    frame: object
    begin: object
    end: object
    part: object


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
    """How many items a program has: whole tiles, then parts of at most two cut ones."""
    units = tiles % programs * read
    begin, end = share(program, programs, units), share(program + 1, programs, units)
    return tiles // programs + (end > begin).to(tl.int32) + (end > (begin // read + 1) * read).to(tl.int32)


@triton.jit
def find_item(item, program, programs, tiles, read):
    """Tile of an item, its key frames [begin, end), and where a part of a cut tile is left: slot 2 * program or + 1."""
    waves = tiles // programs
    units = tiles % programs * read
    begin, end = share(program, programs, units), share(program + 1, programs, units)
    part = tl.maximum(item - waves, 0)
    cut = begin // read + part
    is_whole = item < waves
    tile = tl.where(is_whole, item * programs + program, waves * programs + cut)
    begin = tl.where(is_whole, 0, tl.maximum(begin - cut * read, 0))
    end = tl.where(is_whole, read, tl.minimum(end - cut * read, read))
    return tile, begin, end, 2 * program + part


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
def open_item(index, sizes, S: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """The index-th item of this program."""
    tile, begin, end, part = find_item(index, tl.program_id(0), tl.num_programs(0), sizes.tiles, sizes.read)
    batch, head, row, stop = find_rows(tile, sizes.heads, sizes.spans, SPAN, BLOCK_M)
    return Item(batch, head, row, stop, row // S, begin, end, part)
