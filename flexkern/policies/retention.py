"""Retention: which cached frames stay visible when the next chunk is computed.

Source: FIFO windows of Self-Forcing, the sink of LongLive; FLEX pins one in a model trained without (2602.14027).
Merged frames: Reward-Forcing (2512.04678), whose code puts frames that leave in place of the sink where they are not as
many as that; here they are merged too. MemRoPE (2603.12513), without the adaptive rates that its code can be asked for.
Sweeps: Rolling Sink (2602.07775). Chosen tokens: Deep Forcing (2512.05081).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from ..checks import check_fields, is_index, require

MEMORY = 2  # frames of MemRoPE's memory: a slow one and a fast one


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A page that is computed before the chunk: the weighted sum of cached pages, of keys as of values."""

    frame: int
    """absolute index of the frame that it counts as"""
    indices: tuple[int, ...]
    """of the pages in the list"""
    weights: tuple[float, ...]
    averaged: tuple[int, ...] = ()
    """those of the indices of which every token is the mean of the frame's tokens, of keys before they are turned"""

    def __post_init__(self) -> None:
        check_fields(self)
        counts = len(self.indices), len(self.weights)
        require(counts[0] == counts[1] > 0, f"a blend needs a weight for each index, got {counts[1]} for {counts[0]}")
        foreign = sorted({*self.averaged} - {*self.indices})
        require(not foreign, f"averaged must be among the indices {list(self.indices)}, got {foreign}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTokens:
    """A page of single tokens, chosen in the first pass of the chunk; several that are equal are chosen together."""

    frame: int
    """absolute index of the frame that it counts as"""
    indices: tuple[int, ...]
    """of the pages in the list whose tokens are candidates"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.indices) > 0, "a choice needs candidates, got none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What becomes of a list of cached frames."""

    pages: tuple[int | Blend | ChosenTokens, ...]
    """the list that is left: the index, into that list, of a page that stays, or one that is computed"""
    seen: tuple[int, ...] | None = None
    """indices into the list that is left, of the pages that attention sees, in the order in which it lists them; one
    may come twice. None: all, as they are listed. Frames that are computed next come behind them"""

    def __post_init__(self) -> None:
        check_fields(self)


@runtime_checkable
class RetentionPolicy(Protocol):
    """What a cache asks of a retention policy; a policy is a frozen dataclass, so that its fields can be overridden."""

    @property
    def capacity(self) -> int:
        """The most frames attended at once, the current chunk included."""

    @property
    def pages(self) -> int:
        """Pages that a cache needs, at least ``capacity``."""

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
    evicted: Literal["drop", "sink", "memory", "sweep", "choose"] = "drop"
    """what becomes of frames that are no longer among the most recent. drop: nothing, they are gone; sink: the i-th of
    those that leave is merged into frame i mod sink of the sink (Reward-Forcing); memory: they are merged into two
    frames behind the sink, which count to the window and take the places of the two that are dropped when the first
    ones leave (MemRoPE); sweep: attention sees the last window - sink frames as they are, and in the places of older
    ones those of the sink, from the first to the last and back (Rolling Sink); choose: of a full window ``budget``
    frames are left: the sink, the last ``recent``, and between them as many single tokens as fill the rest, which the
    queries of the last ``recent`` frames choose in each layer (Deep Forcing)"""
    sink_rate: float = 0.001
    """evicted sink: the share of a frame that leaves in the sum"""
    slow_rate: float = 0.01
    """evicted memory: the share of frames that leave in the first memory frame"""
    fast_rate: float = 0.1
    """evicted memory: the share of frames that leave in the second memory frame"""
    average: Literal["tokens", "frames"] = "tokens"
    """evicted memory: the mean of frames that leave. tokens: over all their tokens, the same at every place, as
    MemRoPE's code takes it; frames: of each place over the frames"""
    budget: int = 16
    """evicted choose: frames that are left of a full window, those being computed included"""
    recent: int = 4
    """evicted choose: the last frames, those being computed included, which stay whole and whose queries choose"""
    reuse: int = 7
    """evicted choose: how many times a token may be chosen, one after the other, before all that were chosen less
    often"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.sink >= 0, f"sink must be >= 0 frames, got {self.sink}")
        require(self.window > self.sink, f"window must exceed the sink of {self.sink} frames, got {self.window}")
        needs = self.evicted in ("sink", "sweep", "choose")
        require(self.sink > 0 or not needs, f"evicted {self.evicted!r} needs a sink of at least 1 frame, got 0")
        for name in ("sink_rate", "slow_rate", "fast_rate"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("budget", "recent", "reuse"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        if self.evicted == "choose":
            least, told = self.sink + self.recent, f"the sink ({self.sink}) and the recent frames ({self.recent})"
            fits = least < self.budget <= self.window
            require(fits, f"budget must exceed {told} and fit into the window of {self.window}, got {self.budget}")

    @property
    def capacity(self) -> int:
        return self.window

    @property
    def pages(self) -> int:
        more = {"sweep": self.window - self.sink, "choose": self.budget - self.sink}  # shown again; left, until chosen
        return self.window + more.get(self.evicted, 0)

    @property
    def pinned(self) -> int:
        return self.sink

    def keep(self, frames: Sequence[int], incoming: int) -> Kept:
        """Keep the head of the list, then the most recent frames; what becomes of those between them says ``evicted``.

        Args:
            frames: Absolute indices of the cached frames, in list order. Two equal ones behind the sink are the memory.
            incoming: Number of frames about to be computed.

        Returns:
            Those kept, in their order.

        Raises:
            ValueError: The window cannot hold the sink, the memory and the incoming frames.
        """
        require(all(map(is_index, frames)), f"frames must be indices >= 0 of cached frames, got {list(frames)}")
        require(is_index(incoming, 1), f"incoming must be an int >= 1 frames, got {incoming!r}")
        memory = MEMORY if self.evicted == "memory" else 0
        head = self.sink + memory
        held = f"the sink ({self.sink}), the memory ({memory})" if memory else f"the sink ({self.sink})"
        room = self.window - incoming
        told = f"window must hold {held} and the incoming frames ({incoming}), got {self.window}"
        require(room >= head, told)
        count = len(frames)
        if self.evicted == "sweep":
            return self._swept(frames, incoming)
        if self.evicted == "choose":
            return self._chosen(frames, incoming)
        leave = range(head, head + count - room)
        if not leave:
            return Kept(pages=tuple(range(count)))
        stay = (*range(leave.stop, count),)
        if self.evicted == "sink":
            return Kept(pages=(*(self._merged(frames, i, leave[i :: self.sink]) for i in range(self.sink)), *stay))
        if self.evicted == "memory":
            return Kept(pages=(*range(self.sink), *self._remembered(frames, leave), *stay))
        return Kept(pages=(*range(self.sink), *stay))

    def _merged(self, frames: Sequence[int], own: int, leave: Sequence[int]) -> int | Blend:
        """A frame of the sink with the frames that are merged into it, one after the other."""
        if not leave:
            return own
        left = 1 - self.sink_rate
        weights = (left ** len(leave), *(self.sink_rate * left ** (len(leave) - 1 - i) for i in range(len(leave))))
        return Blend(frame=frames[own], indices=(own, *leave), weights=weights)

    def _remembered(self, frames: Sequence[int], leave: Sequence[int]) -> tuple[Blend, Blend]:
        """The memory: what it held before, if that was anything, and the mean of the frames that leave."""
        first = self.sink
        begun = frames[first] == frames[first + 1]
        averaged = tuple(leave) if self.average == "tokens" else ()

        def blend(own: int, rate: float) -> Blend:
            rate = rate if begun else 1.0
            before, weights = ((own,), (1 - rate,)) if begun else ((), ())
            each = (rate / len(leave),) * len(leave)
            indices = (*before, *leave)
            return Blend(frame=frames[leave[-1]], indices=indices, weights=(*weights, *each), averaged=averaged)

        return blend(first, self.slow_rate), blend(first + 1, self.fast_rate)

    def _chosen(self, frames: Sequence[int], incoming: int) -> Kept:
        """All of them, or where they are too many the sink, pages of chosen tokens, and the last frames."""
        count, recent = len(frames), self.recent - incoming
        require(recent >= 0, f"retention.recent must be at least the incoming frames ({incoming}), got {self.recent}")
        if count + incoming <= self.window:
            return Kept(pages=tuple(range(count)))
        choice = ChosenTokens(frame=frames[0], indices=tuple(range(self.sink, count - recent)))
        chosen = (choice,) * (self.budget - self.sink - self.recent)
        return Kept(pages=(*range(self.sink), *chosen, *range(count - recent, count)))

    def _swept(self, frames: Sequence[int], incoming: int) -> Kept:
        """The sink and the last frames; places between them that the window has show frames of the sink again."""
        first, end = (frames[0], frames[-1] + 1) if frames else (0, 0)
        recent = end - (self.window - self.sink)
        pages = tuple(i for i, frame in enumerate(frames) if frame < first + self.sink or frame >= recent)
        at = {frames[page]: index for index, page in enumerate(pages)}
        places = range(max(first, end + incoming - self.window), end)
        return Kept(pages=pages, seen=tuple(at[p if p >= recent else first + self._turned(p - first)] for p in places))

    def _turned(self, place: int) -> int:
        """The frame of the sink that stands for a place of the video, from 0: up, and down again."""
        sweep, step = divmod(place, self.sink)
        return self.sink - 1 - step if sweep % 2 else step
