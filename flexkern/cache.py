"""Storage for keys and values of past frames: one page holds one frame of one layer.

Pages never move. What a policy changes from chunk to chunk is the ordered list of the frames in them; eviction hands a
slot back. Keys are stored normalised and turned by place only (``kernels.reference.norm_rope_write``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexkern.kernels.reference import pad_turn, rotate
from flexkern.policies import Blend, ChosenTokens
from flexkern.state import State

TOGETHER = 8  # layers whose pages are blended at once: few launches, little memory


@dataclass(frozen=True, slots=True)
class Page:
    """A page in use: ``slot`` is its index, ``frame`` the absolute index of the latent frame that it holds."""

    frame: int
    slot: int


class LayerPages(NamedTuple):
    """What belongs to the pages of one layer, [B, P, S, H, D] each."""

    keys: Tensor
    values: Tensor


class Mix(NamedTuple):
    """A page to be computed, by slots: what ``policies.Blend`` asks for."""

    slot: int
    sources: list[int]
    weights: list[float]
    averaged: list[bool]


class Pick(NamedTuple):
    """Pages whose tokens are to be chosen together: what ``policies.ChosenTokens`` asks for."""

    slots: list[int]
    frame: int
    sources: list[Page]


class FrameCache:
    """Pages of every layer, and the ordered list of frames in them.

    keys, values: [L, B, P, S, H, D]. listed: the occupied pages, the sink first. seen: indices into ``listed`` of those
    that attention sees, in the order in which it lists them; None for all. heads: H.
    """

    def __init__(
        self, *, layers: int, batch: int, pages: int, tokens: int, heads: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        shape = layers, batch, pages, tokens, heads, head_dim
        if min(shape) < 1:
            raise ValueError(f"every size of a cache must be at least 1, got [L, B, P, S, H, D] = {list(shape)}")
        self.heads = heads
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.listed: list[Page] = []
        self.seen: list[int] | None = None
        self._free = list(range(pages))

    @property
    def frames(self) -> list[int]:
        """Absolute indices of the cached frames, in list order."""
        return [page.frame for page in self.listed]

    @property
    def slots(self) -> list[int]:
        """Slots of the cached frames, in list order."""
        return [page.slot for page in self.listed]

    @property
    def attended(self) -> list[Page]:
        """The pages that attention sees, in the order in which it lists them."""
        return self.listed if self.seen is None else [self.listed[i] for i in self.seen]

    @property
    def bytes(self) -> int:
        """Size of all pages of all layers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def pages(self, layer: int) -> LayerPages:
        """Everything that belongs to the pages of a layer, as views."""
        return LayerPages(self.keys[layer], self.values[layer])

    def keep(
        self, pages: Sequence[int | Blend | ChosenTokens], seen: Sequence[int] | None = None
    ) -> tuple[list[Mix], Pick | None]:
        """Keep the pages at these indices of ``listed``, in this order, with pages to be computed between them.

        The slots of all others are free, but those of pages to choose from until the next call.

        Args:
            pages: As ``policies.Kept`` has them.
            seen: As the attribute, of what is left.

        Returns:
            What must be computed, with ``blend``, before anything is written; and what must be chosen.
        """
        before = self.listed
        wanted = {i for page in pages if isinstance(page, ChosenTokens) for i in page.indices}
        whole = [page for page in pages if not isinstance(page, Blend | ChosenTokens)]
        stay = {before[i].slot for i in (*whole, *wanted)}
        self._free = [slot for slot in range(self.keys.shape[2]) if slot not in stay]
        self.listed, self.seen, mixes, pick = [], None, list[Mix](), None
        for page in pages:
            if isinstance(page, Blend):
                sources = [before[i].slot for i in page.indices]
                averaged = [i in page.averaged for i in page.indices]
                mixes.append(Mix(self.allocate([page.frame])[0], sources, list(page.weights), averaged))
            elif isinstance(page, ChosenTokens):
                pick = pick or Pick([], page.frame, [before[i] for i in page.indices])
                pick.slots.extend(self.allocate([page.frame]))
            else:
                self.listed.append(before[page])
        self.seen = None if seen is None else list(seen)
        return mixes, pick

    def blend(self, mixes: Sequence[Mix], place_turn: Tensor) -> None:
        """Compute pages from others of every layer, in float32 or better; all are read before one is written.

        place_turn: [S, D / 2 - T, 2], the turns that keys are stored with.
        """
        turn = pad_turn(place_turn, self.keys.shape[-1] // 2, front=True)[:, None]  # [S, 1, D / 2, 2]
        for keys, values in zip(self.keys.split(TOGETHER), self.values.split(TOGETHER), strict=True):
            made = [(_mixed(keys, mix, turn), _mixed(values, mix, None)) for mix in mixes]
            for mix, (key, value) in zip(mixes, made, strict=True):
                keys[:, :, mix.slot], values[:, :, mix.slot] = key, value

    def allocate(self, frames: Sequence[int]) -> list[int]:
        """Give each new frame a free slot, at the end of the list, and return the slots.

        Every denoising pass overwrites them; the clean pass leaves what later chunks read.
        """
        if len(frames) > len(self._free):
            raise ValueError(
                f"the cache of {self.keys.shape[2]} pages has {len(self._free)} free, got {len(frames)} new frames: "
                "evict first, or make the window larger"
            )
        slots, self._free = self._free[: len(frames)], self._free[len(frames) :]
        if self.seen is not None:
            self.seen += range(len(self.listed), len(self.listed) + len(frames))
        self.listed += [Page(frame, slot) for frame, slot in zip(frames, slots, strict=True)]
        return slots

    def rename(self, first: int, frames: Sequence[int]) -> None:
        """From index ``first`` of the list on, pages that are about to be overwritten belong to other frames."""
        for index, frame in enumerate(frames, first):
            self.listed[index] = Page(frame, self.listed[index].slot)

    def state(self) -> State:
        """The list, and copies of its pages on the CPU, [L, B, R, S, H, D] in list order."""
        return {
            "frames": self.frames, "slots": self.slots, "seen": self.seen,
            "keys": self._copied(self.keys), "values": self._copied(self.values),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold the frames of a ``state``, in the same slots, and no others.

        Raises:
            ValueError: The state is of a cache of another shape or dtype.
        """
        frames, slots, count = state["frames"], state["slots"], self.keys.shape[2]
        if len(frames) != len(slots) or len({*slots} & {*range(count)}) != len(slots):
            raise ValueError(f"slots must be different ones of {count}, one a frame, got {slots} for frames {frames}")
        layers, batch, _, tokens, _, head_dim = self.keys.shape
        shape = [layers, batch, len(slots), tokens, self.heads, head_dim]
        for name in ("keys", "values"):
            got = state[name]
            if list(got.shape) != shape or got.dtype != self.keys.dtype:
                expected = f"{self.keys.dtype} [L, B, R, S, H, D] = {shape}"
                raise ValueError(f"{name} of the state must be {expected}, got {got.dtype} {list(got.shape)}")
        self.listed = [Page(frame, slot) for frame, slot in zip(frames, slots, strict=True)]
        for pages, held in ((self.keys, state["keys"]), (self.values, state["values"])):
            self._fill(pages, held)
        self.seen = state["seen"]
        self._free = sorted({*range(count)} - {*slots})

    def _copied(self, pages: Tensor) -> Tensor:
        """The occupied ones of the pages [L, B, P, S, H, D], in list order, copied to the CPU one layer at a time."""
        layers, batch, _, *page = pages.shape
        held = torch.empty((layers, batch, len(self.listed), *page), dtype=pages.dtype, device="cpu")
        for layer, own in zip(held, pages, strict=True):
            layer.copy_(own[:, self.slots])
        return held

    def _fill(self, pages: Tensor, held: Tensor) -> None:
        """Put what ``_copied`` gave back where it was."""
        for layer, layer_held in zip(pages, held, strict=True):
            layer[:, self.slots] = layer_held.to(pages.device)


def _mixed(pages: Tensor, mix: Mix, turn: Tensor | None) -> Tensor:
    """The page that a mix asks for, [L, B, S, H, D] of pages [L, B, P, S, H, D].

    turn: what keys are stored with, [S, 1, D / 2, 2]; None for values. A mean over tokens is of keys without it.
    """
    sums: dict[bool, Tensor] = {}
    for source, weight, averaged in zip(mix.sources, mix.weights, mix.averaged, strict=True):
        page = pages[:, :, source].to(torch.promote_types(pages.dtype, torch.float32)) * weight
        sums[averaged] = sums[averaged] + page if averaged in sums else page
    if True in sums:
        alike = sums[True] if turn is None else rotate(sums[True], turn * turn.new_tensor((1.0, -1.0)))
        alike = alike.mean(2, keepdim=True).expand_as(alike)
        sums[True] = alike if turn is None else rotate(alike, turn)
    return sum(sums.values(), torch.zeros((), device=pages.device))
