"""Rank 0: it makes the video, and tells the others what to compute of it.

The loop, policies, noise, text encoder, decoder and files are on rank 0 alone, as if there were no other. What a
session asks of its transformer and its window goes to all ranks: a plan, a prompt's keys and values, a pass. So there
is nothing that ranks could disagree about, and a state is that of a session on one rank.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexkern.backends import Backend
from flexkern.cache import FrameCache, Mix
from flexkern.checks import require
from flexkern.graphs import Passes
from flexkern.memory import PagedMemory
from flexkern.model.protocols import VideoModel
from flexkern.model.wan import CausalWan, TextKV
from flexkern.parallel.errors import RankError
from flexkern.parallel.group import Group, Vigil
from flexkern.parallel.share import Share, tables_of
from flexkern.parallel.split import Split, validate_preset, validate_shares
from flexkern.plan import ChunkPlan
from flexkern.policies import Preset
from flexkern.window import CacheWindow

LAUNCHED = "passes over several ranks are launched: their exchanges have not been captured on a GPU yet"


class Ranks:
    """The ranks that compute a video together, for the one that leads them; see ``flexkern.parallel.start_ranks``.

    Args:
        group: The ranks, of which this is number 0.
        leave: Called with the reason where another rank has ended and this one waits for a GPU, which never returns.
        ended: As ``Vigil``'s.
        clear: Called at the end, when the others were told; ``at_once`` is whether some may not have heard it.

    Attributes:
        count: How many there are.
        device: Where this one computes; the others' are of the same kind.
    """

    def __init__(
        self, group: Group, *, leave: Callable[[str], None], ended: Callable[[], str | None] = lambda: None,
        clear: Callable[..., None] = lambda at_once: None,
    ):  # fmt: skip
        self.group, self.count, self.device = group, group.ranks, group.device
        self._vigil, self._clear = Vigil(group, self._left_waiting, ended), clear
        self._leave = leave
        self._model: CausalWan | None = None
        self._videos, self._forgotten = 0, list[int]()
        self._lost: str | None = None
        self._closed = False
        self._one_order = threading.RLock()  # sessions on several threads take turns, pass by pass

    def __repr__(self) -> str:
        return f"Ranks({self.count} on {self.device.type}{', lost' if self._lost else ''})"

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def lost(self) -> str | None:
        """Why they compute nothing any more; None where they do."""
        return self._lost or self.group.why_over()

    def _left_waiting(self, why: str) -> None:
        if self.device.type == "cuda" and self._lost is None:  # on a CPU the connection's end has told it already
            self._leave(why)

    def close(self) -> None:
        """The other ranks end."""
        if self._closed:
            return
        self._closed = True
        why = self.lost
        try:
            if why is None:
                self.group.tell(("leave", {}))
            else:
                self.group.end(why)
        except RankError:  # they have ended already
            pass
        self._lost = why or "the ranks have been closed"
        self._vigil.stop()
        self._clear(at_once=why is not None)
        self.group.close(lost=why is not None)

    def share(self, model: VideoModel, backend: str, size: tuple[int, int]) -> None:
        """Every rank gets the model, in place of the one that they had; sessions of that one end.

        Args:
            model: Whole, on this rank; its weights travel.
            backend: A key of ``flexkern.backends.BACKENDS``.
            size: Height and width of the latent frames that most sessions will have.

        Raises:
            NotImplementedError: It is not flexkern's own transformer.
            ValueError: It is not where the ranks compute, or they cannot share its heads and tokens evenly.
            RankError: Another rank has ended.
        """
        if type(model) is not CausalWan:
            raise NotImplementedError(f"only flexkern's own transformer is shared by ranks, got {type(model).__name__}")
        kinds = torch.device(model.device).type, self.device.type
        require(kinds[0] == kinds[1], f"the model must be on {kinds[1]}, where the ranks compute, got {kinds[0]}")
        validate_shares(model.config, size, self.count)
        weights = model.state_dict()
        told = {
            "config": model.config.to_dict(), "backend": backend, "threads": torch.get_num_threads(),
            "weights": {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()},
            "precision": torch.get_float32_matmul_precision(),
        }  # fmt: skip
        self._model = model
        with self.led("model", **told):
            for tensor in weights.values():
                self.group.broadcast(tensor.contiguous())

    def begin(self, model: VideoModel) -> "Led":
        """What a session of the model is led by. Raises ValueError where the ranks have another model by now."""
        if model is not self._model:
            raise ValueError("the ranks have the model of an engine that was made later: begin a session of that one")
        self._videos += 1
        return Led(self, self._videos, self._model)

    def forget(self, video: int) -> None:
        """The others let go of a video, at the next message."""
        self._forgotten.append(video)

    @contextmanager
    def led(self, order: str, **told: Any) -> Iterator[None]:
        """The others carry out an order, and this rank its part of it in the block.

        Raises:
            RankError: Another rank has ended, or one did while orders were carried out before.
        """
        with self._one_order:
            if self._lost is not None:
                raise RankError(self._lost)
            try:
                forgotten, self._forgotten = self._forgotten, []
                self.group.tell((order, told | {"forgotten": forgotten}))
                yield
            except RankError as error:
                self._lost = str(error)
                raise
            except BaseException as error:
                self._lost = f"rank 0 left the others in the middle of a pass: {type(error).__name__} {error}".rstrip()
                raise


class Led:
    """One video over ranks: its passes and its window.

    Args:
        ranks: All of them.
        video: Its number.
        model: The transformer.
    """

    def __init__(self, ranks: Ranks, video: int, model: CausalWan):
        self.ranks, self.video, self.model = ranks, video, model
        self.share: Share | None = None

    def window(self, preset: Preset, backend: Backend, **sizes: Any) -> "LedWindow":
        """As ``CacheWindow``. Raises ValueError where the ranks cannot share the frames' tokens evenly."""
        return LedWindow(self, preset, backend, **sizes)

    def passes(self) -> "LedPasses":
        """As ``flexkern.graphs.Passes``."""
        return LedPasses(self)

    @contextmanager
    def told(self, order: str, **told: Any) -> Iterator[Share]:
        """As ``Ranks.led``, of this video. Yields this rank's share."""
        if self.share is None or self.model is not self.ranks._model:
            raise ValueError("the ranks have the model of an engine that was made later: this session is over")
        with self.ranks.led(order, video=self.video, **told):
            yield self.share


class LedPasses(Passes):
    """Runs the passes of one session on all ranks."""

    def __init__(self, led: Led):
        super().__init__(led.model, unwanted=LAUNCHED)
        self._led = led
        self._told: TextKV | None = None

    def hold(self, text: TextKV) -> TextKV:
        """The prompt; every rank gets it with the next pass."""
        return text

    def __call__(
        self, latents: Tensor, timestep: float, text: TextKV, memory: PagedMemory, *, keys_only: bool = False
    ) -> Tensor | None:
        """As ``Passes``."""
        if text is not self._told:
            self._tell(text)
        latents = latents.contiguous()
        about = {"shape": latents.shape, "dtype": latents.dtype}
        with self._led.told("run", timestep=timestep, keys_only=keys_only, **about) as share:
            assert memory is share.memory, "a pass is of the chunk that was planned last"
            return share.run(self._led.ranks.group.broadcast(latents), timestep, keys_only=keys_only)

    def _tell(self, text: TextKV) -> None:
        forms = [[(tensor.shape, tensor.dtype) for tensor in layer] for layer in text]
        with self._led.told("follow_text", forms=forms) as share:
            for layer in text:
                for tensor in layer:
                    self._led.ranks.group.broadcast(tensor.contiguous())
            share.text = self._told = text


class LedCache(FrameCache):
    """The pages of this rank's heads. Its state holds those of all ranks, so that any number of them can go on."""

    def __init__(self, led: Led, split: Split, **sizes: Any):
        super().__init__(**sizes | {"heads": sizes["heads"] // split.ranks})
        self.heads = sizes["heads"]
        self._led: Led = weakref.proxy(led)  # whose share holds this cache: pages go when the session does

    def _copied(self, pages: Tensor) -> Tensor:
        with self._led.told("save", name=self._name(pages), slots=self.slots) as share:
            held = share.save(self._name(pages), self.slots)
        assert held is not None, "rank 0 gets what is saved"
        return held

    def _fill(self, pages: Tensor, held: Tensor) -> None:
        with self._led.told("load", name=self._name(pages), slots=self.slots) as share:
            share.load(self._name(pages), self.slots, held)

    def _name(self, pages: Tensor) -> str:
        return "keys" if pages is self.keys else "values"


class LedWindow(CacheWindow):
    """A window whose plans every rank follows, each with its own heads."""

    def __init__(self, led: Led, preset: Preset, backend: Backend, **sizes: Any):
        validate_preset(preset, led.ranks.count)
        self._led, self._sizes = led, sizes
        super().__init__(preset, backend, **sizes)

    def _allocate(self, **sizes: Any) -> FrameCache:
        led, group = self._led, self._led.ranks.group
        split = Split(
            ranks=group.ranks, rank=0, heads=sizes["heads"], rows=self._sizes["rows"], columns=self._sizes["columns"]
        )
        cache = LedCache(led, split, **sizes)
        led.share = Share(group, split, led.model, self.backend, cache, self.eps)
        shape = {name: size for name, size in sizes.items() if name != "device"}
        place = {"rows": split.rows, "columns": split.columns, "eps": self.eps}
        with led.told("begin", sizes=shape, **place):
            pass
        weakref.finalize(cache, led.ranks.forget, led.video)
        return cache

    def _blend(self, mixes: Sequence[Mix]) -> None:
        with self._led.told("blend", mixes=mixes) as share:
            share.blend(mixes)

    def _attend_by(self, plan: ChunkPlan, slots: Sequence[int]) -> PagedMemory:
        spared = next((i for i, slot in enumerate(slots) if slot >= 0), len(slots))
        assert min(slots[spared:], default=0) >= 0, "frames that are not kept come first"
        tables = tables_of(plan)
        with self._led.told("plan", tables=tables, spared=spared) as share:
            return share.follow(tables, spared)
