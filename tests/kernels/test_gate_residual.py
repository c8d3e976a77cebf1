import pytest
import torch
from tokens import DTYPES, SHAPES

from flexkern.kernels import reference
from flexkern.kernels.pointwise.gate_residual import gate_residual
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def magnitudes(tokens, device):
    """Powers of two, so that dividing by them again is exact."""
    return torch.logspace(-8, 6, tokens, base=2, device=device).log2().round().exp2()[:, None]


def make_inputs(shape, dtype, device):
    """x, update, and gate as a view out of the six parameters of a block."""
    batch, frames, tokens, channels = shape
    x, update = (torch.randn(shape, device=device) * magnitudes(tokens, device) for _ in range(2))
    gate = torch.randn(batch, frames, 6, channels, device=device).to(dtype)[:, :, 2]
    return x.to(dtype), update.to(dtype), gate


def check(x, update, gate):
    actual = gate_residual(x, update, gate)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    exact = reference.gate_residual(x.double(), update.double(), gate.double())
    entitled = reference.gate_residual(x.float(), update.float(), gate.float()).to(x.dtype)
    size = magnitudes(x.shape[2], x.device).to(x.dtype)  # every token counts alike
    assert_as_accurate(actual / size, exact / size, entitled / size)


@DTYPES
@SHAPES
def test_matches_oracle(shape, dtype, device):
    check(*make_inputs(shape, dtype, device))


def test_gate_has_strides_of_its_own(device):
    x, update, _ = make_inputs((2, 3, 7, 160), torch.float32, device)
    gate = torch.randn(3, 2, 160, device=device).transpose(0, 1)
    check(x, update, gate)
    check(x, update, gate[:1].expand(2, -1, -1))


def test_gate_may_have_another_dtype(device):
    x, update, gate = make_inputs((1, 2, 7, 192), torch.float32, device)
    check(x.bfloat16(), update.bfloat16(), gate)


@DTYPES
def test_a_closed_gate_changes_nothing(dtype, device):
    x, update, gate = make_inputs((1, 2, 7, 160), dtype, device)
    assert torch.equal(gate_residual(x, update, torch.zeros_like(gate)), x)


def test_inputs_are_left_alone(device):
    inputs = make_inputs((1, 2, 7, 160), torch.float32, device)
    before = [t.clone() for t in inputs]
    gate_residual(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_strided_channels_are_refused(device):
    x, update, gate = make_inputs((1, 1, 8, 8), torch.float32, device)
    strided = torch.randn(1, 1, 16, device=device)[..., ::2]
    refused = {"x": (x.mT, update, gate), "update": (x, update.mT, gate), "gate": (x, update, strided)}
    for name, inputs in refused.items():
        with pytest.raises(ValueError, match=f"{name} must be contiguous, got shape"):
            gate_residual(*inputs)
