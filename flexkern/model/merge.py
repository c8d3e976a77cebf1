"""From a tensor of a file to one of the model: what LoRAs add to it, and whether it is finite once it is rounded.

Each tensor is looked at once, as it is made, which costs less than rounding it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexkern.finite import all_finite


class Update(NamedTuple):
    """What a LoRA adds to one tensor: scale * up @ down, or scale * up where there is no down."""

    up: Tensor
    """[out, rank], or the difference itself in the tensor's shape"""
    down: Tensor | None
    """[rank, in]"""
    scale: float
    source: str
    """the LoRA's file, for messages"""

    def shape(self) -> list[int] | None:
        """The shape of the difference, flat after its first axis for a product; None where the halves do not fit."""
        if self.down is None:
            return list(self.up.shape)
        up, down = self.up.flatten(1), self.down.flatten(1)
        return [up.shape[0], down.shape[1]] if up.shape[1] == down.shape[0] else None

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to the weight."""
        flat = weight.flatten(1) if self.down is not None and weight.dim() > 1 else weight
        return self.shape() == list(flat.shape)

    def added_to(self, weight: Tensor) -> Tensor:
        """The float32 weight with the update, of the same shape."""
        up = self.up.to(weight.device, torch.float32)
        if self.down is None:
            return torch.add(weight, up, alpha=self.scale)
        down = self.down.to(weight.device, torch.float32).flatten(1)
        return torch.addmm(weight.flatten(1), up.flatten(1), down, alpha=self.scale).view(weight.shape)


def validate_finite(name: str, rounded: Tensor, exact: Tensor, where: str, updates: Sequence[Update] = ()) -> None:
    """Raises ValueError where a tensor is not finite, that says where it came to be so and what to try.

    Args:
        name: Of the tensor.
        rounded: As the model would hold it.
        exact: As the file holds it, before updates and rounding.
        where: Names the file.
        updates: Those added in between.
    """
    if all_finite(rounded):
        return
    exact = exact.to(rounded.device)
    dtype = str(rounded.dtype).removeprefix("torch.")
    if not all_finite(exact.float()):
        count = int((~torch.isfinite(exact.float())).sum())
        stored = str(exact.dtype).removeprefix("torch.")
        advice = "the file is damaged or its training diverged: get it again, or take another"
        raise ValueError(f"{where}: {name} ({stored}) holds {count} of {exact.numel()} values not finite; {advice}")
    merged = exact.float()
    for update in updates:
        merged = update.added_to(merged)
        if not all_finite(merged):
            advice = "the LoRA is damaged, or its scale too large"
            raise ValueError(f"{update.source} makes {name} not finite at scale {update.scale:g}; {advice}")
    largest = f"{float(merged.abs().max()):.3g}, and {dtype} ends at {torch.finfo(rounded.dtype).max:.3g}"
    advice = "bfloat16 or float32" if rounded.dtype == torch.float16 else "float32"
    raise ValueError(f"{where}: {name} is not finite in {dtype}: its largest value is {largest}; take dtype {advice}")
