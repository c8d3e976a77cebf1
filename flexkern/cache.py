"""Storage for keys and values of past frames: one page holds one frame of one layer.

Pages never move. What a policy changes from chunk to chunk is the ordered list of the frames in them; eviction hands a
slot back. Keys are stored normalised and turned by place only (``kernels.reference.norm_rope_write``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexkern.state import State


@dataclass(frozen=True, slots=True)
class Page:
    """A page in use: ``slot`` is its index, ``frame`` the absolute index of the latent frame that it holds."""

    frame: int
    slot: int


class LayerPages(NamedTuple):
    """What belongs to the pages of one layer, [B, P, S, H, D] each."""

    keys: Tensor
    values: Tensor


class FrameCache:
    """Pages of every layer, and the ordered list of frames in them.

    keys, values: [L, B, P, S, H, D]. listed: the occupied pages in the order attention lists them, the sink first.
    heads: H.
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
    def bytes(self) -> int:
        """Size of all pages of all layers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def pages(self, layer: int) -> LayerPages:
        """Everything that belongs to the pages of a layer, as views."""
        return LayerPages(self.keys[layer], self.values[layer])

    def keep(self, indices: Sequence[int]) -> None:
        """Keep the pages at these indices of ``listed``, in this order; free the slots of all others."""
        kept = [self.listed[i] for i in indices]
        self._free = sorted({*self._free, *self.slots} - {page.slot for page in kept})
        self.listed = kept

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
        self.listed += [Page(frame, slot) for frame, slot in zip(frames, slots, strict=True)]
        return slots

    def rename(self, first: int, frames: Sequence[int]) -> None:
        """From index ``first`` of the list on, pages that are about to be overwritten belong to other frames."""
        for index, frame in enumerate(frames, first):
            self.listed[index] = Page(frame, self.listed[index].slot)

    def state(self) -> State:
        """The list, and copies of its pages on the CPU, [L, B, R, S, H, D] in list order."""
        return {
            "frames": self.frames, "slots": self.slots,
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
