"""Which tile of the portable kernel is the fastest on this GPU: ``flexkern warmup --tune``.

The timing is passed in, so that what is decided from it is tested without a GPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .tiles import Config

SIZES = (  # rows, keys, warps, stages, programs a multiprocessor
    (128, 128, 8, 2, 1), (128, 64, 8, 3, 1), (128, 128, 8, 3, 1), (128, 64, 8, 4, 1), (128, 64, 8, 2, 1),
    (64, 64, 4, 3, 2), (64, 128, 4, 2, 2), (128, 64, 4, 3, 1), (64, 64, 4, 4, 3), (256, 64, 8, 2, 1),
)  # fmt: skip
AGREES = 0.01  # of the mean: two tiles round differently, by 0.004 in bfloat16; a wrong result is far off
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a call, with a cold L2 cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A tile that was tried."""

    config: Config
    ms: float = math.nan
    fault: str = ""
    """why it has no time, "" where it has one"""

    def __str__(self) -> str:
        return f"{self.config}: {self.fault or f'{self.ms:.4g} ms'}"


def candidates(arch: int, chosen: Config) -> tuple[Config, ...]:
    """Tiles worth a try on an architecture of tiles.py, the one that is in use first."""
    found = [chosen]
    for rows, keys, warps, stages, share in SIZES:
        for tma in (True, False) if arch >= 90 else (False,):
            found.append(
                replace(
                    chosen, block_m=rows, block_n=keys, num_warps=warps, num_stages=stages, tma=tma, per_sm=share
                )
            )  # fmt: skip
    return tuple(dict.fromkeys(found))


def time_tiles(configs: Iterable[Config], attend: Callable[[Config], Tensor], timer: Timer) -> Iterator[Timed]:
    """Every tile with its time, or with why it has none: it does not compile, does not fit, or its result differs.

    Args:
        configs: Tiles; the result of the first is what the others are compared with.
        attend: The output with a tile.
        timer: Takes the time of a call.

    Raises:
        Exception: What the first tile raises, which is the one in use.
    """
    first: Tensor | None = None
    for config in configs:
        try:
            out = attend(config).float()
        except Exception as error:  # of the compiler, the driver or the launcher: the next tile is tried
            if first is None:
                raise
            yield Timed(config=config, fault=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        first = out if first is None else first
        off = ((out - first).abs().mean() / first.abs().mean()).item()
        if not off < AGREES:
            yield Timed(config=config, fault=f"its result differs from that of the first tile by {off:.2g} of the mean")
            continue
        yield Timed(config=config, ms=timer(lambda config=config: attend(config)))  # type: ignore[misc]


def fastest(timed: Iterable[Timed]) -> Timed:
    """The tile of the least time. Raises ValueError where none has one."""
    good = [one for one in timed if not one.fault]
    if not good:
        raise ValueError("no tile could be timed")
    return min(good, key=lambda one: one.ms)
