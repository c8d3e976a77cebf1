"""More than one GPU for one video: attention by heads, everything else by rectangles of the frame.

with start_ranks(4) as ranks:
    engine = Engine.from_pretrained("Self-Forcing", device="cuda", ranks=ranks)
    for chunk in engine.session("a cat walks on grass", preset="flex"): ...

Rank 0 is the process that asks; the others compute what it tells them. See flexkern/docs/parallel.md. A name is
imported from its module when it is first asked for: there are builds of torch without torch.distributed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkern.parallel.errors import RankError
    from flexkern.parallel.launch import join_ranks, start_ranks, validate_gpus
    from flexkern.parallel.lead import Ranks
    from flexkern.parallel.split import fitting_ranks, validate_preset, validate_shares

__all__ = ["RankError", "Ranks", "fitting_ranks", "join_ranks", "start_ranks", "validate_gpus", "validate_preset"]
__all__ += ["validate_shares"]

_HOMES = {  # module: what it holds
    "errors": ("RankError",),
    "launch": ("join_ranks", "start_ranks", "validate_gpus"),
    "lead": ("Ranks",),
    "split": ("fitting_ranks", "validate_preset", "validate_shares"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"flexkern.parallel.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
