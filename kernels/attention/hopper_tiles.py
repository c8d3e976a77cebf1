"""How the Hopper kernel cuts the keys of a frame into tiles. Plain Python: imports no Gluon.

A tile is what one step of the loop multiplies: up to 128 keys, and in some variants a rest of 16 to 64 more beside
them, because sizes of tensors are powers of two. Rest and first part lie in buffers of their own, and are fetched,
waited for and freed together. S = 1560, for example, is cut into

    12 tiles of 128 keys and one of 24, which are products of 32                    most variants
    11 tiles of 128 keys and one of 128 + 24, products of 128 and 32                fold_last
    8 tiles of 128 + 64 keys and one of 24                                          wide
"""

from dataclasses import dataclass

from .launch import product_rows

ROWS = 128  # keys of a tile without a rest; the buffers of first parts have so many rows
REST = 64  # keys of a rest at most


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of a tile's products: ``rows`` keys, ``rest`` more or 0, of which the first ``keys`` are the frame's."""

    rows: int
    rest: int
    keys: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a frame: ``count`` of them, all ``whole`` but the last one. A constant of the kernel.

    TMA fetches blocks of ``ROWS`` keys, and of ``box`` keys where that is enough.
    """

    count: int
    whole: Tile
    last: Tile
    box: int

    @property
    def first(self) -> Tile:
        """The first tile of a frame."""
        return self.whole if self.count > 1 else self.last

    @property
    def rest(self) -> int:
        """Rows of the buffers for rests; 0 if no tile has one."""
        return self.box if self.whole.rest or self.last.rest else 0


def cut_frame(tokens: int, *, wide: bool = False, fold_last: bool = False) -> Tiles:
    """The tiles of a frame of so many tokens.

    Args:
        tokens: S.
        wide: Tiles have 128 + 64 keys.
        fold_last: A last tile of at most 64 keys is a rest of the one before.
    """
    step = ROWS + REST if wide else ROWS
    count = -(-tokens // step)
    keys = tokens - (count - 1) * step
    if fold_last and count > 1 and keys <= REST:
        count, keys = count - 1, step + keys
    rows = min(keys, ROWS)
    last = Tile(product_rows(rows), product_rows(keys - rows) if keys > rows else 0, keys)
    whole = Tile(ROWS, REST if wide else 0, step)
    return Tiles(count, whole, last, box=REST if wide else last.rest or last.rows)
