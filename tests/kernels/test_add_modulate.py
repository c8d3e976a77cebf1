import pytest
import torch
from tokens import DTYPES, SHAPES

from flexkern.kernels import reference
from flexkern.kernels.pointwise.add_modulate import add_modulate
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def make_inputs(shape, dtype, device, gated=True):
    """x and update of tokens of many sizes; gate, scale and shift as views out of one tensor, as a block makes them."""
    batch, frames, tokens, channels = shape
    size = torch.logspace(-4, 2, tokens, device=device)[:, None]
    x, update = ((torch.randn(shape, device=device) + 1.0) * size for _ in range(2))
    parameters = torch.randn(batch, frames, 6, channels, device=device).to(dtype)
    gate = parameters[:, :, 2] if gated else None
    return x.to(dtype), update.to(dtype), gate, parameters[:, :, 1], parameters[:, :, 4]


def check(inputs, **kwargs):
    x = inputs[0]
    actual = add_modulate(*inputs, **kwargs)
    cast = lambda dtype: [t if t is None else t.to(dtype) for t in inputs]
    exact = reference.add_modulate(*cast(torch.float64), **kwargs)
    entitled = reference.add_modulate(*cast(torch.float32), **kwargs)
    for one, truth, due in zip(actual, exact, entitled, strict=True):
        assert one.dtype == x.dtype and one.shape == x.shape
        assert_as_accurate(one, truth, due.to(x.dtype))


@DTYPES
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no-gate"])
@SHAPES
def test_matches_oracle(shape, gated, dtype, device):
    check(make_inputs(shape, dtype, device, gated))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.5])
def test_eps_counts(eps, device):
    check(make_inputs((1, 1, 7, 192), torch.float32, device), eps=eps)


def test_the_weight_of_a_layer_norm(device):
    x, update, _, weight, bias = make_inputs((2, 2, 7, 192), torch.float32, device, gated=False)
    weight, bias = (p[0, 0].expand(2, 2, -1) for p in (weight, bias))
    check((x, update, None, weight, bias), offset=0.0)
    _, out = add_modulate(x, update, None, weight, bias, offset=0.0)
    expected = torch.nn.functional.layer_norm(x + update, (192,), weight[0, 0], bias[0, 0], eps=1e-6)
    torch.testing.assert_close(out, expected)


def test_a_large_mean_does_not_cancel_the_variance(device):
    x, update, *rest = make_inputs((1, 1, 200, 256), torch.float32, device, gated=False)
    check((x + 30, update, *rest), eps=1e-12)


def test_gate_scale_and_shift_have_strides_of_their_own(device):
    x, update, gate, scale, _ = make_inputs((2, 3, 7, 160), torch.float32, device)
    shift = torch.randn(3, 2, 160, device=device).transpose(0, 1)
    check((x, update, gate, scale, shift))
    check((x, update, shift, gate, scale))
    check((x, update, scale, shift, gate))
    check((x, update, gate[:1].expand(2, -1, -1), scale[:, :1].expand(-1, 3, -1), shift))


def test_parameters_may_have_another_dtype(device):
    x, update, gate, scale, shift = make_inputs((1, 2, 7, 192), torch.float32, device)
    check((x.bfloat16(), update.bfloat16(), gate, scale, shift))
    check((x.bfloat16(), update.bfloat16(), gate.bfloat16(), scale, shift.bfloat16()))


def test_the_norm_is_of_the_sum_before_it_is_rounded(device):
    x = torch.full((1, 1, 1, 64), 256.0, device=device).bfloat16()
    update = torch.linspace(-0.4, 0.4, 64, device=device).bfloat16()[None, None, None]
    scale = torch.zeros(1, 1, 64, device=device)
    total, out = add_modulate(x, update, None, scale, scale)
    assert torch.equal(total, x), "256 and less than half a step"
    assert out.float().std() > 0.9, "the update is still in the norm"


def test_inputs_are_left_alone_and_tokens_do_not_see_each_other(device):
    inputs = make_inputs((1, 1, 33, 160), torch.float32, device)
    before = [t.clone() for t in inputs]
    clean = add_modulate(*inputs)
    assert all(map(torch.equal, inputs, before))
    inputs[1][0, 0, 5] = float("nan")
    others = torch.arange(33, device=device) != 5
    for one, other in zip(add_modulate(*inputs), clean, strict=True):
        assert one[0, 0, 5].isnan().all() and torch.equal(one[:, :, others], other[:, :, others])


def test_strided_channels_are_refused(device):
    x, update, gate, scale, shift = make_inputs((1, 1, 8, 8), torch.float32, device)
    strided = torch.randn(1, 1, 16, device=device)[..., ::2]
    refused = {
        "x": (x.mT, update, gate, scale, shift), "update": (x, update.mT, gate, scale, shift),
        "gate": (x, update, strided, scale, shift), "scale": (x, update, gate, strided, shift),
        "shift": (x, update, gate, scale, strided),
    }  # fmt: skip
    for name, inputs in refused.items():
        with pytest.raises(ValueError, match=f"{name} must be contiguous, got shape"):
            add_modulate(*inputs)
