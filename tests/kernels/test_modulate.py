import pytest
import torch
from tokens import DTYPES, SHAPES

from flexkern.kernels import reference
from flexkern.kernels.pointwise.modulate import modulate
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def make_inputs(shape, dtype, device, offset=1.0):
    """x; scale and shift as views out of one tensor, as a block makes them."""
    batch, frames, tokens, channels = shape
    x = (torch.randn(shape, device=device) + offset) * torch.logspace(-4, 2, tokens, device=device)[:, None]
    parameters = torch.randn(batch, frames, 6, channels, device=device).to(dtype)
    return x.to(dtype), parameters[:, :, 1], parameters[:, :, 4]


def check(x, scale, shift, **kwargs):
    actual = modulate(x, scale, shift, **kwargs)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    exact = reference.modulate(x.double(), scale.double(), shift.double(), **kwargs)
    entitled = reference.modulate(x.float(), scale.float(), shift.float(), **kwargs).to(x.dtype)
    assert_as_accurate(actual, exact, entitled)


@DTYPES
@SHAPES
def test_matches_oracle(shape, dtype, device):
    check(*make_inputs(shape, dtype, device))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.5])
def test_eps_counts(eps, device):
    check(*make_inputs((1, 1, 7, 192), torch.float32, device), eps=eps)


def test_a_large_mean_does_not_cancel_the_variance(device):
    check(*make_inputs((1, 1, 200, 256), torch.float32, device, offset=30.0), eps=1e-12)


def test_scale_and_shift_have_strides_of_their_own(device):
    x, scale, _ = make_inputs((2, 3, 7, 160), torch.float32, device)
    shift = torch.randn(3, 2, 160, device=device).transpose(0, 1)
    check(x, scale, shift)
    check(x, shift, scale)
    check(x, scale[:1].expand(2, -1, -1), shift[:, :1].expand(-1, 3, -1))


def test_parameters_may_have_another_dtype(device):
    x, scale, shift = make_inputs((1, 2, 7, 192), torch.float32, device)
    check(x.bfloat16(), scale, shift)


@DTYPES
def test_a_constant_row_gives_the_shift(dtype, device):
    x, scale, shift = make_inputs((1, 2, 3, 160), dtype, device)
    x[:, :, 1] = 0
    x[:, :, 2] = 0.5
    out = modulate(x, scale, shift)
    assert torch.equal(out[:, :, 1], shift), "a mean of zeros is exactly zero"
    # sums of 0.5 are exact; a GPU's quotient by C may be 2 ulp off, which a vanishing variance multiplies by 1000
    off = 2 * torch.finfo(torch.float32).eps * 1e-6**-0.5 * (1 + scale.float()).abs()
    rounded = torch.finfo(dtype).eps * shift.float().abs()
    assert ((out[:, :, 2].float() - shift.float()).abs() <= off + rounded).all()


def test_tokens_do_not_see_each_other(device):
    x, scale, shift = make_inputs((1, 1, 33, 160), torch.float32, device)
    clean = modulate(x, scale, shift)
    x[0, 0, 5] = float("nan")
    out = modulate(x, scale, shift)
    assert out[0, 0, 5].isnan().all()
    others = torch.arange(33, device=device) != 5
    assert torch.equal(out[:, :, others], clean[:, :, others])


def test_strided_channels_are_refused(device):
    x, scale, shift = make_inputs((1, 1, 8, 8), torch.float32, device)
    with pytest.raises(ValueError, match=r"x must be contiguous, got shape \[1, 1, 8, 8\], strides \(64, 64, 1, 8\)"):
        modulate(x.transpose(2, 3), scale, shift)
    with pytest.raises(ValueError, match="channels of shift must be contiguous"):
        modulate(x, scale, torch.randn(1, 1, 16, device=device)[..., ::2])
