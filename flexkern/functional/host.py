"""What the attention functions compute on the host: turns of frames under a policy, and which frames are hidden."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexkern.plan import band_split, turns
from flexkern.policies import PositionPolicy, Preset, position_of

from .validate import hide_later, list_frames, validate_count

Value = TypeVar("Value")


def on_host(function: Callable[..., Value], *args: Any, **named: Any) -> Value:
    """What the function gives, untraced inside torch.compile. Raises NotImplementedError inside torch.export."""
    if not torch.compiler.is_compiling():
        return function(*args, **named)
    if not torch.compiler.is_dynamo_compiling():
        raise NotImplementedError("angles come from the host: call frame_turns outside of torch.export and pass turn")
    from flexkern.untraced import call

    return call(function, *args, **named)


def plan_frames(
    query_frames: Sequence[int] | Tensor, key_frames: Sequence[int] | Tensor, bias: Tensor | None, *, head_dim: int,
    heads: int, policy: str | Preset | PositionPolicy, target: int | None, device: torch.device | str, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """turn [F, R, G, T, 2] and logit_scale [F] of frames, as ``frame_turns``, and bias [F, R], with later ones hidden.

    is_causal: Whether they are hidden; else bias comes back as it was.
    """
    at, seen = list_frames("query_frames", query_frames), list_frames("key_frames", key_frames)
    for name, count in (("head_dim", head_dim), ("heads", heads), ("target", 1 if target is None else target)):
        validate_count(name, count)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    phases = position_of(policy).phases(
        query=at, visible=seen, bands=band_split(head_dim)[0], heads=heads, target=target
    )
    query, key = torch.from_numpy(phases.query), torch.from_numpy(phases.key)
    if is_causal:
        bias = hide_later(at, seen, bias, torch.device(device))
    return turns(query[:, None] - key).to(device), torch.from_numpy(phases.logit_scale).float().to(device), bias
