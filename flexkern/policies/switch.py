"""Switch policies: what a change of prompt does to the cached frames."""

from dataclasses import dataclass, replace
from typing import Literal

from ..checks import check_fields, require

FLUSHED = 2  # frames that Infinity-RoPE keeps beside its sink, whatever its window


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchPolicy:
    """What a change of prompt does to the cached frames."""

    kind: Literal["keep", "recache", "flush"] = "keep"
    """keep: nothing; recache: run the last frames through the model again, with the new prompt; flush: drop all but the
    sink and the last frames"""
    recent: int | None = None
    """how many of the last frames recache runs again, or flush keeps. None: recache runs as many as the window holds,
    as LongLive does; flush keeps 2, as Infinity-RoPE does"""
    keep_sink: bool = True
    """whether a recache leaves the sink of the old prompt in place (LongLive's global_sink). If not, only frames that
    are run again stay, and the first of them become the sink. Where those are all frames of the video so far, the sink
    is run again either way"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.recent is None or self.recent >= 1, f"recent must be at least 1 frame, got {self.recent}")

    def resolve(self, window: int) -> "SwitchPolicy":
        """The same with ``recent`` as it is in use beside a window of so many frames; None where nothing uses it."""
        in_use = {"keep": None, "recache": window, "flush": min(FLUSHED, window)}[self.kind]
        return self if in_use is None or self.recent else replace(self, recent=in_use)
