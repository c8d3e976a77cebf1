"""How much memory the decoder takes, and how its work is cut so that it takes less: in time, and in space.

Both cuts are exact. In time every convolution is causal, and what it needs of the frames before is kept. In space, all
that follows on the attention in the middle looks at neighbours alone: a tile is computed with a margin as wide as they
reach, which is thrown away. Where a tile ends at the picture's edge it has none: there the convolutions' own zeros are.
"""

from typing import NamedTuple

from flexkern.model.vae.net import Sizes

BEFORE = 2  # frames that a causal convolution keeps
MOST = 2**31 - 1  # elements of a tensor that libraries of convolutions count in 32 bits


class Span(NamedTuple):
    """Rows, or columns, of a latent frame: what a tile computes, and what of it stays."""

    start: int
    stop: int
    first: int
    """of those that stay, counted from ``start``"""
    kept: int
    """how many stay"""


class Cut(NamedTuple):
    """How a video is decoded."""

    pictures: int
    """computed together"""
    rows: int
    """tiles from top to bottom"""
    columns: int


def reach(sizes: Sizes) -> int:
    """How many places of a latent frame a picture looks beyond its own, the attention in the middle apart."""
    blocks = 2 * (sizes.blocks + 1)
    found = blocks + 1  # of the last level, and its last convolution
    for _ in sizes.doubles_time:
        found = (found + 1 + 1) // 2 + blocks  # a convolution of doubled places, then the level before
    return found


def spans(length: int, parts: int, margin: int) -> list[Span]:
    """Equal parts of a latent's side, with a margin wherever another part follows."""
    ends = [length * i // parts for i in range(parts + 1)]
    found = []
    for first, last in zip(ends, ends[1:], strict=False):
        start, stop = max(0, first - margin), min(length, last + margin)
        found.append(Span(start, stop, first - start, last - first))
    return found


def frames_at_once(sizes: Sizes, pictures: int) -> tuple[int, ...]:
    """How many frames of each level make at most so many pictures; one at least."""
    return tuple(max(1, pictures // stretch) for stretch in sizes.stretch)


def is_countable(sizes: Sizes, pictures: int, places: int) -> bool:
    """Whether the largest buffer of a convolution has at most ``MOST`` elements.

    places: of all videos' latent frames, computed together.
    """
    inputs = (sizes.widths[0], *(width // 2 for width in sizes.widths))
    at_once = frames_at_once(sizes, pictures)
    found = (
        (count + BEFORE) * 4**level * max(width, before)
        for level, (count, width, before) in enumerate(zip(at_once, sizes.widths, inputs, strict=False))
    )
    return places * max(found) <= MOST


def count_elements(sizes: Sizes, pictures: int, *, middle: bool = True) -> tuple[int, int]:
    """Elements for each place of a latent frame: those that the past takes, and the most that are being computed.

    middle: with what comes before the levels, the attention and the blocks around it.

    A block holds its input, its output or the hidden features, the buffer of a convolution, which is two frames longer,
    and the two frames that replace those of the past. Wherever a level's input is cut into pieces, all of it waits
    beside them.
    """
    at_once = frames_at_once(sizes, pictures)
    last = len(sizes.widths) - 1
    held, working, waiting = BEFORE * sizes.latent if middle else 0, 0, 0
    arriving, inputs, area = at_once[0], sizes.widths[0], 1
    for level, width in enumerate(sizes.widths):
        count, doubles = min(at_once[level], arriving), level < last and sizes.doubles_time[level]
        convolutions = (
            2 * (sizes.blocks + 1) - 1 + (4 if level == 0 and middle else 0) + (1 if level == last or doubles else 0)
        )
        held += BEFORE * area * (inputs + convolutions * width)
        if count < arriving:
            waiting += arriving * area * inputs
        widest = max(inputs, width)
        block = (3 * count + 2 * BEFORE) * widest + (count * widest if inputs != width else 0)
        looks = 7 * count * width if level == 0 and middle else 0  # query, key, value, and what goes in and out
        times = 2 if doubles else 1
        rises = 0
        if level < last:
            in_time = (3 * count * times + 2 * BEFORE) * width if doubles else 0
            rises = max(in_time, times * count * (width + 4 * (width // 2)) + (count * width if doubles else 0))
        working = max(working, waiting + area * max(block, looks, rises))
        arriving, inputs, area = times * count, width // 2, 4 * area
    return held, working
