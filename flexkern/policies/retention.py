"""Retention: which cached frames stay visible when the next chunk is computed.

Source: FIFO windows of Self-Forcing, the sink of LongLive; FLEX pins one in a model trained without (2602.14027).
"""

from dataclasses import dataclass

from ..checks import check_fields, is_index, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkWindow:
    """Keeps the first frames for ever and the most recent ones as long as there is room."""

    sink: int
    """frames never evicted, 0 for plain FIFO"""
    window: int
    """frames attended in all, sink and current chunk included"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.sink >= 0, f"sink must be >= 0 frames, got {self.sink}")
        require(self.window > self.sink, f"window must exceed the sink of {self.sink} frames, got {self.window}")

    def keep(self, count: int, incoming: int) -> list[int]:
        """Indices, into the ordered list of ``count`` cached frames, of those visible to ``incoming`` new ones.

        They ascend: the first ``sink``, then the most recent ``window - incoming - sink``.
        Raises ValueError where the window cannot hold the sink and the incoming frames.
        """
        require(is_index(count), f"count must be an int >= 0 cached frames, got {count!r}")
        require(is_index(incoming, 1), f"incoming must be an int >= 1 frames, got {incoming!r}")
        recent = self.window - incoming - self.sink
        room = f"window must hold the sink ({self.sink}) and the incoming frames ({incoming}), got {self.window}"
        require(recent >= 0, room)
        return [*range(min(self.sink, count)), *range(max(self.sink, count - recent), count)]
