"""The ranks other than 0: each carries out what rank 0 tells it, until that says that it is over."""

import signal
from collections.abc import Sequence
from typing import Any

import torch

from flexkern.backends import Backend, get_backend
from flexkern.cache import FrameCache, Mix
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.parallel.errors import RankError
from flexkern.parallel.group import Group, Store, Vigil, leave_at_once
from flexkern.parallel.share import Share
from flexkern.parallel.split import Split

LOST = 1  # exit status where this rank, or another one, has failed


class Follower:
    """Carries out orders; each is a method, and its arguments are what ``Ranks.led`` was told.

    Args:
        group: The ranks, of which this is not number 0.
    """

    def __init__(self, group: Group):
        self.group = group
        self.shares: dict[int, Share] = {}
        self._model: CausalWan | None = None
        self._backend: Backend | None = None

    @torch.inference_mode()
    def follow(self) -> None:
        """Return when rank 0 says so. Raises what an order raises."""
        while True:
            order, told = self.group.hear()
            if order == "leave":
                return
            for video in told.pop("forgotten"):
                self.shares.pop(video, None)
            getattr(self, order)(**told)

    @torch.inference_mode(False)  # weights and pages outlive the mode they are made in
    def model(
        self, config: dict[str, Any], backend: str, weights: dict[str, tuple[torch.Size, torch.dtype]],
        precision: str, threads: int,
    ) -> None:  # fmt: skip
        """Have another model, and no video."""
        self.shares.clear()
        self._model = None  # one at a time
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        sizes = WanConfig(**config)
        with torch.device("meta"):
            model = CausalWan(sizes)
        state = {}
        for name, (shape, dtype) in weights.items():
            state[name] = self.group.broadcast(torch.empty(shape, dtype=dtype, device=self.group.device))
        model.load_state_dict(state, assign=True)
        self._model = model.eval().requires_grad_(False)
        if self.group.device.type == "cuda":
            self._model.stack_products()
        self._backend = get_backend(backend, self.group.device, head_dim=sizes.head_dim, dtype=model.dtype)

    @torch.inference_mode(False)
    def begin(self, video: int, sizes: dict[str, Any], rows: int, columns: int, eps: float) -> None:
        """Allocate the pages of a video."""
        assert self._model is not None and self._backend is not None, "a model comes before a video"
        group, heads = self.group, sizes.pop("heads")
        split = Split(ranks=group.ranks, rank=group.rank, heads=heads, rows=rows, columns=columns)
        cache = FrameCache(**sizes, heads=heads // group.ranks, device=group.device)
        self.shares[video] = Share(group, split, self._model, self._backend, cache, eps)

    def blend(self, video: int, mixes: Sequence[Mix]) -> None:
        """As ``Share.blend``."""
        self.shares[video].blend(mixes)

    @torch.inference_mode(False)
    def plan(self, video: int, tables: dict[str, Any], spared: int) -> None:
        """As ``Share.follow``."""
        self.shares[video].follow(tables, spared)

    def follow_text(self, video: int, forms: Sequence[Sequence[tuple[torch.Size, torch.dtype]]]) -> None:
        """Have another prompt: keys and values of every layer."""
        empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=self.group.device)
        self.shares[video].text = [
            tuple(self.group.broadcast(empty(shape, dtype)) for shape, dtype in layer) for layer in forms
        ]

    def run(self, video: int, shape: torch.Size, dtype: torch.dtype, timestep: float, keys_only: bool) -> None:
        """Run this rank's part of a pass."""
        latents = self.group.broadcast(torch.empty(shape, dtype=dtype, device=self.group.device))
        self.shares[video].run(latents, timestep, keys_only=keys_only)

    def save(self, video: int, name: str, slots: Sequence[int]) -> None:
        """As ``Share.save``."""
        self.shares[video].save(name, slots)

    @torch.inference_mode(False)
    def load(self, video: int, name: str, slots: Sequence[int]) -> None:
        """As ``Share.load``."""
        self.shares[video].load(name, slots, None)


def follow(store: Store, *, rank: int, ranks: int, device: torch.device) -> int:
    """Be a rank that rank 0 leads, and return the exit status when it is over.

    Signals that would stop a render are for rank 0: it finishes what it must, and then this one ends. Should rank 0 end
    without a word, so does this process, at once and in whatever it is.

    Args:
        store: Where the ranks meet.
        rank: This one, at least 1.
        ranks: How many there are.
        device: Where this one computes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        group = Group(store, rank=rank, ranks=ranks, device=device)
    except RankError:
        return LOST
    vigil, lost = Vigil(group, leave_at_once(LOST)), True
    try:
        Follower(group).follow()
        lost = False
    except RankError:  # rank 0 knows, or is gone
        return LOST
    except BaseException as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        group.end(f"rank {rank} of {ranks} has failed: {told}")
        raise
    finally:
        vigil.stop()
        group.close(lost=lost)
    return 0
