"""Attention for other people's code: functions of tensors over one operator, ``torch.ops.flexkern.frame_attention``.

torch.compile (fullgraph) and torch.export keep the operator whole. The device of the tensors alone decides what runs:
on CUDA the Triton kernel ``flexkern.kernels.attention.portable``, on a CPU torch's scaled_dot_product_attention over
turned keys. Other devices raise. Inference only: there is no backward.

Letters: see the glossary (flexkern/docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flexkern.backends.gathered import attend_turned
from flexkern.backends.sdpa import attend
from flexkern.kernels.reference import split_pairs
from flexkern.plan import band_split, turns
from flexkern.policies import PositionPolicy, Preset, get_preset

DTYPES = torch.float32, torch.bfloat16, torch.float16
CUDA_HEAD_DIMS = 64, 128


def attention(
    query: Tensor,  # [B, F * S, H, D]
    key: Tensor,  # [B, R * S, H, D]
    value: Tensor,  # [B, R * S, H, D]
    *,
    tokens: int | None = None,
    query_frames: Sequence[int] | None = None,
    key_frames: Sequence[int] | None = None,
    policy: str | Preset | PositionPolicy = "self-forcing",
    target: int | None = None,
    turn: Tensor | None = None,
    logit_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    pairs: Literal["split", "interleaved"] = "split",
) -> Tensor:
    """Softmax attention of frames of video, each key frame at its own distance in time: [B, F * S, H, D].

        softmax(logit_scale * <R(turn[f, r]) q, k> / sqrt(D) + bias[f, r]) v        q in frame f, k in frame r

    Without turn, logit_scale and bias this is F.scaled_dot_product_attention, with heads after tokens. Query and key
    come turned by place (row, column) at most, never by time: ``turn`` adds time.

    Args:
        query: [B, F * S, H, D].
        key: [B, R * S, H, D].
        value: [B, R * S, H, D].
        tokens: S; derived where query_frames, turn or bias tell how many frames there are.
        query_frames: Indices in time of the F frames, together with key_frames; the angles are then those of
            ``policy``, computed on the host. Inside torch.compile pass the result of ``frame_turns`` instead.
        key_frames: Indices in time of the R frames.
        policy: A ``PositionPolicy``, a preset or its name; "self-forcing" is as trained.
        target: Frames of the whole video, if known.
        turn: float32 [F, R, G, T, 2], cosine and sine by which the query turns on its way from frame f to key frame r.
        logit_scale: float32 [F], or one number.
        bias: float32 [F, R]; -inf hides a frame, and a query frame that sees no key frame returns zeros.
        pairs: How the D / 2 channel pairs are stored, time first: all real parts, then all imaginary ones ("split"), or
            pair by pair ("interleaved", as Wan's checkpoints).

    Returns:
        [B, F * S, H, D], in the query's dtype.

    Raises:
        ValueError: An argument does not fit; the message names it.
        TypeError: An argument is not a tensor.
        NotImplementedError: A device, a dtype, a head dim or a gradient is not supported.
    """
    validate_tensors(query, {"key": key, "value": value}, "[B, F * S, H, D]", "[B, R * S, H, D]")
    if pairs not in ("split", "interleaved"):
        raise ValueError(f"pairs must be 'split' or 'interleaved', got {pairs!r}")
    if (query_frames is None) != (key_frames is None):
        raise ValueError("query_frames and key_frames go together: pass both or neither")
    if query_frames is not None and key_frames is not None:
        if turn is not None:
            raise ValueError("pass either turn or query_frames and key_frames, not both")
        turn, policy_scale = frame_turns(
            query_frames, key_frames, head_dim=query.shape[-1], heads=query.shape[2], policy=policy, target=target,
            device=query.device,
        )  # fmt: skip
        logit_scale = policy_scale if logit_scale is None else policy_scale * logit_scale
    frames, read, tokens = count_frames(query, key, tokens, turn, bias)
    if turn is None:
        turn = torch.tensor([1.0, 0.0], device=query.device).expand(frames, read, 1, 1, 2)
    elif pairs == "interleaved":
        query, key = split_pairs(query), split_pairs(key)
    key_pages, value_pages = (x.contiguous().unflatten(1, (read, tokens)) for x in (key, value))
    slots = torch.arange(read, dtype=torch.int32, device=query.device)
    by_frame = query.unflatten(1, (frames, tokens))
    return paged_attention(by_frame, key_pages, value_pages, slots, turn, logit_scale, bias).flatten(1, 2)


def paged_attention(
    query: Tensor,  # [B, F, S, H, D]
    key_pages: Tensor,  # [B, P, S, H, D]
    value_pages: Tensor,  # [B, P, S, H, D]
    slots: Tensor,  # [R] int32
    turn: Tensor,  # [F, R, G, T, 2] float32
    logit_scale: Tensor | float | None = None,  # [F] float32
    bias: Tensor | None = None,  # [F, R] float32
) -> Tensor:
    """``attention`` over the pages of a cache that ``slots`` lists, read without a copy.

    Args:
        query: [B, F, S, H, D], pairs split.
        key_pages: [B, P, S, H, D], contiguous; pages that are not listed may hold anything.
        value_pages: [B, P, S, H, D], contiguous.
        slots: int32 [R], pages to read, in [0, P): not checked on CUDA.
        turn: As in ``attention``.
        logit_scale: As in ``attention``.
        bias: As in ``attention``.

    Returns:
        [B, F, S, H, D], in the query's dtype.

    Raises:
        ValueError: As ``attention``; so are the others.
        TypeError: An argument is not a tensor.
        NotImplementedError: A device, a dtype, a head dim or a gradient is not supported.
    """
    layouts = "[B, F, S, H, D]", "[B, P, S, H, D]"
    validate_tensors(query, {"key_pages": key_pages, "value_pages": value_pages}, *layouts)
    batch, frames, tokens, heads, dim = query.shape
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.shape[2] != tokens:
            raise ValueError(f"{name} must hold frames of {tokens} tokens as query does, got {pages.shape[2]}")
        if not pages.is_contiguous():
            raise ValueError(f"{name} must be contiguous: pages are read without a copy")
    if not isinstance(logit_scale, Tensor):
        scale = 1.0 if logit_scale is None else float(logit_scale)
        logit_scale = torch.full((frames,), scale, dtype=torch.float32, device=query.device)
    validate_plan(query, slots, turn, logit_scale, bias)
    plan = [x if x is None else x.contiguous() for x in (slots, turn, logit_scale, bias)]
    return torch.ops.flexkern.frame_attention(query.contiguous(), key_pages, value_pages, *plan)


def frame_turns(
    query_frames: Sequence[int], key_frames: Sequence[int], *, head_dim: int, heads: int = 1,
    policy: str | Preset | PositionPolicy = "self-forcing", target: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ``attention`` needs to know of frames at these indices under a policy.

    Angles are computed in float64 on the host, and reduced mod 2 pi.

    Args:
        query_frames: Indices in time of the F query frames.
        key_frames: Indices in time of the R key frames.
        head_dim: D.
        heads: H; only mode jitter has angles of its own per head.
        policy: A ``PositionPolicy``, a preset or its name.
        target: Frames of the whole video, if known.
        device: Of the results.

    Returns:
        turn [F, R, G, T, 2] and logit_scale [F], float32.

    Raises:
        ValueError: As ``PositionPolicy.phases``.
        NotImplementedError: It is called inside torch.compile.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError("angles come from the host: call frame_turns outside of torch.compile and pass turn")
    position = policy if isinstance(policy, PositionPolicy) else get_preset(policy).position
    bands = band_split(head_dim)[0]
    phases = position.phases(query=query_frames, visible=key_frames, bands=bands, heads=heads, target=target)
    query, key = torch.from_numpy(phases.query), torch.from_numpy(phases.key)
    return turns(query[:, None] - key).to(device), torch.from_numpy(phases.logit_scale).float().to(device)


def validate_tensors(query: Tensor, others: dict[str, Tensor], query_layout: str, other_layout: str) -> None:
    """Raise unless query, keys and values fit each other and what the operator can run."""
    axes = query_layout.count(",") + 1
    for name, x in {"query": query, **others}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != axes or x.numel() == 0:
            layout = query_layout if name == "query" else other_layout
            raise ValueError(f"{name} must be {layout}, not empty, got {list(x.shape)}")
        if (x.dtype, x.device) != (query.dtype, query.device):
            raise ValueError(f"{name} must be {query.dtype} on {query.device} as query is, got {x.dtype} on {x.device}")
        if (x.shape[0], *x.shape[-2:]) != (query.shape[0], *query.shape[-2:]):
            raise ValueError(f"{name} must have B, H and D of query {list(query.shape)}, got {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires a gradient, and there is no backward: use torch.no_grad()")
    (key_name, key), (value_name, value) = others.items()
    if key.shape != value.shape:
        raise ValueError(f"{value_name} must have the shape of {key_name}, {list(key.shape)}, got {list(value.shape)}")
    kind, dim = query.device.type, query.shape[-1]
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(f"query must be on a CPU or a CUDA GPU, got device '{query.device}'")
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"query must be float32, bfloat16 or float16, got {query.dtype}")
    if dim % 2 or (kind == "cuda" and dim not in CUDA_HEAD_DIMS):
        expected = "64 or 128 on CUDA" if kind == "cuda" else "even"
        raise NotImplementedError(f"query must have a head dim that is {expected}, got {dim}")


def validate_plan(query: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor, bias: Tensor | None) -> None:
    """Raise unless the small tensors fit query [B, F, S, H, D] and each other."""
    _, frames, _, heads, dim = query.shape

    def expect(name: str, x: Tensor, letters: str, shape: list[int], dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if list(x.shape) != shape:
            raise ValueError(f"{name} must be {letters} = {shape}, got {list(x.shape)}")
        if (x.dtype, x.device) != (dtype, query.device):
            raise ValueError(f"{name} must be {dtype} on {query.device}, got {x.dtype} on {x.device}")

    read = slots.numel() if isinstance(slots, Tensor) else 1
    expect("slots", slots, "[R], at least one,", [max(read, 1)], torch.int32)
    groups, time = turn.shape[2:4] if isinstance(turn, Tensor) and turn.ndim == 5 else (1, 1)
    expect("turn", turn, "[F, R, 1 or H, T, 2]", [frames, read, heads if groups == heads else 1, time, 2])
    if not 1 <= time <= dim // 2:
        raise ValueError(f"turn must turn 1 to {dim // 2} of the {dim // 2} pairs of a head, got T = {time}")
    expect("logit_scale", logit_scale, "[F]", [frames])
    if bias is not None:
        expect("bias", bias, "[F, R]", [frames, read])


def count_frames(
    query: Tensor, key: Tensor, tokens: int | None, turn: Tensor | None, bias: Tensor | None
) -> tuple[int, int, int]:
    """(F, R, S) of query [B, F * S, H, D] and key [B, R * S, H, D], from tokens, else from turn or bias."""
    rows, columns = query.shape[1], key.shape[1]
    if tokens is None:
        known = turn if turn is not None else bias
        if known is None:
            raise ValueError("tokens must be given: neither turn, bias nor query_frames tell how many frames there are")
        tokens = rows // max(known.shape[0], 1)
    if tokens < 1 or rows % tokens or columns % tokens:
        raise ValueError(f"query and key must hold whole frames of {tokens} tokens, got {rows} and {columns} tokens")
    return rows // tokens, columns // tokens, tokens


def on_cpu(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The operator by torch's attention: every key turned the opposite way, once for each query frame."""
    query = (query * logit_scale[:, None, None, None]).to(query.dtype)
    key_turn = turn * turn.new_tensor([1.0, -1.0])
    return attend_turned(query, key_pages, value_pages, slots, key_turn, bias, attend).contiguous()


def on_cuda(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The operator by the Triton kernel."""
    from flexkern.kernels.attention.portable import frame_attention

    return frame_attention(query, key_pages, value_pages, slots, turn, logit_scale, bias)[0]


SCHEMA = (
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor slots, Tensor turn, Tensor logit_scale, Tensor? bias)"
    " -> Tensor"
)
operator = torch.library.custom_op(
    "flexkern::frame_attention", on_cpu, mutates_args=(), device_types="cpu", schema=SCHEMA
)
operator.register_kernel("cuda", on_cuda)
operator.register_fake(lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format))
