"""What Triton compiles while something runs, and how long that takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton

from . import require_triton

require_triton()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One version of a kernel that was needed for the first time in this process."""

    kernel: str
    seconds: float
    cached: bool
    """whether it was in Triton's cache on disk already"""


@contextmanager
def watch_compiles(tell: Callable[[Compiled], None] | None = None) -> Iterator[list[Compiled]]:
    """Inside, the list grows with every version of a kernel that is compiled, or loaded from Triton's cache.

    Empty where Triton interprets its kernels: nothing compiles there.

    Args:
        tell: Called with each of them at once.
    """
    found: list[Compiled] = []
    before = triton.knobs.compilation.listener

    def listen(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **rest: Any) -> None:
        found.append(Compiled(kernel=metadata["name"], seconds=times.total / 1e6, cached=cache_hit))
        if tell is not None:
            tell(found[-1])
        if before is not None:
            before(metadata=metadata, times=times, cache_hit=cache_hit, **rest)

    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before
