import pytest
import torch
from tokens import DTYPES

from flexkern.kernels import reference
from flexkern.kernels.pointwise.rms_norm import rms_norm
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SHAPES = [(2, 1, 192), (1, 7, 160), (33, 64), (16, 1536), (3, 5120), (80, 8)]


def make_inputs(shape, dtype, device):
    x = torch.randn(shape, device=device) * torch.logspace(-4, 2, shape[-2], device=device).unsqueeze(-1)
    weight = 1 + 0.1 * torch.randn(shape[-1], device=device)
    return x.to(dtype), weight.to(dtype)


def check(x, weight, **kwargs):
    actual = rms_norm(x, weight, **kwargs)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    exact = reference.rms_norm(x.double(), weight.double(), **kwargs)
    entitled = reference.rms_norm(x.float(), weight.float(), **kwargs).to(x.dtype)
    assert_as_accurate(actual, exact, entitled)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_oracle(shape, dtype, device):
    check(*make_inputs(shape, dtype, device))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.5])
def test_eps_counts(eps, device):
    check(*make_inputs((7, 192), torch.float32, device), eps=eps)


def test_weight_may_have_another_dtype(device):
    x, weight = make_inputs((7, 192), torch.float32, device)
    check(x.bfloat16(), weight)


@DTYPES
def test_a_zero_row_stays_zero(dtype, device):
    x, weight = make_inputs((4, 192), dtype, device)
    x[2] = 0
    assert (rms_norm(x, weight)[2] == 0).all()


def test_rows_do_not_see_each_other(device):
    x, weight = make_inputs((33, 160), torch.float32, device)
    x[5] = float("nan")
    out = rms_norm(x, weight)
    assert out[5].isnan().all()
    others = torch.arange(33, device=device) != 5
    assert torch.equal(out[others], rms_norm(x[others], weight))


def test_strided_channels_are_refused(device):
    with pytest.raises(ValueError, match="x must be contiguous, got shape"):
        rms_norm(torch.ones(8, 4, device=device).T, torch.ones(8, device=device))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        rms_norm(torch.ones(8, 4, device=device), torch.ones(8, device=device)[::2])
