"""The processes that compute one video, and how they reach each other: torch.distributed, NCCL on GPUs, gloo on CPUs.

Tensors go through ``torch.distributed``'s own collectives. The functional ones were tried: they live in a private
module whose names have changed between torch 2.6 and 2.13, allocate what they return, and buy what only torch.compile
needs; on two ranks of a CPU an exchange took 3.5 ms in place of 1.3. Messages go through gloo in any case, so that no
GPU waits for them.

A rank that ends takes the others with it. Its connections close, which ends what waits for them on a CPU; for what a
GPU waits for, and to say why, there is a word in the store that all ranks look at (``Vigil``).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from flexkern.parallel.errors import RankError

PATIENCE = timedelta(minutes=10)  # for a tensor of another rank: kernels are compiled meanwhile
FOREVER = timedelta(days=3650)  # for the next message: a server may have nothing to do
LOOKS = 0.5  # seconds between two looks at the store
GRACE = 5.0  # seconds for a rank to end by itself
WORD = "over"  # the entry of the store that ends all ranks

__all__ = ["Group", "Store", "TCPStore", "Vigil", "leave_at_once"]


@contextmanager
def stdout_aside() -> Iterator[None]:
    """What is printed on the process's stdout goes to its stderr.

    The gloo of torch 2.7 and 2.8 prints a line for each group that is made, where a video may be written to.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    with ExitStack() as ends:
        with suppress(OSError):  # of a process that has no stdout, or no stderr
            own = os.dup(1)
            ends.callback(os.close, own)
            os.dup2(2, 1)
            ends.callback(os.dup2, own, 1)
        yield


class Group:
    """The ranks, as one of them sees them.

    Args:
        store: Where they meet.
        rank: This one, from 0.
        ranks: How many there are.
        device: Where this one computes.

    Raises:
        RankError: Not all of them came.
    """

    def __init__(self, store: Store, *, rank: int, ranks: int, device: torch.device):
        self.rank, self.ranks, self.device = rank, ranks, device
        self.store = PrefixStore("flexkern", store)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with self._reaching(), stdout_aside():
            dist.init_process_group(
                backend, store=PrefixStore("groups", self.store), rank=rank, world_size=ranks, timeout=PATIENCE
            )
            # no DeviceMesh: over gloo it makes a group more in processes that see a GPU, for which others would wait
            self._tensors = dist.group.WORLD
            self._messages = dist.new_group(backend="gloo", timeout=FOREVER)

    def exchange(self, entries: Tensor) -> Tensor:
        """[ranks, ...], entry r for rank r -> [ranks, ...], entry r from rank r."""
        got = torch.empty_like(entries)
        with self._reaching():
            dist.all_to_all_single(got, entries, group=self._tensors)
        return got

    def gather(self, one: Tensor) -> list[Tensor] | None:
        """The tensors of all ranks, in order, on rank 0; None on others."""
        one = one.contiguous()
        got = [torch.empty_like(one) for _ in range(self.ranks)] if self.rank == 0 else None
        with self._reaching():
            dist.gather(one, got, dst=0, group=self._tensors)
        return got

    def scatter(self, each: list[Tensor] | None, into: Tensor) -> Tensor:
        """What rank 0 has for this one, in ``into``. each: None but on rank 0."""
        with self._reaching():
            dist.scatter(into, each, src=0, group=self._tensors)
        return into

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What rank 0 has, everywhere, in ``tensor``, which is contiguous."""
        with self._reaching():
            dist.broadcast(tensor, src=0, group=self._tensors)
        return tensor

    def tell(self, message: Any) -> None:
        """Every other rank gets the message of this one, rank 0; it is pickled."""
        with self._reaching():
            dist.broadcast_object_list([message], src=0, group=self._messages, device=torch.device("cpu"))

    def hear(self) -> Any:
        """The next message of rank 0; waits for it."""
        got = [None]
        with self._reaching():
            dist.broadcast_object_list(got, src=0, group=self._messages, device=torch.device("cpu"))
        return got[0]

    def end(self, why: str) -> None:
        """All ranks end; the first reason stays."""
        with self._reaching():
            self.store.compare_set(WORD, "", why)

    def why_over(self) -> str | None:
        """Why all ranks end; None where they go on."""
        try:
            return self.store.get(WORD).decode() if self.store.check([WORD]) else None
        except RuntimeError:
            return "rank 0 has ended"

    def close(self, *, lost: bool) -> None:
        """Let go of what reaches the others, and end the threads that carried it.

        One of these may still hold a tensor of the last message, and needs Python to let go of it: where Python has
        begun to end meanwhile, the process is aborted.

        Args:
            lost: A rank has ended, so that a GPU may wait for it for ever; NCCL is left alone then.
        """
        if lost and self.device.type == "cuda":
            dist.destroy_process_group(self._messages)
        else:
            dist.destroy_process_group()
            del self._tensors
        del self._messages

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Errors of the connection say which rank has ended, as soon as that is known."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            until = time.monotonic() + 4 * LOOKS
            while (why := self.why_over()) is None and time.monotonic() < until:
                time.sleep(LOOKS / 10)
            raise RankError(why or f"the connection to another rank is lost: {' '.join(str(error).split())}") from error


class Vigil:
    """A thread that looks whether all ranks are to end.

    Args:
        group: The ranks.
        leave: Called with the reason where this rank has not ended by itself in time.
        ended: Called at each look: why another rank has ended, where that is known here.
    """

    def __init__(
        self, group: Group, leave: Callable[[str], None], ended: Callable[[], str | None] = lambda: None
    ):  # fmt: skip
        self._group, self._leave, self._ended = group, leave, ended
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="flexkern-vigil", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOKS):
            if reason := self._ended():
                self._group.end(reason)
            if why := self._group.why_over():
                if not self._over.wait(GRACE):
                    self._leave(why)
                return


def leave_at_once(status: int) -> Callable[[str], None]:
    """Ends the process, whatever its other threads wait for."""
    return lambda _: os._exit(status)
