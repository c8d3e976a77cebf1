"""What the attention functions take, checked before any work: each error names an argument and the way out.

torch.compile traces all of it, torch 2.6 included, so no function is nested in another.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from operator import index

import torch
from torch import Tensor

from flexkern.finite import all_finite
from flexkern.plan import band_split
from flexkern.policies import position_of

DTYPES = torch.float32, torch.bfloat16, torch.float16
CUDA_HEAD_DIMS = 64, 128
MOST_HEADS = (
    256  # an axis that is longer than this and than the tokens' axis holds no heads: the largest models have 128
)
PAIRS = (
    "'interleaved' (pair by pair, as Wan's checkpoints and its rope_apply have them) or "
    "'split' (all real parts, then all imaginary ones)"
)


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype in which x is attended: its own, or autocast's, as F.scaled_dot_product_attention has it."""
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype not in DTYPES or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def validate_options(attn_mask: object, dropout_p: float) -> None:
    """Raise where an option of F.scaled_dot_product_attention is set that has no counterpart here."""
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is by token, and is not supported: pass bias, float32 [F, R], which is added to the logits of "
            "whole frames, -inf to hide one"
        )
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: nothing is trained here, so leave it out")


def validate_pairs(pairs: object, needed: bool) -> None:
    """Raise unless pairs says how channel pairs lie, or is not needed and not given."""
    if pairs is None and needed:
        raise ValueError(f"pairs must be given where query and key are turned: {PAIRS}")
    if pairs is not None and pairs not in ("interleaved", "split"):
        raise ValueError(f"pairs must be {PAIRS}, got {pairs!r}")


def validate_time(
    query_frames: object, key_frames: object, policy: object, target: object, turn: object, is_causal: bool
) -> None:
    """Raise unless what depends on indices in time comes with them, and the policy is one."""
    if (query_frames is None) != (key_frames is None):
        raise ValueError("query_frames and key_frames go together: pass both or neither")
    if policy is not None and not torch.compiler.is_compiling():
        position_of(policy)
    if query_frames is not None:
        if turn is not None:
            raise ValueError("pass either turn or query_frames and key_frames, not both")
        return
    for name, value in (("policy", policy), ("target", target)):
        if value is not None:
            raise ValueError(
                f"{name} needs query_frames and key_frames, got neither"
                + ("" if turn is None else ": to make turn of it, pass it to frame_turns")
            )
    if is_causal:
        raise ValueError(
            "is_causal is by frame, and needs query_frames and key_frames: without them pass bias, float32 [F, R], "
            "-inf where the key's frame is later; there is no mask by token"
        )


def hide_later(query_frames: list[int], key_frames: list[int], bias: Tensor | None, device: torch.device) -> Tensor:
    """bias [F, R], or zeros, with -inf where the key's frame is later than the query's."""
    query, key = (torch.tensor(frames, device="cpu") for frames in (query_frames, key_frames))
    if bias is None:
        bias = torch.zeros(len(query), len(key), device=device)
    validate_tensor("bias", bias, "[F, R]", [len(query), len(key)], torch.float32, device)
    return bias.masked_fill((key > query[:, None]).to(device), float("-inf"))


def take_scale(logit_scale: Tensor | float | None, frames: int, device: torch.device) -> Tensor:
    """logit_scale as float32 [F], from one number or from a tensor that is such."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.ndim:
            validate_tensor("logit_scale", logit_scale, "[F]", [frames], torch.float32, device)
        refuse_gradient("logit_scale", logit_scale)
        return logit_scale.to(device, torch.float32).expand(frames)
    number = 1.0 if logit_scale is None else take_number("logit_scale", logit_scale, ", or a float32 tensor [F]")
    return torch.full((frames,), number, dtype=torch.float32, device=device)


def take_number(name: str, number: object, otherwise: str = "") -> float:
    """The number as a float, numpy's included; raise unless it is real and finite."""
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be one number{otherwise}, got {type(number).__name__}: {number!r:.80}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return float(number)


def validate_count(name: str, count: object) -> int:
    """The count as an int, numpy's integers included; raise unless it is at least 1."""
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
    return count if isinstance(count, int) else int(count)


def list_frames(name: str, frames: object, what: str = "frames in time") -> list[int]:
    """Indices of ``what`` as a list, from a sequence, an array of numpy or a tensor; raise unless they are such."""
    try:
        listed = frames.tolist() if hasattr(frames, "tolist") else list(frames)  # type: ignore[call-overload]
        if any(isinstance(frame, bool) for frame in listed):
            raise TypeError
        listed = [index(frame) for frame in listed]
    except TypeError:
        raise TypeError(f"{name} must list integers, the indices of {what}, got {frames!r}") from None
    if not listed or min(listed) < 0:
        raise ValueError(f"{name} must list indices of {what}, >= 0 and at least one, got {listed}")
    return listed


def take_slots(slots: object, pages: int, device: torch.device) -> Tensor:
    """The listed pages as a tensor [R] of integers; those that come from the host are checked here."""
    if not isinstance(slots, Tensor):
        listed = list_frames("slots", slots, "pages")
        if max(listed) >= pages:
            raise IndexError(f"slots must be in [0, {pages}), the pages there are, got {listed}")
        return torch.tensor(listed, device=device)
    if slots.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"slots must be integers, got {slots.dtype}")
    validate_tensor("slots", slots, "[R], at least one,", [max(slots.numel(), 1)], slots.dtype, device)
    return slots


def validate_tensor(
    name: str, x: object, letters: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless x is a tensor of that shape and dtype on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if list(x.shape) != list(shape):
        raise ValueError(f"{name} must be {letters} = {list(shape)}, got {list(x.shape)}")
    if (x.dtype, x.device) != (dtype, device):
        raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")
    refuse_gradient(name, x)


def validate_tensors(
    query: Tensor, others: dict[str, Tensor], query_layout: str, other_layout: str, enable_gqa: bool
) -> None:
    """Raise unless query, keys and values fit each other and what the operator can run."""
    axes = query_layout.count(",") + 1
    for name, x in {"query": query, **others}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != axes or x.numel() == 0:
            layout = query_layout if name == "query" else other_layout
            raise ValueError(f"{name} must be {layout}, not empty, got {list(x.shape)}")
        if (dtype_of(x), x.device) != (dtype_of(query), query.device):
            raise ValueError(f"{name} must be {query.dtype} on {query.device} as query is, got {x.dtype} on {x.device}")
        refuse_gradient(name, x)
        if x.layout != torch.strided:
            raise NotImplementedError(f"{name} must be a dense tensor, got one of {x.layout}")
        validate_heads(name, x, query, enable_gqa)
    (key_name, key), (value_name, value) = others.items()
    if key.shape != value.shape:
        raise ValueError(f"{value_name} must have the shape of {key_name}, {list(key.shape)}, got {list(value.shape)}")
    if query.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"query must be on a CPU or a CUDA GPU, got device '{query.device}'")
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"query must be float32, bfloat16 or float16, got {query.dtype}")
    dim, most = query.shape[-1], max(CUDA_HEAD_DIMS)
    if dim % 2 or dim > most:
        raise NotImplementedError(
            f"query must have an even head dim of at most {most}, the widest of the CUDA kernel, on every device, "
            f"got {dim}"
        )


def refuse_gradient(name: str, x: Tensor) -> None:
    """Raise where a gradient would be lost on the way."""
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} requires a gradient, and there is no backward: use torch.no_grad()")


def validate_heads(name: str, x: Tensor, query: Tensor, enable_gqa: bool) -> None:
    """Raise unless x has the batch, the head dim and the heads of query, or with enable_gqa heads that divide them."""
    heads, others = query.shape[-2], x.shape[-2]
    expected = f"{name} must have B, H and D of query {list(query.shape)}, got {list(x.shape)}"
    if (x.shape[0], x.shape[-1]) != (query.shape[0], query.shape[-1]):
        raise ValueError(expected)
    if heads == others or (enable_gqa and heads % others == 0):
        return
    ways = []
    if enable_gqa:
        ways.append("with enable_gqa its heads must divide those of query")
    elif heads % others == 0 and others <= MOST_HEADS:
        ways.append("if query heads share them, pass enable_gqa=True")
    way = f"pass x.transpose({x.ndim - 3}, {x.ndim - 2})"
    if x.shape[-3] == query.shape[-3]:
        ways.append(f"if heads come first, {way} of each")
    elif x.shape[-3] == heads or query.shape[-3] == others:
        ways.append(f"if heads come first in one of them, {way} of that")
    raise ValueError("; ".join((expected, *ways)))


def validate_plan(query: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor, bias: Tensor | None) -> None:
    """Raise unless the small tensors fit query [B, F, S, H, D] and each other."""
    _, frames, _, heads, dim = query.shape
    read, device, real = slots.numel(), query.device, torch.float32
    groups, time = turn.shape[2:4] if isinstance(turn, Tensor) and turn.ndim == 5 else (1, 1)
    groups = heads if groups == heads else 1
    validate_tensor("turn", turn, "[F, R, 1 or H, T, 2]", [frames, read, groups, time, 2], real, device)
    bands = band_split(dim)[0]
    if time not in (bands, dim // 2):
        raise ValueError(
            f"turn must have T = {bands}, the temporal pairs of head dim {dim} (frame_turns makes it so), or T = "
            f"{dim // 2}, a turn for every pair, got T = {time}"
        )
    validate_tensor("logit_scale", logit_scale, "[F]", [frames], real, device)
    if bias is not None:
        validate_tensor("bias", bias, "[F, R]", [frames, read], real, device)
    validate_values(turn, logit_scale, bias)


def validate_values(turn: Tensor, logit_scale: Tensor, bias: Tensor | None) -> None:
    """Raise where values on a CPU are not finite, but for -inf in bias; on a GPU asking would wait for it."""
    if turn.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, x in (("turn", turn), ("logit_scale", logit_scale)):
        if not all_finite(x):
            raise ValueError(f"{name} must be finite, got values that are not")
    if bias is not None and not bool((bias < float("inf")).all()):  # false for nan as well
        raise ValueError("bias must be finite, or -inf to hide a frame, got nan or +inf")


def frames_known(turn: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The one of turn [F, R, G, T, 2] and bias [F, R] that says how many frames there are."""
    for name, x, letters, axes in (("turn", turn, "[F, R, 1 or H, T, 2]", 5), ("bias", bias, "[F, R]", 2)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != axes or x.numel() == 0:
            raise ValueError(f"{name} must be {letters}, not empty, got {list(x.shape)}")
    return turn if turn is not None else bias


def count_frames(query: Tensor, key: Tensor, tokens: int | None, known: Tensor | None) -> tuple[int, int, int]:
    """(F, R, S) of query [B, F * S, H, D] and key [B, R * S, H, D]; raise where heads seem to come before tokens.

    known [F, R, ...] says how many frames there are, tokens how long one is; either will do. Shapes of a tensor with
    heads first can fit by chance. With both known they cannot, unless there are as many heads as tokens.
    """
    if tokens is None and known is None:
        raise ValueError("tokens must be given: neither turn, bias nor query_frames tell how many frames there are")
    found = frames_along(1, query, key, tokens, known)
    (rows, heads), (columns, others) = query.shape[1:3], key.shape[1:3]
    mend = "pass x.transpose(1, 2) of query, key and value"
    if found is None:
        counts = "whole frames" if known is None else f"{known.shape[0]} and {known.shape[1]} frames"
        each = f"{tokens} tokens each" if tokens is not None else "one number of tokens each"
        swapped = frames_along(2, query, key, tokens, known) is not None
        raise ValueError(
            f"query and key must hold {counts} of {each}, got {rows} and {columns} tokens"
            + (f" of {heads} and {others} heads; if heads come first, {mend}" if swapped else "")
        )
    if rows < heads and columns < others:
        seems = f"query {list(query.shape)} seems to have heads before tokens, {rows} tokens of {heads} heads"
        if heads > MOST_HEADS:
            raise ValueError(f"{seems}: {mend}")
        if tokens is None and frames_along(2, query, key, tokens, known) is not None:
            raise ValueError(f"{seems}: {mend}, or tokens={found[2]} if it has not")
    return found


def frames_along(
    axis: int, query: Tensor, key: Tensor, tokens: int | None, known: Tensor | None
) -> tuple[int, int, int] | None:
    """(F, R, S) if that axis of query and key can hold the tokens of whole frames."""
    rows, columns = query.shape[axis], key.shape[axis]
    if known is not None:
        frames, read = known.shape[:2]
        length = rows // frames if tokens is None else tokens
        return (frames, read, length) if rows == frames * length and columns == read * length else None
    assert tokens is not None, "count_frames has checked"
    return None if rows % tokens or columns % tokens else (rows // tokens, columns // tokens, tokens)


def validate_pages(query: Tensor, pages: dict[str, Tensor], tokens: int | None) -> None:
    """Raise unless pages [B, P, S, H, D] hold frames as query [B, F, S, H, D] has, and tokens come before heads."""
    length, heads = query.shape[2:4]
    mend = "pass x.transpose(2, 3) of query, keys and values"
    for name, x in pages.items():
        if x.shape[2] != length:
            raise ValueError(f"{name} must hold frames of {length} tokens as query does, got {x.shape[2]}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous: pages are read without a copy")
    if tokens is not None and tokens != length:
        swapped = f"; if heads come first, {mend}" if tokens == heads else ""
        raise ValueError(f"query must hold frames of {tokens} tokens, got {list(query.shape)}{swapped}")
    if length < heads and (tokens is None or heads > MOST_HEADS):
        way = f"{mend}, or tokens={length} if it has not" if heads <= MOST_HEADS else mend
        raise ValueError(
            f"query {list(query.shape)} seems to have heads before tokens, {length} tokens of {heads} heads: {way}"
        )


def validate_places(x: Tensor, rows: int, columns: int) -> None:
    """Raise unless x [B, F * S, H, D] or [B, F, S, H, D] holds frames of rows * columns tokens, and not heads first."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim not in (4, 5) or x.numel() == 0 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be real [B, F * S, H, D] or [B, F, S, H, D], not empty, D even, got {x.dtype} {list(x.shape)}"
        )
    length, (tokens, heads) = rows * columns, x.shape[-3:-1]
    whole = tokens == length if x.ndim == 5 else tokens % length == 0
    if not whole or (tokens < heads and heads > MOST_HEADS):
        swapped = heads == length if x.ndim == 5 else heads % length == 0
        mend = f"; if heads come first, pass x.transpose({x.ndim - 3}, {x.ndim - 2})" if swapped else ""
        raise ValueError(
            f"x must hold frames of {rows} * {columns} = {length} tokens, got {tokens} tokens of {heads} heads{mend}"
        )
