"""The oracle against the textbook: complex rotations, concatenated keys, torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from flexkern.kernels import reference

B, N, S, H, D = 2, 3, 7, 4, 16  # batch, frames, tokens, heads, head dim: 8 pairs, 4 of them temporal
TIME = 4
double = {"dtype": torch.float64}


def turn_of(angle):
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def as_complex(x):
    """Interleaved pairs as complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def test_rotate_is_a_complex_product_on_split_pairs():
    x, angle = torch.randn(5, D, **double), torch.randn(5, D // 2, **double) * 9
    expected = as_complex(x) * torch.polar(torch.ones_like(angle), angle)
    rotated = reference.rotate(reference.split_pairs(x), turn_of(angle))
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1))


def test_pad_turn_leaves_the_added_pairs_alone():
    x = torch.randn(D, **double)
    turned = reference.rotate(x, reference.pad_turn(turn_of(torch.ones(TIME, **double)), D // 2))
    still = torch.cat((torch.arange(TIME, D // 2), torch.arange(D // 2 + TIME, D)))
    assert torch.equal(turned[still], x[still])
    turned = reference.rotate(x, reference.pad_turn(turn_of(torch.ones(TIME, **double)), D // 2, front=True))
    assert torch.equal(turned[:TIME], x[:TIME])
    assert not torch.isclose(turned[TIME : D // 2], x[TIME : D // 2]).any()


def written(slots, query=True):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, B, N, S, H, D, **double)
    q_weight, k_weight = torch.randn(2, H * D, **double)
    place = torch.randn(S, D // 2 - TIME, **double)
    pages = torch.full((2, B, 6, S, H, D), math.nan, **double)
    out = reference.norm_rope_write(
        q if query else None, k, v, q_weight, k_weight, turn_of(place), *pages, torch.tensor(slots)
    )
    angle = torch.cat((torch.zeros(S, TIME, **double), place), dim=-1)[:, None]
    normed = [F.rms_norm(x.flatten(-2), (H * D,), w, eps=1e-6).view_as(x) for x, w in ((q, q_weight), (k, k_weight))]
    turned = [as_complex(x) * torch.polar(torch.ones_like(angle), angle) for x in normed]
    return out, pages, [torch.cat((t.real, t.imag), dim=-1) for t in turned], v


def test_norm_rope_write_fills_its_pages_and_no_other():
    out, (keys, values), (query, key), value = written([4, 0, 3])
    torch.testing.assert_close(out, query)
    torch.testing.assert_close(keys[:, [4, 0, 3]], key)
    torch.testing.assert_close(values[:, [4, 0, 3]], value)
    assert keys[:, [1, 2, 5]].isnan().all()
    assert values[:, [1, 2, 5]].isnan().all()


def test_norm_rope_write_skips_negative_slots_and_absent_queries():
    out, (keys, _), (_, key), _ = written([-1, 2, -1], query=False)
    assert out is None
    torch.testing.assert_close(keys[:, 2], key[:, 1])
    assert keys[:, [0, 1, 3, 4, 5]].isnan().all()


def attention_inputs(heads_of_turn=1):
    torch.manual_seed(2)
    query, (keys, values) = torch.randn(B, N, S, H, D, **double), torch.randn(2, B, 9, S, H, D, **double)
    query_angle = torch.randn(N, heads_of_turn, TIME, **double) * 5
    key_angle = torch.randn(5, heads_of_turn, TIME, **double) * 5
    return query, keys, values, torch.tensor([7, 2, 0, 8, 3]), query_angle, key_angle


@pytest.mark.parametrize("heads", [1, H])
def test_frame_attention_is_attention_over_turned_and_concatenated_keys(heads):
    query, keys, values, slots, query_angle, key_angle = attention_inputs(heads)
    scale = torch.tensor([1.0, 2.0, 0.5], **double)
    bias = torch.randn(N, 5, **double)
    bias[1, 2] = -math.inf
    keys[:, [1, 4, 5, 6]] = math.nan  # pages that are not listed
    turn = turn_of(query_angle[:, None] - key_angle)
    out, lse = reference.frame_attention(query, keys, values, slots, turn, scale, bias)

    pad = lambda angle: reference.pad_turn(turn_of(angle), D // 2)
    q = reference.rotate(query, pad(query_angle)[:, None]) * scale[:, None, None, None]
    k = reference.rotate(keys[:, slots], pad(key_angle)[:, None])
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, values[:, slots]))
    mask = bias.repeat_interleave(S, 0).repeat_interleave(S, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).view_as(out)
    torch.testing.assert_close(out, expected)
    sums = (q @ k.transpose(-1, -2) / D**0.5 + mask).logsumexp(-1)
    torch.testing.assert_close(lse, sums.unflatten(-1, (N, S)).transpose(1, 2))


def test_frame_attention_gives_zeros_where_nothing_is_seen():
    query, keys, values, slots, query_angle, key_angle = attention_inputs()
    bias = torch.zeros(N, 5, **double)
    bias[1] = -math.inf
    turn = turn_of(query_angle[:, None] - key_angle)
    out, lse = reference.frame_attention(query, keys, values, slots, turn, torch.ones(N, **double), bias)
    assert (out[:, 1] == 0).all()
    assert lse[:, 1].isneginf().all()
    assert out[:, [0, 2]].abs().min() > 0


def test_modulate_and_gate_residual():
    x, update = torch.randn(2, B, N, S, D, **double)
    scale, shift = torch.randn(2, B, N, D, **double)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        reference.modulate(x, scale, shift), normed * (1 + scale[:, :, None]) + shift[:, :, None]
    )
    torch.testing.assert_close(reference.gate_residual(x, update, scale), x + update * scale[:, :, None])
    total, out = reference.add_modulate(x, update, scale, shift, scale)
    torch.testing.assert_close(total, x + update * scale[:, :, None])
    torch.testing.assert_close(out, reference.modulate(total, shift, scale))
    weight, bias = shift[0, 0], scale[0, 0]
    total, out = reference.add_modulate(x, update, None, weight.expand(B, N, D), bias.expand(B, N, D), offset=0.0)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x + update, (D,), weight, bias, eps=1e-6))
