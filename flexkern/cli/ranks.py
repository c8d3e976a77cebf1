"""``flexkern render`` on several GPUs: by --gpus, which starts the ranks, or under torchrun, which has started them.

Rank 0 is the command. The others read no option, write no file and print nothing; what becomes of them it says.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexkern.checks import require
from flexkern.cli.errors import note
from flexkern.render import status

if TYPE_CHECKING:
    from flexkern.model.wan import WanConfig
    from flexkern.parallel import Ranks
    from flexkern.policies import Preset

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process


def torchrun_rank() -> int:
    """This process's rank under torchrun; 0 where there is no torchrun."""
    return int(os.environ["RANK"]) if torchrun_count() > 1 else 0


def torchrun_count() -> int:
    """How many processes torchrun has started; 1 where there is no torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1


def follow_torchrun() -> int:
    """Compute what rank 0 says, and return the exit status when that is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 stops, and says so
    from flexkern.parallel import join_ranks

    try:
        join_ranks(os.environ)
    except OSError:  # rank 0 has ended, and has said why
        return status.FAILED
    raise AssertionError("only rank 0 comes back from there")


def count_ranks(gpus: int | None) -> int:
    """How many ranks render: --gpus, or the processes of torchrun. Raises ValueError where these are not as many."""
    started = torchrun_count()
    require(gpus in (None, started) or started == 1, f"--gpus {gpus}: torchrun has started {started} processes")
    return max(gpus or 1, started)


def validate_count(
    count: int, device: str, config: "WanConfig", size: tuple[int, int], presets: Iterable["Preset"]
) -> None:
    """Raises ValueError where so many ranks cannot share a model, or have no GPU each.

    Args:
        count: Of ranks.
        device: Of --device.
        config: Of the model.
        size: Height and width of its latent frames.
        presets: What runs on them.
    """
    if count == 1:
        return
    from flexkern.parallel import validate_gpus, validate_preset, validate_shares

    called = "--gpus" if torchrun_count() == 1 else "the number of torchrun's processes"
    for preset in presets:
        validate_preset(preset, count, called=called)
    validate_shares(config, size, count, called=called)
    if torchrun_count() == 1:
        validate_gpus(count, device, called=called)


@contextmanager
def open_ranks(count: int, device: str) -> Iterator["Ranks | None"]:
    """The ranks that render, none for one. Raises RankError, an OSError, where one of them does not come."""
    if count == 1:
        yield None
        return
    from flexkern.parallel import join_ranks, start_ranks

    if torchrun_count() > 1:
        ranks = join_ranks(os.environ, device, leave=leave)
    else:
        ranks = start_ranks(count, device, leave=leave)
    with ranks:
        yield ranks


def leave(why: str) -> None:
    """End a render that waits for a GPU whose rank is gone; what it has written can be gone on with."""
    note(f"error: {why}")
    os._exit(status.CAN_RESUME)
