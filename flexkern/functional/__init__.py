"""Attention for other people's code: functions of tensors over one operator, ``torch.ops.flexkern.frame_attention``.

torch.compile (fullgraph) and torch.export keep the operator whole; positions are work of the host, beside the graph.
The device of the tensors alone decides what runs: on CUDA the Triton kernel ``flexkern.kernels.attention.portable``, on
a CPU torch's scaled_dot_product_attention over turned keys. Other devices raise. Inference only: there is no backward.

One rule of dtypes, compiled or not: query, key and value are taken in the one dtype that they have; under
torch.autocast they are cast to its dtype first, as F.scaled_dot_product_attention does.

Letters: see the glossary (flexkern/docs/architecture.md).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flexkern.kernels.reference import split_pairs
from flexkern.plan import band_split, place_angles
from flexkern.policies import PositionPolicy, Preset

from . import operator as operator  # registers torch.ops.flexkern.frame_attention
from .host import on_host, plan_frames
from .validate import (
    count_frames,
    dtype_of,
    frames_known,
    take_number,
    take_scale,
    take_slots,
    validate_count,
    validate_options,
    validate_pages,
    validate_pairs,
    validate_places,
    validate_plan,
    validate_tensors,
    validate_time,
)

Pairs = Literal["interleaved", "split"]


def attention(
    query: Tensor,  # [B, F * S, H, D]
    key: Tensor,  # [B, R * S, H, D]
    value: Tensor,  # [B, R * S, H, D]
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    tokens: int | None = None,
    query_frames: Sequence[int] | Tensor | None = None,
    key_frames: Sequence[int] | Tensor | None = None,
    policy: str | Preset | PositionPolicy | None = None,
    target: int | None = None,
    turn: Tensor | None = None,
    logit_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    pairs: Pairs | None = None,
) -> Tensor:
    """Softmax attention of frames of video, each key frame at its own distance in time: [B, F * S, H, D].

        softmax(logit_scale * scale * <R(turn[f, r]) q, k> + bias[f, r]) v        q in frame f, k in frame r

    Without turn, logit_scale and bias this is F.scaled_dot_product_attention, with heads after tokens. Query and key
    come turned by place at most (``turn_place``), never by time: ``turn`` adds time, and nothing shows a query that has
    it already. Tensors with heads first are refused where their shape shows it; with ``tokens`` and the number of
    frames both said, it always does, unless a head count equals a token count.

    Args:
        query: [B, F * S, H, D], D even and at most 128.
        key: [B, R * S, H, D].
        value: [B, R * S, H, D].
        attn_mask: Refused: what is masked here is a frame, by ``bias``.
        dropout_p: Refused unless 0.
        is_causal: No frame sees a later one, by query_frames and key_frames; tokens of one frame see each other.
        scale: Factor on the logits; 1 / sqrt(D) if not given.
        enable_gqa: Key and value may have fewer heads, which divide H: consecutive query heads share one.
        tokens: S; derived where query_frames, turn or bias tell how many frames there are, checked where both do.
        query_frames: Indices in time of the F frames, together with key_frames: a sequence, an array or a tensor. The
            angles are then those of ``policy``, computed on the host, where torch.compile breaks its graph: for one
            graph, and for torch.export, pass the result of ``frame_turns`` instead.
        key_frames: Indices in time of the R frames.
        policy: A ``PositionPolicy``, a preset or its name, only with frames; if not given "self-forcing", as trained.
        target: Frames of the whole video, if known, only with frames.
        turn: float32 [F, R, G, T, 2], cosine and sine by which the query turns on its way from frame f to key frame r.
            T counts the pairs that turn, from the first: the temporal ones of D as ``frame_turns`` has them, or all
            D / 2 for a model that splits its pairs otherwise.
        logit_scale: float32 [F], or one number; 1 if not given.
        bias: float32 [F, R]; -inf hides a frame, and a query frame that sees no key frame returns zeros.
        pairs: How the D / 2 channel pairs are stored, time first: pair by pair ("interleaved", as Wan's checkpoints),
            or all real parts, then all imaginary ones ("split"). Must be given where query and key are turned.

    Returns:
        [B, F * S, H, D], in the query's dtype; under autocast in that of autocast.

    Raises:
        ValueError: An argument does not fit; the message names it.
        TypeError: An argument is not a tensor, or no list of integers.
        NotImplementedError: An option, a device, a dtype, a head dim or a gradient is not supported.
    """
    validate_options(attn_mask, dropout_p)
    layouts = "[B, F * S, H, D]", "[B, R * S, H, D]"
    validate_tensors(query, {"key": key, "value": value}, *layouts, enable_gqa)
    validate_time(query_frames, key_frames, policy, target, turn, is_causal)
    validate_pairs(pairs, turn is not None or query_frames is not None)
    query, key, value = (x.to(dtype_of(x)) for x in (query, key, value))
    policy_scale: Tensor | float = 1.0
    if query_frames is not None and key_frames is not None:
        turn, policy_scale, hidden = on_host(
            plan_frames, query_frames, key_frames, bias if is_causal else None, head_dim=query.shape[-1],
            heads=query.shape[2], policy="self-forcing" if policy is None else policy, target=target,
            device=query.device, is_causal=bool(is_causal),
        )  # fmt: skip
        bias = hidden if is_causal else bias
    tokens = None if tokens is None else validate_count("tokens", tokens)
    frames, read, tokens = count_frames(query, key, tokens, frames_known(turn, bias))
    logit_scale = take_scale(logit_scale, frames, query.device) * policy_scale
    if turn is None:
        still = torch.tensor([1.0, 0.0], device=query.device)
        turn = still.expand(frames, read, 1, band_split(query.shape[-1])[0], 2)
    elif pairs == "interleaved":
        query, key = split_pairs(query), split_pairs(key)
    key_pages, value_pages = (x.contiguous().unflatten(1, (read, tokens)) for x in (key, value))
    slots = torch.arange(read, dtype=torch.int32, device=query.device)
    by_frame = query.unflatten(1, (frames, tokens))
    return attend_pages(by_frame, key_pages, value_pages, slots, turn, logit_scale, bias, scale).flatten(1, 2)


def paged_attention(
    query: Tensor,  # [B, F, S, H, D]
    key_pages: Tensor,  # [B, P, S, H, D]
    value_pages: Tensor,  # [B, P, S, H, D]
    slots: Tensor | Sequence[int],  # [R]
    turn: Tensor,  # [F, R, G, T, 2] float32
    logit_scale: Tensor | float | None = None,  # [F] float32
    bias: Tensor | None = None,  # [F, R] float32
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    tokens: int | None = None,
) -> Tensor:
    """``attention`` over the pages of a cache that ``slots`` lists, read without a copy.

    Two things cost a copy of the listed pages: on CUDA a head dim other than 64 and 128, and pages whose dtype is not
    autocast's where that is on.

    Args:
        query: [B, F, S, H, D], pairs split.
        key_pages: [B, P, S, H, D], pairs split, contiguous; pages that are not listed may hold anything.
        value_pages: [B, P, S, H, D], contiguous.
        slots: Integers [R], pages to read, in [0, P): a tensor, a sequence or an array. In a tensor on
            CUDA they are not checked.
        turn: As in ``attention``.
        logit_scale: As in ``attention``.
        bias: As in ``attention``.
        scale: As in ``attention``.
        enable_gqa: As in ``attention``.
        tokens: S, checked; needed only where a frame has fewer tokens than heads, which looks like heads first.

    Returns:
        [B, F, S, H, D], in the query's dtype; under autocast in that of autocast.

    Raises:
        ValueError: An argument does not fit; the message names it.
        TypeError: An argument is not a tensor, or no list of integers.
        IndexError: A slot is not that of a page.
        NotImplementedError: A device, a dtype, a head dim or a gradient is not supported.
    """
    pages = {"key_pages": key_pages, "value_pages": value_pages}
    validate_tensors(query, pages, "[B, F, S, H, D]", "[B, P, S, H, D]", enable_gqa)
    validate_pages(query, pages, None if tokens is None else validate_count("tokens", tokens))
    slots = take_slots(slots, key_pages.shape[1], query.device)
    query = query.to(dtype_of(query))
    if key_pages.dtype != query.dtype or value_pages.dtype != query.dtype:  # autocast: only what is read is cast
        key_pages, value_pages = (x.index_select(1, slots.int()).to(query.dtype) for x in (key_pages, value_pages))
        slots = torch.arange(slots.numel(), dtype=torch.int32, device=query.device)
    logit_scale = take_scale(logit_scale, query.shape[1], query.device)
    return attend_pages(query, key_pages, value_pages, slots, turn, logit_scale, bias, scale)


def attend_pages(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """The operator on arguments of one dtype; query heads that share a key head become frames of their own."""
    validate_plan(query, slots, turn, logit_scale, bias)
    frames, heads, shared = query.shape[1], query.shape[3], query.shape[3] // key_pages.shape[3]
    if scale is not None:
        logit_scale = logit_scale * (take_number("scale", scale) * math.sqrt(query.shape[-1]))
    if shared > 1:  # no key is copied: [B, F, S, H, D] becomes [B, F * shared, S, H / shared, D]
        query = query.unflatten(3, (-1, shared)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        by_head = turn.expand(-1, -1, heads, -1, -1) if turn.shape[2] == 1 else turn
        turn = by_head.unflatten(2, (-1, shared)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        logit_scale = logit_scale.repeat_interleave(shared)
        bias = None if bias is None else bias.repeat_interleave(shared, 0)
    plan = [x if x is None else x.contiguous() for x in (slots, turn, logit_scale, bias)]
    out = torch.ops.flexkern.frame_attention(query.contiguous(), key_pages, value_pages, *plan)
    return out if shared == 1 else out.unflatten(1, (frames, shared)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


def frame_turns(
    query_frames: Sequence[int] | Tensor, key_frames: Sequence[int] | Tensor, *, head_dim: int, heads: int = 1,
    policy: str | Preset | PositionPolicy = "self-forcing", target: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ``attention`` needs to know of frames at these indices under a policy.

    Angles are computed in float64 on the host, and reduced mod 2 pi; torch.compile breaks its graph here.

    Args:
        query_frames: Indices in time of the F query frames: a sequence, an array or a tensor.
        key_frames: Indices in time of the R key frames.
        head_dim: D.
        heads: H, of the query; only mode jitter has angles of its own per head.
        policy: A ``PositionPolicy``, a preset or its name.
        target: Frames of the whole video, if known.
        device: Of the results.

    Returns:
        turn [F, R, G, T, 2] and logit_scale [F], float32.

    Raises:
        ValueError: An argument does not fit, or as ``PositionPolicy.phases``.
        TypeError: Frames are not integers.
        NotImplementedError: It is called inside torch.export.
    """
    turn, logit_scale, _ = on_host(
        plan_frames, query_frames, key_frames, None, head_dim=head_dim, heads=heads, policy=policy, target=target,
        device=device, is_causal=False,
    )  # fmt: skip
    return turn, logit_scale


def turn_place(x: Tensor, rows: int, columns: int, *, pairs: Pairs) -> Tensor:
    """x turned by the row and the column of each token, as Wan turns query and key, with time left out.

    The temporal pairs come back bit for bit. Angles and products are in float64, as in Wan's ``rope_apply``, and each
    value is rounded once.

    Args:
        x: [B, F * S, H, D] or [B, F, S, H, D]; S = rows * columns, row after row, D even.
        rows: Rows of tokens of a frame.
        columns: Columns of tokens of a frame.
        pairs: How channel pairs lie, as in ``attention``; they come back as they were.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: An argument does not fit; the message names it.
        TypeError: x is not a tensor.
    """
    validate_pairs(pairs, needed=True)
    rows, columns = validate_count("rows", rows), validate_count("columns", columns)
    validate_places(x, rows, columns)
    split = pairs == "split"
    real, imag = x.unflatten(-1, (2, -1)).unbind(-2) if split else x.unflatten(-1, (-1, 2)).unbind(-1)
    angle = place_angles(rows, columns, x.shape[-1], device=x.device)
    angle = angle.repeat(x.shape[-3] // (rows * columns), 1)[:, None]
    cos, sin, still = angle.cos(), angle.sin(), x.shape[-1] // 2 - angle.shape[-1]
    a, b = real[..., still:].double(), imag[..., still:].double()
    real = torch.cat((real[..., :still], (a * cos - b * sin).to(x.dtype)), dim=-1)
    imag = torch.cat((imag[..., :still], (a * sin + b * cos).to(x.dtype)), dim=-1)
    return torch.cat((real, imag), dim=-1) if split else torch.stack((real, imag), dim=-1).flatten(-2)
