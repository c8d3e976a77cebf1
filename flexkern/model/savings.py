"""What the transformer need not do: three products of one input, and rows of a prompt that only repeat.

Neither changes what it computes, but for rounding.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOTHING = 1e-12  # a count of rows that weighs nothing; of none at all, the logarithm would not be finite
FOLDED = 64  # rows of text are a multiple of it, so that prompts of about one length have one shape


def products(linears: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of several linear layers makes of x, by one product where ``stack`` has laid their weights together.

    Layers that training, a hook or a layer of another class in their place must see are called one by one.
    """
    found = joined(linears)
    if found is None:
        return [linear(x) for linear in linears]
    weight, bias, sizes = found
    return F.linear(x, weight, bias).split(sizes, dim=-1)


def stack(linears: Sequence[nn.Linear]) -> None:
    """Lay weights and biases of linear layers one behind another in memory, so that ``products`` takes them for one.

    Parameters stay those of each layer, under the same names; only where they lie changes. Those that lie together
    already stay where they are, with whatever else reads them there; those that were made in inference mode cannot be
    moved.
    """
    if any(part.is_inference() for linear in linears for part in (linear.weight, linear.bias)):
        return
    with torch.inference_mode(False), torch.no_grad():  # parameters outlive the mode they are laid out in
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in linears]
            if not lie_together(parts):
                for part, laid in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                    part.data = laid


def lie_together(parts: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors of one dtype lie one behind another in one storage."""
    first = parts[0]
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.dtype == first.dtype
        if not (same and part.is_contiguous() and part.storage_offset() == at):
            return False
        at += part.numel()
    return True


def joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor, list[int]] | None:
    """Weight, bias and output sizes of linear layers whose parameters lie one behind another, as one; else None."""
    found = []
    for linear in linears:
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return None
        found.append(linear)
    sizes = [linear.out_features for linear in found]
    both: list[Tensor] = []
    for parts in ([linear.weight for linear in found], [linear.bias for linear in found]):
        trains = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if trains or not lie_together(parts):
            return None
        both.append(parts[0].as_strided((sum(sizes), *parts[0].shape[1:]), parts[0].stride()))
    return both[0], both[1], sizes


def fold_padding(text: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A prompt's rows without most of those that only repeat the last one, and what makes up for them.

    Wan attends to padding, and n equal rows weigh as one whose logit is log(n) higher. So cross-attention over the rows
    that differ and one of the others is the same function, over 64 or 128 rows where there were 512. In a dtype too
    coarse for log(n), three rows share the count, each the remainder of those before: bfloat16 then is off by 4e-7.

    Args:
        text: [B, L, text_dim].
        dtype: That the logits will have.

    Returns:
        text [B, n, text_dim], and what is added to the logits of its rows, [1, 1, 1, n] in that dtype; text alone where
        no rows can be left out.
    """
    length = text.shape[1]
    repeats = (text == text[:, -1:]).all(dim=-1).all(dim=0).tolist()
    own = max((i + 1 for i, repeated in enumerate(repeats) if not repeated), default=0)
    kept = FOLDED * -(-(own + 3) // FOLDED)
    if kept >= length:
        return (text,)
    bias = torch.zeros(kept, dtype=dtype)
    left = float(length - kept + 3)
    for row in range(kept - 3, kept):
        bias[row] = math.log(left) if left > NOTHING else math.log(NOTHING)
        if row + 1 < kept and bias[row].double().exp() > left:  # the rest is for the rows behind it
            bias[row] = torch.nextafter(bias[row], torch.tensor(-math.inf, dtype=dtype))
        left -= bias[row].double().exp().item()
    return text[:, :kept], bias.to(text.device)[None, None, None]
