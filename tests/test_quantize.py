import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flexkern.kernels import quantize, reference
from flexkern.kernels.common import dot

sys.path.insert(0, str(Path(__file__).parent))
import fp8  # noqa: E402

pytestmark = fp8.NEEDED
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = CODES.float()[CODES.float().isfinite()]


@triton.jit
def _round(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, quantize.to_e4m3(tl.load(x_ptr + offs)))


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs).T, tl.zeros([N, N], tl.float32)))


@triton.jit
def _order(weight_ptr, place_ptr, token_ptr, M: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(place_ptr + offs, quantize.in_value_order(tl.load(weight_ptr + offs)))
    tl.store(token_ptr + tl.arange(0, N), quantize.token_at(tl.arange(0, N)))


def rounded(x: torch.Tensor, device: str) -> torch.Tensor:
    padded = torch.zeros(triton.next_power_of_2(len(x)))
    padded[: len(x)] = x
    out = torch.empty(len(padded), dtype=torch.float8_e4m3fn, device=device)
    _round[(1,)](padded.to(device), out, N=len(padded))
    return out.cpu()[: len(x)]


def test_rounds_to_nearest_even_and_saturates(device):
    ordered = FINITE[FINITE >= 0].sort().values
    ties = (ordered[1:] + ordered[:-1]) / 2
    edges = torch.cat((ordered, ties, torch.tensor([460.0, 464, 480, 1e9, 3e38, torch.inf, 1e-9, 1e-40])))
    edges = torch.cat((edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(-1.0))))
    x = torch.cat((edges, -edges, torch.randn(500) * torch.logspace(-5, 3, 500)))
    actual, expected = rounded(x, device), reference.to_e4m3(x)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    assert rounded(torch.tensor([torch.nan]), device).float().isnan().all()


def test_every_number_survives_and_is_read_exactly(device):
    back = rounded(FINITE, device)
    assert torch.equal(back.view(torch.uint8), CODES[CODES.float().isfinite()].view(torch.uint8))
    a, b = (torch.randint(0, 255, (64, 64)).remainder(127).to(torch.uint8) for _ in "ab")
    a, b = (x.view(torch.float8_e4m3fn) for x in (a, b | 128))
    out = torch.empty(64, 64, device=device)
    _multiply[(1,)](a.to(device), b.to(device), out, N=64)
    torch.testing.assert_close(out.cpu().double(), a.double() @ b.double().T, rtol=1e-3, atol=0)


def test_weights_meet_their_values(device):
    weights = torch.randn(16, 64)
    places, tokens = torch.empty(16, 64, device=device), torch.empty(64, dtype=torch.int32, device=device)
    _order[(1,)](weights.to(device), places, tokens, M=16, N=64)
    assert torch.equal(tokens.cpu(), reference.value_order(64).int())
    assert torch.equal(places.cpu(), weights[:, tokens.cpu()])


def test_values_come_back_from_their_order():
    values = torch.randn(2, 3, 23, 2, 8)
    pages = reference.pack_values(values)
    assert pages.shape == (2, 3, 2, 8, 32)
    assert torch.equal(reference.unpack_values(pages, 23), values)
    assert pages.count_nonzero() == values.count_nonzero(), "zeros behind the last token"


def test_a_power_of_two_above():
    x = torch.tensor([1.0, 1.0000001, 0.75, 3.0, 2.0**-30, 0.0, 1e-38])
    expected = torch.tensor([1.0, 2.0, 1.0, 4.0, 2.0**-30, 2.0**-100, 2.0**-100])
    assert torch.equal(quantize.power_of_two(x), expected)


def test_no_key_saturates_and_the_bound_costs_no_accuracy():
    """A row with all its energy in one pair, turned onto one channel; then random rows against the tightest scale."""
    heads, dim = 3, 64
    weight = 1 + torch.randn(heads * dim).abs() * torch.tensor([0.1, 1, 5]).repeat_interleave(dim)
    scale = quantize.key_scale_bound(weight, heads)
    largest = weight.view(heads, dim).abs().amax(1)
    assert (largest * (heads * dim) ** 0.5 / scale <= 448).all()
    assert (largest * (heads * dim) ** 0.5 / scale > 448 / 2).all()

    key = torch.randn(1000, heads, dim) * weight.view(heads, dim)
    tight = key.abs().amax((0, 2)) / 448
    error = lambda s: (reference.to_e4m3(key / s[:, None]).float() * s[:, None] - key).square().mean((0, 2)).sqrt()
    assert (error(scale) <= 1.02 * error(tight)).all()
    relative = error(scale) / key.square().mean((0, 2)).sqrt()
    assert ((relative > 0.02) & (relative < 0.032)).all(), "what e4m3 costs: 2.6 % root mean square"


def test_scales_follow_what_was_seen():
    seen = torch.tensor([0.0, 10.0, 448.0, 1e-3])
    scale = quantize.scale_of(seen, torch.full((4,), 7.0))
    assert scale[0] == 7, "nothing was seen: the standing scale stays"
    reach = 448 * scale[1:] / seen[1:]
    assert (reach >= quantize.MARGIN).all() and (reach < 2 * quantize.MARGIN).all()


@pytest.mark.parametrize("slots", [[3, 1], [-1, 2], [-1, -5]], ids=str)
def test_renewing_leaves_other_pages_alone(slots):
    scale, seen = torch.rand(2, 1, 5, 3), torch.rand(2, 1, 5, 3) * 100  # layers, videos, pages, heads
    before, was = scale.clone(), seen.clone()
    quantize.renew_value_scales(scale, seen, torch.tensor(slots, dtype=torch.int32))
    written = [slot for slot in slots if slot >= 0]
    others = [page for page in range(5) if page not in written]
    assert torch.equal(scale[:, :, others], before[:, :, others]) and torch.equal(seen[:, :, others], was[:, :, others])
    assert torch.equal(scale[:, :, written], quantize.scale_of(was, before)[:, :, written])
    assert (seen[:, :, written] == 0).all()


def test_chips_without_fp8_are_refused(monkeypatch):
    quantize.refuse_without_fp8(torch.device("cpu"))
    monkeypatch.setattr(quantize, "arch_of", lambda device: 80)
    with pytest.raises(NotImplementedError, match="capability 8.9"):
        quantize.refuse_without_fp8(torch.device("cpu"))
    monkeypatch.setattr(quantize, "arch_of", lambda device: 89)  # which stands for 8.6 too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(NotImplementedError, match="capability 8.9"):
        quantize.refuse_without_fp8(torch.device("cuda"))
