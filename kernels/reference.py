"""Torch oracle for every kernel: the definition of correct, written for reading, not speed.

Each function computes in the dtype of its inputs. A test calls it three times: in float64 for the truth, in float32
with one rounding at the end for the error the kernel is entitled to, and in the working dtype as the ``reference``
backend.

Layout. A head's D channels are D / 2 pairs. Checkpoints interleave them, (re, im, re, im, ...); queries and keys that
have passed ``norm_rope_write`` hold all real parts, then all imaginary parts, so that a turn is elementwise. Dot
products do not see the permutation. Pairs are ordered time, row, column. A *turn* is a (cos, sin) pair of a rotation.

Shapes: B batch, F frames being computed, R frames read, P pages, S tokens of a frame, H heads, D head dim, T temporal
pairs, G = 1 or H, C = H * D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square along the last dimension, times weight: x [..., C], weight [C]."""
    return x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * weight


def split_pairs(x: Tensor) -> Tensor:
    """Channels from interleaved pairs to [all real | all imaginary]: [..., D] -> [..., D]."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D / 2]) by the angle whose cosine and sine are turn[..., i, :].

    x: [..., D], split layout. turn: [..., D / 2, 2], broadcast against x. Returns x's shape and dtype.
    """
    cos, sin = turn.to(x.dtype).unbind(-1)
    real, imag = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((real * cos - imag * sin, real * sin + imag * cos), dim=-1)


def pad_turn(turn: Tensor, pairs: int, *, front: bool = False) -> Tensor:
    """Extend turn [..., n, 2] to ``pairs`` pairs with no rotation (cos 1, sin 0), behind it or in front of it."""
    missing = pairs - turn.shape[-2]
    still = torch.stack((turn.new_ones(missing), turn.new_zeros(missing)), dim=-1).expand(*turn.shape[:-2], missing, 2)
    return torch.cat((still, turn) if front else (turn, still), dim=-2)


def norm_rope_write(
    query: Tensor | None,  # [B, F, S, H, D], interleaved pairs; None writes the pages only
    key: Tensor,  # [B, F, S, H, D], interleaved pairs
    value: Tensor,  # [B, F, S, H, D]
    query_weight: Tensor,  # [C]
    key_weight: Tensor,  # [C]
    place_turn: Tensor,  # [S, D / 2 - T, 2]
    key_pages: Tensor,  # [B, P, S, H, D], written in place
    value_pages: Tensor,  # [B, P, S, H, D], written in place
    slots: Tensor,  # [F] page of each frame; a negative slot is not written
    eps: float = 1e-6,
) -> Tensor | None:
    """Keys and values of each frame stand in its page; the query comes back ready for ``frame_attention``.

    Queries and keys are normalised over all heads and turned by place, not by time: what is stored never changes when a
    policy moves a frame. Returns the query [B, F, S, H, D] in split layout.
    """

    def ready(x: Tensor, weight: Tensor) -> Tensor:
        normed = rms_norm(x.flatten(-2), weight, eps).view_as(x)
        return rotate(split_pairs(normed), pad_turn(place_turn, x.shape[-1] // 2, front=True)[:, None])

    written = (slots >= 0).nonzero().flatten()
    pages = slots[written].long()
    key_pages[:, pages] = ready(key, key_weight)[:, written].to(key_pages.dtype)
    value_pages[:, pages] = value[:, written].to(value_pages.dtype)
    return None if query is None else ready(query, query_weight)


def frame_attention(
    query: Tensor,  # [B, F, S, H, D], as norm_rope_write returns it
    key_pages: Tensor,  # [B, P, S, H, D]
    value_pages: Tensor,  # [B, P, S, H, D]
    slots: Tensor,  # [R] pages to read
    turn: Tensor,  # [F, R, G, T, 2] rotation by (phase of query frame - phase of key frame)
    logit_scale: Tensor,  # [F] factor on the logits, before 1 / sqrt(D)
    bias: Tensor | None = None,  # [F, R] added to the logits; -inf hides a frame
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query frame over the listed pages, each at its own temporal distance.

        logit = logit_scale * <R(turn) q, k> / sqrt(D) + bias

    Returns the output [B, F, S, H, D] and the log-sum-exp of the logits [B, F, H, S]. A query that sees no frame gets
    zeros and -inf. Source: Wan 2.1 self-attention; turning the query by the difference equals turning query and key.
    """
    dim = query.shape[-1]
    outputs, sums = [], []
    for f in range(query.shape[1]):
        logits = []
        for r, slot in enumerate(slots.tolist()):
            turned = rotate(query[:, f], pad_turn(turn[f, r], dim // 2))
            score = torch.einsum("bqhd,bkhd->bhqk", turned, key_pages[:, slot].to(query.dtype))
            score = score * (logit_scale[f].to(query.dtype) / dim**0.5)
            logits.append(score if bias is None else score + bias[f, r].to(score.dtype))
        logits = torch.cat(logits, dim=-1)
        total = logits.logsumexp(-1)
        weights = (logits - total.masked_fill(total.isneginf(), 0).unsqueeze(-1)).exp()
        values = value_pages[:, slots.long()].flatten(1, 2).to(query.dtype)
        outputs.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
        sums.append(total)
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, scale and shift by frame: x [B, F, S, C], scale and shift [B, F, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def gate_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate, gate by frame: x and update [B, F, S, C], gate [B, F, C]."""
    return x + update * gate.unsqueeze(2)
