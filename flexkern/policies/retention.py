"""Retention: which cached frames stay visible when the next chunk is computed.

Source: FIFO windows of Self-Forcing, the sink of LongLive; FLEX pins one in a model trained without (2602.14027).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..checks import check_fields, is_index, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A page to be computed before the chunk: the weighted sum of the pages at ``indices`` of the list."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        counts = len(self.indices), len(self.weights)
        require(counts[0] == counts[1] > 0, f"a blend needs a weight for each index, got {counts[1]} for {counts[0]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What stays of a list of cached frames."""

    indices: tuple[int, ...]
    """into that list, in the order in which attention will list the frames"""
    blends: tuple[Blend, ...] = ()
    """pages to be computed; nothing can compute them yet, so that a window refuses any"""

    def __post_init__(self) -> None:
        check_fields(self)


@runtime_checkable
class RetentionPolicy(Protocol):
    """What a cache asks of a retention policy; a policy is a frozen dataclass, so that its fields can be overridden."""

    @property
    def capacity(self) -> int:
        """Pages that a cache needs: the most frames attended at once, the current chunk included."""

    @property
    def pinned(self) -> int:
        """How many frames at the head of the list ``keep`` never evicts; a prompt switch may change which those are."""

    def keep(self, frames: Sequence[int], incoming: int) -> Kept:
        """What stays of the cached ``frames``, absolute indices in list order, when ``incoming`` new ones arrive.

        Raises ValueError where the capacity does not suffice for the incoming frames.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkWindow:
    """Keeps the frames at the head of the list, and the most recent ones as long as there is room."""

    sink: int
    """frames at the head of the list that are never evicted; 0 for plain first in, first out. They are the first of the
    video, unless a prompt switch without ``switch.keep_sink`` made others the head"""
    window: int
    """frames attended in all, the sink and the current chunk included"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.sink >= 0, f"sink must be >= 0 frames, got {self.sink}")
        require(self.window > self.sink, f"window must exceed the sink of {self.sink} frames, got {self.window}")

    @property
    def capacity(self) -> int:
        return self.window

    @property
    def pinned(self) -> int:
        return self.sink

    def keep(self, frames: Sequence[int], incoming: int) -> Kept:
        """Keep the first ``sink`` of the cached frames, then the most recent ``window - incoming - sink``.

        Args:
            frames: Absolute indices of the cached frames, in list order.
            incoming: Number of frames about to be computed.

        Returns:
            The indices kept, ascending.

        Raises:
            ValueError: The window cannot hold the sink and the incoming frames.
        """
        require(all(map(is_index, frames)), f"frames must be indices >= 0 of cached frames, got {list(frames)}")
        require(is_index(incoming, 1), f"incoming must be an int >= 1 frames, got {incoming!r}")
        recent, count = self.window - incoming - self.sink, len(frames)
        room = f"window must hold the sink ({self.sink}) and the incoming frames ({incoming}), got {self.window}"
        require(recent >= 0, room)
        return Kept(indices=(*range(min(self.sink, count)), *range(max(self.sink, count - recent), count)))
