"""Torch oracle for every kernel: the definition of correct, written for reading, not speed.

Each function computes in the dtype of its inputs. Tests call it in float64 for the truth, and in float32 with one
rounding at the end for the error that the kernel is entitled to; the backend ``reference`` uses the model's dtype.

Layout. A head's D channels are D / 2 pairs. Checkpoints interleave them, (re, im, re, im, ...); after
``norm_rope_write`` a query or key holds all real channels, then all imaginary ones, so that a turn is elementwise. Dot
products do not depend on the order. Pairs are ordered time, row, column. A *turn* is a (cos, sin) pair of a rotation.

Letters: see the glossary (flexkern/docs/architecture.md).
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide x by its root mean square along the last dimension and multiply by weight.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square.

    Returns:
        [..., C] in x's dtype.
    """
    return x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * weight


def split_pairs(x: Tensor) -> Tensor:
    """Reorder channels [..., D] from interleaved pairs to [all real | all imaginary]."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D / 2]) by the angle whose cosine and sine are turn[..., i, :].

    x: [..., D], split layout. turn: [..., D / 2, 2], broadcast against x. Returns x's shape and dtype.
    """
    cos, sin = turn.to(x.dtype).unbind(-1)
    real, imag = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((real * cos - imag * sin, real * sin + imag * cos), dim=-1)


def pad_turn(turn: Tensor, pairs: int, *, front: bool = False) -> Tensor:
    """Extend turn [..., n, 2] to ``pairs`` pairs with no rotation (cos 1, sin 0), after it or in front of it."""
    missing = pairs - turn.shape[-2]
    still = torch.stack((turn.new_ones(missing), turn.new_zeros(missing)), dim=-1).expand(*turn.shape[:-2], missing, 2)
    return torch.cat((still, turn) if front else (turn, still), dim=-2)


def norm_rope_write(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    place_turn: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
) -> Tensor | None:
    """Write the keys and values of each frame to its page, and prepare the query for ``frame_attention``.

    Queries and keys are normalised over all heads and turned by place, not by time: what is stored never changes when a
    policy moves a frame.

    Args:
        query: [B, F, S, H, D], interleaved pairs; None writes the pages only.
        key: [B, F, S, H, D], interleaved pairs.
        value: [B, F, S, H, D].
        query_weight: [C], weight of the query's norm.
        key_weight: [C], weight of the key's norm.
        place_turn: [S, D / 2 - T, 2], cosine and sine for each place.
        key_pages: [B, P, S, H, D], written in place.
        value_pages: [B, P, S, H, D], written in place.
        slots: [F], the page of each frame; a negative slot is not written.
        eps: added to the mean square.

    Returns:
        The query [B, F, S, H, D] in split layout; None without a query.
    """

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        normed = rms_norm(x.flatten(-2), weight, eps).view_as(x)
        return rotate(split_pairs(normed), pad_turn(place_turn, x.shape[-1] // 2, front=True)[:, None])

    written = (slots >= 0).nonzero().flatten()
    pages = slots[written].long()
    key_pages[:, pages] = norm_rope(key, key_weight)[:, written].to(key_pages.dtype)
    value_pages[:, pages] = value[:, written].to(value_pages.dtype)
    return None if query is None else norm_rope(query, query_weight)


def frame_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    turn: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query frame over the listed pages, each at its own temporal distance.

        logit = logit_scale * <R(turn) q, k> / sqrt(D) + bias

    Source: Wan 2.1 self-attention; turning the query by the difference equals turning query and key.

    Args:
        query: [B, F, S, H, D], as ``norm_rope_write`` returns it.
        key_pages: [B, P, S, H, D].
        value_pages: [B, P, S, H, D].
        slots: [R], the pages to read.
        turn: [F, R, G, T, 2], rotation by the phase of the query frame minus that of the key frame.
        logit_scale: [F], a factor on the logits.
        bias: [F, R], added to the logits; -inf hides a frame.

    Returns:
        The output [B, F, S, H, D] and the log-sum-exp of the logits [B, F, H, S]; zeros and -inf for a query that sees
        no frame.
    """
    dim = query.shape[-1]
    outputs, sums = [], []
    for f in range(query.shape[1]):
        scores = []
        for r, slot in enumerate(slots.tolist()):
            turned = rotate(query[:, f], pad_turn(turn[f, r], dim // 2))
            score = torch.einsum("bqhd,bkhd->bhqk", turned, key_pages[:, slot].to(query.dtype))
            score = score * (logit_scale[f].to(query.dtype) / dim**0.5)
            scores.append(score if bias is None else score + bias[f, r].to(score.dtype))
        logits = torch.cat(scores, dim=-1)
        total = logits.logsumexp(-1)
        weights = (logits - total.masked_fill(total.isneginf(), 0).unsqueeze(-1)).exp()
        values = value_pages[:, slots.long()].flatten(1, 2).to(query.dtype)
        outputs.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
        sums.append(total)
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every token, then scale and shift by frame: LayerNorm(x) * (1 + scale) + shift.

    Args:
        x: [B, F, S, C].
        scale: [B, F, C].
        shift: [B, F, C].
        eps: added to the variance.

    Returns:
        [B, F, S, C] in x's dtype.
    """
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def gate_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Add an update, gated by frame: x + update * gate.

    Args:
        x: [B, F, S, C].
        update: [B, F, S, C].
        gate: [B, F, C].

    Returns:
        [B, F, S, C] in x's dtype.
    """
    return x + update * gate.unsqueeze(2)


def add_modulate(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Add an update, gated by frame, then normalise every token of the sum: LayerNorm(sum) * (offset + scale) + shift.

    Args:
        x: [B, F, S, C].
        update: [B, F, S, C].
        gate: [B, F, C], a factor on the update; None for 1.
        scale: [B, F, C].
        shift: [B, F, C].
        eps: added to the variance.
        offset: added to scale: 1 for a modulation, 0 for the weight of a layer norm.

    Returns:
        The sum, and its modulated norm, both [B, F, S, C] in x's dtype.
    """
    total = x + update if gate is None else gate_residual(x, update, gate)
    normed = F.layer_norm(total, total.shape[-1:], eps=eps)
    return total, normed * (offset + scale.unsqueeze(2)) + shift.unsqueeze(2)


def add_norm_silu(
    x: Tensor, addend: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, normalise, activate, and put the frames before in front: what a causal convolution of the VAE reads.

    Args:
        x: [B, T, H, W, C].
        addend: [B, T, H, W, C], None for zero.
        gamma: [C].
        past: [B, 2, H, W, C], None for zeros.

    Returns:
        The sum [B, T, H, W, C]; past, then silu(sum / |sum| * sqrt(C) * gamma), [B, T + 2, H, W, C]; its last two
        frames.
    """
    total = x if addend is None else x + addend
    length = total.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    new = F.silu(total / length * total.shape[-1] ** 0.5 * gamma)
    past = torch.zeros_like(new[:, :1]).repeat(1, 2, 1, 1, 1) if past is None else past
    buffer = torch.cat((past, new), dim=1)
    return total, buffer, buffer[:, -2:]


def causal_conv(buffer: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve over this frame, the two before and the eight places around, of which those outside are zero.

    Args:
        buffer: [B, T + 2, H, W, C], as ``add_norm_silu`` lays it out.
        weight: [N, C, 3, 3, 3]: taps in time, rows and columns.
        bias: [N].

    Returns:
        [B, T, H, W, N].
    """
    count, height, width = buffer.shape[1] - 2, *buffer.shape[2:4]
    padded = F.pad(buffer, (0, 0, 1, 1, 1, 1))
    out = bias.expand(buffer.shape[0], count, height, width, -1)
    for i, j, k in itertools.product(range(3), repeat=3):
        out = out + padded[:, i : i + count, j : j + height, k : k + width] @ weight[:, :, i, j, k].T
    return out


def to_bytes(x: Tensor) -> Tensor:
    """Colours of -1..1 as bytes: -1 becomes 0 and 1 becomes 255, what lies beyond is clamped.

    Args:
        x: [..., 3].

    Returns:
        uint8, of the same shape.
    """
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
