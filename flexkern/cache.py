"""Storage for keys and values of past frames: one page holds one frame of one layer.

Pages never move. What a policy changes from chunk to chunk is the ordered list of frames that stand in them; eviction
hands a slot back. Keys stand there normalised and turned by place only (``kernels.reference.norm_rope_write``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Page:
    """An occupied slot: ``frame`` is the absolute index of the latent frame whose keys and values it holds."""

    frame: int
    slot: int


class FrameCache:
    """Pages of every layer, and the ordered list of frames in them.

    keys, values: [L, B, P, S, H, D]. pages: the occupied ones in the order attention lists them, the sink first.
    """

    def __init__(
        self, *, layers: int, batch: int, pages: int, tokens: int, heads: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        shape = layers, batch, pages, tokens, heads, head_dim
        if min(shape) < 1:
            raise ValueError(f"every size of a cache must be at least 1, got [L, B, P, S, H, D] = {list(shape)}")
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.pages: list[Page] = []
        self._free = list(range(pages))

    @property
    def frames(self) -> list[int]:
        """Absolute indices of the cached frames, in list order."""
        return [page.frame for page in self.pages]

    @property
    def slots(self) -> list[int]:
        return [page.slot for page in self.pages]

    @property
    def bytes(self) -> int:
        """Size of all pages of all layers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def keep(self, indices: Sequence[int]) -> None:
        """Only the pages at these places of the list stay, in that order; the slots of the others go free."""
        kept = [self.pages[i] for i in indices]
        self._free = sorted({*self._free, *self.slots} - {page.slot for page in kept})
        self.pages = kept

    def open(self, frames: Sequence[int]) -> list[int]:
        """Give each new frame a free slot, at the end of the list, and return the slots.

        Every denoising pass overwrites them; the clean pass leaves what later chunks read.
        """
        if len(frames) > len(self._free):
            raise ValueError(
                f"the cache of {self.keys.shape[2]} pages has {len(self._free)} free, got {len(frames)} new frames: "
                "evict first, or make the window larger"
            )
        slots, self._free = self._free[: len(frames)], self._free[len(frames) :]
        self.pages += [Page(frame, slot) for frame, slot in zip(frames, slots, strict=True)]
        return slots

    def rename(self, first: int, frames: Sequence[int]) -> None:
        """From place ``first`` of the list on, pages that are about to be overwritten belong to other frames."""
        for place, frame in enumerate(frames, first):
            self.pages[place] = Page(frame, self.pages[place].slot)
