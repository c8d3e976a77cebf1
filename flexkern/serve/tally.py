"""What a try of a job has made so far, in numbers of a fixed size, which go into its status and into its result."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 21, 34, 60)  # seconds: 10 ms to a minute


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts, of one try or of many."""

    chunks: list[int] = field(default_factory=lambda: [0] * (len(LATENCIES) + 1))
    """how many took at most so many seconds of ``LATENCIES``, but more than those before; the last: more than all"""
    seconds: float = 0.0
    """of all these chunks"""
    frames: int = 0
    """latent ones"""
    pictures: int = 0
    resumes: int = 0
    """tries that went on from a checkpoint"""

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            chunks=[own + more for own, more in zip(self.chunks, other.chunks, strict=True)],
            seconds=self.seconds + other.seconds,
            frames=self.frames + other.frames,
            pictures=self.pictures + other.pictures,
            resumes=self.resumes + other.resumes,
        )


class Counting:
    """Counts the events of a render (``flexkern.render.watch``).

    Args:
        clock: Seconds.
        wall: The time of day, in seconds.

    Attributes:
        tally: What came of it so far.
        kept: The time of day of the newest checkpoint; until there is one, of when the render began or went on; None
            before that.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._clock, self._wall = clock, wall
        self._last, self._made = 0.0, 0
        self.tally = Tally()
        self.kept: float | None = None

    def write(self, event: str, **about: Any) -> None:
        """Count an event; those that are not counted are passed over."""
        now, tally = self._clock(), self.tally
        if event == "started":
            self._last, self._made, self.kept = now, about["made"], self._wall()
            tally.resumes += about["made"] > 0
        elif event == "chunk":
            tally.chunks[bisect_left(LATENCIES, now - self._last)] += 1
            tally.seconds += now - self._last
            tally.frames += about["frames"]
            tally.pictures += max(0, about["made"] - self._made)
            self._last, self._made = now, about["made"]
        elif event == "checkpoint":
            self.kept = self._wall()
