import pytest
import torch
from tokens import DTYPES

from flexkern.kernels import reference
from flexkern.kernels.vae.add_norm_silu import add_norm_silu
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SHAPES = [(1, 1, 1, 1, 96), (2, 3, 5, 7, 96), (1, 2, 3, 11, 192), (1, 1, 3, 2, 384), (2, 4, 1, 33, 8)]


def make_inputs(shape, dtype, device, addend=True, past=True):
    batch, count, height, width, channels = shape
    scale = torch.logspace(-5, 2, height * width, device=device).view(height, width, 1)
    x, added = scale * torch.randn(2, *shape, device=device)
    gamma = 1 + 0.3 * torch.randn(channels, device=device)
    before = torch.randn(batch, 2, height, width, channels, device=device)
    return x.to(dtype), added.to(dtype) if addend else None, gamma.to(dtype), before.to(dtype) if past else None


def check(x, addend, gamma, past):
    given = x.clone()
    total, buffer, kept = add_norm_silu(x, addend, gamma, past)
    assert total is x and {total.dtype, buffer.dtype, kept.dtype} == {x.dtype}
    summed = given if addend is None else (given.float() + addend.float()).to(x.dtype)
    assert torch.equal(total, summed)
    wide = lambda dtype: [None if each is None else each.to(dtype) for each in (gamma, past)]
    exact = reference.add_norm_silu(summed.double(), None, *wide(torch.float64))[1]
    entitled = reference.add_norm_silu(summed.float(), None, *wide(torch.float32))[1].to(x.dtype)
    assert buffer.shape == exact.shape
    assert_as_accurate(buffer[:, 2:], exact[:, 2:], entitled[:, 2:])
    assert torch.equal(buffer[:, :2], torch.zeros_like(buffer[:, :2]) if past is None else past)
    assert torch.equal(kept, buffer[:, -2:])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_oracle(shape, dtype, device):
    check(*make_inputs(shape, dtype, device))


@pytest.mark.parametrize("addend", [True, False])
@pytest.mark.parametrize("past", [True, False])
def test_with_and_without_addend_and_past(addend, past, device):
    check(*make_inputs((2, 3, 2, 5, 96), torch.bfloat16, device, addend, past))


def test_the_oracle_adds(device):
    x, addend, gamma, past = make_inputs((1, 2, 2, 3, 8), torch.float32, device)
    total, buffer, kept = reference.add_norm_silu(x, addend, gamma, past)
    again = reference.add_norm_silu(x + addend, None, gamma, past)
    assert torch.equal(total, x + addend) and torch.equal(buffer, again[1]) and torch.equal(kept, again[2])


def test_without_an_addend_x_is_only_read(device):
    x, _, gamma, past = make_inputs((2, 3, 2, 5, 96), torch.float32, device)
    given = x.clone()
    add_norm_silu(x, None, gamma, past)
    assert torch.equal(x, given)


@DTYPES
def test_a_zero_place_stays_zero_and_a_tiny_one_is_not_blown_up(dtype, device):
    x, _, gamma, past = make_inputs((1, 2, 1, 4, 96), dtype, device)
    x[:, :, :, 1] = 0
    x[:, 0, 0, 2] = 1e-30 if dtype != torch.float16 else 0
    buffer = add_norm_silu(x, None, gamma, past)[1]
    assert (buffer[:, 2:, :, 1] == 0).all() and buffer[0, 2, 0, 2].float().abs().max() < 1e-14


def test_large_features_pass_through(device):
    x, _, gamma, past = make_inputs((1, 1, 1, 2, 96), torch.float32, device)
    x[...], gamma[...] = 0, 1  # each device draws other numbers
    x[..., 0], x[..., 1] = 1e15, -1e15
    buffer = add_norm_silu(x, None, gamma, past)[1]
    assert torch.isfinite(buffer).all() and buffer[0, 2, 0, 0, 0] > 3 and -0.3 < buffer[0, 2, 0, 0, 1] < 0


def test_places_do_not_see_each_other(device):
    x, addend, gamma, past = make_inputs((2, 3, 3, 7, 96), torch.float32, device)
    x[1, 2, 1, 3] = float("nan")
    buffer = add_norm_silu(x, addend, gamma, past)[1]
    spoiled = buffer.isnan().any(-1)
    assert spoiled.sum() == 1 and spoiled[1, 4, 1, 3]


def test_pieces_follow_on_each_other(device):
    x, addend, gamma, past = make_inputs((2, 5, 2, 3, 96), torch.bfloat16, device)
    whole = add_norm_silu(x.clone(), addend, gamma, past)[1]
    pieces, kept = [], past
    for one, two in zip(x.split((1, 1, 3), dim=1), addend.split((1, 1, 3), dim=1), strict=True):
        _, buffer, kept = add_norm_silu(one.clone(), two.contiguous(), gamma, kept)
        pieces.append(buffer[:, 2:])
    assert torch.equal(torch.cat(pieces, dim=1), whole[:, 2:]) and torch.equal(kept, whole[:, -2:])


def test_a_piece_of_a_longer_video_is_taken_where_it_lies(device):
    x, _, gamma, past = make_inputs((2, 5, 2, 3, 96), torch.float32, device)
    part = x[:, 1:4]
    assert not part.is_contiguous()
    assert torch.equal(add_norm_silu(part, None, gamma, past)[1], add_norm_silu(part.clone(), None, gamma, past)[1])
    other = torch.randn(part.shape, device=device)
    expected = add_norm_silu(other.clone(), part.clone(), gamma, past)[1]
    assert torch.equal(add_norm_silu(other, part, gamma, past)[1], expected)


def test_strided_tensors_are_refused(device):
    x, addend, gamma, past = make_inputs((1, 2, 2, 3, 8), torch.float32, device)
    with pytest.raises(ValueError, match="x must be contiguous, got shape"):
        add_norm_silu(x.transpose(2, 3), addend, gamma, past)
    for name, wrong in (
        ("addend", (x, addend.transpose(2, 3), gamma, past)),
        ("gamma", (x, addend, x[0, 0, :, 0, 0], past)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            add_norm_silu(*wrong)
    with pytest.raises(ValueError, match="past must be contiguous"):
        add_norm_silu(x, addend, gamma, past.transpose(2, 3))
