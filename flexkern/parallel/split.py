"""How a video is cut over ranks: by heads inside self-attention, by a rectangle of each frame everywhere else.

A rectangle of latents is an ordinary, smaller picture to a transformer whose tokens meet in self-attention alone, so
that it runs unchanged. Rank r = i * across + j has the rectangle in row i and column j of down x across; down is the
greatest divisor that the ranks share with the token rows, so that there is a rectangle for each rank wherever the
ranks divide the tokens of a frame.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from flexkern.checks import require, whole
from flexkern.model.wan import WanConfig, token_grid
from flexkern.policies import Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One rank's part of every frame and layer. Raises ValueError, which lists numbers of ranks that would work."""

    ranks: int
    rank: int
    heads: int
    """heads H of an attention"""
    rows: int
    """token rows of a frame"""
    columns: int
    """token columns of a frame"""

    def __post_init__(self) -> None:
        validate_ranks(self.ranks, heads=self.heads, rows=self.rows, columns=self.columns)

    @property
    def down(self) -> int:
        """Rectangles one below the other."""
        return math.gcd(self.ranks, self.rows)

    @property
    def across(self) -> int:
        """Rectangles side by side."""
        return self.ranks // self.down

    @property
    def own_heads(self) -> slice:
        """The heads whose pages this rank holds."""
        own = self.heads // self.ranks
        return slice(self.rank * own, (self.rank + 1) * own)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(down, rows of a rectangle, across, columns of a rectangle): the places of a frame by rectangle."""
        return self.down, self.rows // self.down, self.across, self.columns // self.across

    def own_places(self, table: Tensor) -> Tensor:
        """Of a table of places [S, ...] those of this rank's rectangle."""
        i, j = divmod(self.rank, self.across)
        return table.unflatten(0, self.grid)[i, :, j].flatten(0, 1).contiguous()

    def cut(self, frames: Tensor) -> Tensor:
        """This rank's rectangle of latents [..., h, w]."""
        i, j = divmod(self.rank, self.across)
        return frames.chunk(self.down, dim=-2)[i].chunk(self.across, dim=-1)[j].contiguous()

    def joined(self, rectangles: Tensor) -> Tensor:
        """Latents [..., h, w] of the rectangles of all ranks, [ranks, ..., h / down, w / across]."""
        by_row = rectangles.unflatten(0, (self.down, self.across)).movedim((0, 1), (-4, -2))
        return by_row.flatten(-2).flatten(-3, -2)

    def by_heads(self, tokens: Tensor) -> Tensor:
        """[..., s, H, D] as [ranks, ..., s, H / ranks, D], a view: what each rank gets of the heads."""
        return tokens.unflatten(-2, (self.ranks, -1)).movedim(-3, 0)

    def by_places(self, tokens: Tensor) -> Tensor:
        """[..., S, h, D] as [ranks, ..., s, h, D]: what each rank gets of the places."""
        by_rectangle = tokens.unflatten(-3, self.grid).movedim((-6, -4), (0, 1))
        return by_rectangle.flatten(-4, -3).flatten(0, 1)

    def over_frame(self, rectangles: Tensor) -> Tensor:
        """What ``by_places`` cut, [ranks, ..., s, h, D], as [..., *grid, h, D], a view: the places of a frame."""
        _, rows, _, columns = self.grid
        by_row = rectangles.unflatten(0, (self.down, self.across)).unflatten(-3, (rows, columns))
        return by_row.movedim((0, 1), (-6, -4))


def fitting_ranks(*, heads: int, rows: int, columns: int) -> list[int]:
    """The numbers of ranks that divide both the heads and the tokens of a frame."""
    return [count for count in range(1, heads + 1) if heads % count == 0 and rows * columns % count == 0]


def validate_ranks(ranks: int, *, heads: int, rows: int, columns: int, called: str = "ranks") -> None:
    """Raises ValueError for a number of ranks that cannot share a model evenly; it lists those that can.

    Args:
        ranks: How many compute a video together.
        heads: Heads of an attention.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        called: What the user calls the number.
    """
    whole(called, ranks, 1)
    fitting = fitting_ranks(heads=heads, rows=rows, columns=columns)
    share = f"must share {heads} heads and the {rows}x{columns} tokens of a frame evenly"
    require(ranks in fitting, f"{called} {share}: expected one of {', '.join(map(str, fitting))}, got {ranks}")


def validate_preset(preset: Preset, ranks: int, *, called: str = "ranks") -> None:
    """Raises ValueError where so many ranks cannot run a preset. called: what the user calls the number."""
    told = f"{called} must be 1 with preset {preset.name!r}, whose tokens are chosen by the queries of all heads"
    require(ranks == 1 or not preset.chooses_tokens, f"{told}, got {ranks}")


def validate_shares(config: WanConfig, size: tuple[int, int], ranks: int, *, called: str = "ranks") -> None:
    """As ``validate_ranks``, of a model's latent frames of this height and width."""
    rows, columns = token_grid(config.patch_size, *size)
    validate_ranks(ranks, heads=config.num_heads, rows=rows, columns=columns, called=called)
