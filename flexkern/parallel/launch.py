"""How ranks come to be: ``start_ranks`` starts them beside this process, ``join_ranks`` finds those of torchrun."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from torch.distributed.rendezvous import rendezvous

from flexkern.checks import require, whole
from flexkern.parallel.errors import RankError
from flexkern.parallel.follow import LOST, follow
from flexkern.parallel.group import Group, Store, TCPStore, leave_at_once
from flexkern.parallel.lead import Ranks

HERE = "127.0.0.1"
COME = 300.0  # seconds for a process to start and load torch, on a machine that is busy
KIND = "device"  # the entry of the store that says what rank 0 computes on


class Processes:
    """The ranks other than 0, as processes of this machine.

    Args:
        ranks: How many there are, with rank 0.
        kind: cpu, or cuda, of which each has one.
        port: Where they meet.
    """

    def __init__(self, ranks: int, kind: str, port: int):
        self.ranks = ranks
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self._said = {rank: tempfile.TemporaryFile() for rank in range(1, ranks)}  # noqa: SIM115 - closed in clear
        for rank, said in self._said.items():
            words = ["--port", str(port), "--rank", str(rank), "--ranks", str(ranks), "--device", kind]
            # in a session of its own: Ctrl-C at the terminal is for rank 0
            self.started[rank] = subprocess.Popen(
                [sys.executable, "-m", "flexkern.parallel", *words],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> str | None:
        """Why one of them has ended; None where all go on."""
        for rank, process in self.started.items():
            if (status := process.poll()) not in (None, 0):
                return f"rank {rank} of {self.ranks} has ended, {self._how(rank, status)}"
        return None

    def clear(self, *, at_once: bool) -> None:
        """None of them is left. at_once: do not wait for those that were told to end, some may not have heard it."""
        until = time.monotonic() + (0.0 if at_once else 10.0)
        for process in self.started.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for said in self._said.values():
            said.close()

    def _how(self, rank: int, status: int) -> str:
        said = self._said[rank]
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        how = f"killed by signal {-status}" if status < 0 else f"with status {status}"
        return f"{how}: {lines[-1]}" if lines and status > 0 else how


def start_ranks(
    count: int, device: str | torch.device = "cuda", *, leave: Callable[[str], None] | None = None
) -> Ranks:
    """Start ranks 1 to count - 1 on this machine, and lead them. Use it in a ``with``, or ``close`` it.

        with start_ranks(4) as ranks:
            engine = Engine.from_pretrained("Self-Forcing", device="cuda", ranks=ranks)

    Args:
        count: How many ranks, with this process: one for each GPU, or on a CPU any number, for trying it.
        device: cuda, of which rank r takes number r, or cpu.
        leave: What a rank that waits for a GPU does when another one has ended; by default its process ends, with what
            happened on stderr.

    Raises:
        ValueError: There are fewer GPUs.
        RankError: A rank ended before it had begun.
    """
    kind = torch.device(device).type
    validate_gpus(count, device, called="count")
    store = TCPStore(HERE, 0, None, True, wait_for_workers=False)
    processes = Processes(count, kind, store.port)
    try:
        _await([f"here{rank}" for rank in processes.started], store, processes.ended)
        own = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        group = Group(store, rank=0, ranks=count, device=own)
    except BaseException:
        processes.clear(at_once=True)
        raise
    return Ranks(group, leave=leave or _say_and_leave, ended=processes.ended, clear=processes.clear)


def validate_gpus(count: int, device: str | torch.device, *, called: str) -> None:
    """Raises ValueError where that many ranks have no device each. called: what the user calls the number."""
    whole(called, count, 1)
    one = torch.device(device)
    require(one.index is None, f"{called} {count} takes the GPUs from 0 on: the device must be cuda or cpu, got {one}")
    if one.type == "cuda":
        there = torch.cuda.device_count()
        require(count <= there, f"{called} must be at most the {there} GPUs of this machine, got {count}")


def join_ranks(
    environment: Mapping[str, str], device: str | None = None, *, leave: Callable[[str], None] | None = None
) -> Ranks:
    """Find the ranks that torchrun has started, of which this is number 0, and lead them; or follow, if it is not.

    Args:
        environment: Where torchrun says who and where they are.
        device: cuda or cpu, on rank 0. The others learn it from that.
        leave: As ``start_ranks``'s.

    Raises:
        SystemExit: This is not rank 0, and it is over.
        RankError: Not all of them came.
    """
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=COME)))
    if rank > 0:
        _await([KIND], store, lambda: None, seconds=float("inf"))
        kind = store.get(KIND).decode()
    else:
        assert device is not None, "rank 0 says what all compute on"
        kind = torch.device(device).type
        store.set(KIND, kind)
    own = torch.device(kind, int(environment["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if rank > 0:
        raise SystemExit(follow(store, rank=rank, ranks=count, device=own))
    return Ranks(Group(store, rank=0, ranks=count, device=own), leave=leave or _say_and_leave)


def main(argv: list[str]) -> int:
    """Be one of the ranks that ``start_ranks`` starts. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flexkern.parallel", description="a rank that start_ranks starts")
    for name in ("port", "rank", "ranks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    given = parser.parse_args(argv)
    try:
        store = TCPStore(HERE, given.port, None, False)
        store.set(f"here{given.rank}", "")
    except RuntimeError:  # rank 0 has ended meanwhile
        return LOST
    device = torch.device("cuda", given.rank) if given.device == "cuda" else torch.device("cpu")
    return follow(store, rank=given.rank, ranks=given.ranks, device=device)


def _await(names: list[str], store: Store, ended: Callable[[], str | None], *, seconds: float = COME) -> None:
    """Return when all these entries are in the store. Raises RankError where they do not come."""
    until = time.monotonic() + seconds
    while not store.check(names):
        if why := ended():
            raise RankError(why)
        if time.monotonic() > until:
            raise RankError(f"not all ranks have come in {seconds:g} seconds")
        time.sleep(0.05)


def _say_and_leave(why: str) -> None:
    print(f"flexkern: error: {why}", file=sys.stderr, flush=True)
    leave_at_once(LOST)(why)
