"""What a worker keeps from job to job besides weights: encoded prompts, and the ranks that compute with it."""

from collections import OrderedDict
from typing import TYPE_CHECKING

import flexkern.parallel as parallel
from flexkern.checks import whole

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.model.protocols import TextEncoder
    from flexkern.parallel import Ranks
    from flexkern.render.batch import Batch


PROMPTS = 256  # encoded ones that are kept, 4 MB each of Wan's at most


class Encoded:
    """A text encoder that encodes a prompt once, and keeps what it made of the last ``PROMPTS`` of them."""

    def __init__(self, encoder: "TextEncoder"):
        self._encoder = encoder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: list[str]) -> "Tensor":
        import torch

        for prompt in prompts:
            if prompt not in self._kept:
                self._kept[prompt] = self._encoder([prompt]).cpu()
            self._kept.move_to_end(prompt)
        made = torch.cat([self._kept[prompt] for prompt in prompts])
        while len(self._kept) > PROMPTS:
            self._kept.popitem(last=False)
        return made


class HeldRanks:
    """The ranks that compute each video of a worker together; started with a job, and again where they are lost.

    Args:
        count: How many; 1 for this process alone.

    Raises:
        ValueError: It is no whole number of at least 1.
    """

    def __init__(self, count: int):
        self.count = whole("ranks", count, 1)
        self._ranks: Ranks | None = None

    def validate(self, batch: "Batch") -> None:
        """Raises ValueError where so many ranks cannot share the batch's model, or have no GPU each."""
        if self.count > 1:
            parallel.validate_shares(batch.config, batch.family.size, self.count)
            parallel.validate_gpus(self.count, batch.device, called="ranks")
            for order in batch.orders:
                parallel.validate_preset(order.method, self.count)

    def open(self, device: str) -> "Ranks | None":
        """The ranks on this kind of device; None for one. Raises RankError where one of them does not come."""
        if self.count == 1:
            return None
        held = self._ranks
        if held is not None and (held.lost or held.device.type != device):
            self.close()
        if self._ranks is None:
            self._ranks = parallel.start_ranks(self.count, device)
        return self._ranks

    def close(self) -> None:
        """They end."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
