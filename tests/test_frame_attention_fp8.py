"""The fp8 attention kernel against float64 and against its own declared roundings."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexkern.kernels import quantize, reference
from flexkern.kernels.frame_attention_fp8 import frame_attention_fp8
from flexkern.kernels.tuned import Config
from flexkern.testing import assert_as_accurate

sys.path.insert(0, str(Path(__file__).parent))
import fp8  # noqa: E402

pytestmark = [fp8.NEEDED, pytest.mark.usefixtures("poisoned_memory")]
# small enough that small shapes cross tile, frame and program edges
SMALL = Config(block_m=32, block_n=32, num_warps=4, num_stages=1)
SHAPES = {  # B, F, S, H, D, R, G
    "one token": (1, 1, 1, 1, 64, 1, 1),
    "odd frames, two videos, an angle per head": (2, 2, 7, 2, 64, 3, 2),
    "a tile meets two frames, a short last tile of keys": (1, 3, 40, 1, 128, 2, 1),
    "whole tiles of keys": (1, 2, 64, 2, 64, 2, 1),
    "one frame": (1, 1, 33, 2, 128, 3, 1),
}


def make_inputs(b, f, s, h, d, r, g, dtype=torch.float32, bias=False) -> dict:
    """Arguments of frame_attention_fp8, every page with scales of its own; pages that no slot names hold NaN.

    A frame's first query is the largest, and one in its middle is 0.
    """
    time = 22 if d == 128 else 12
    slots = torch.randperm(r + 2)[:r].int()
    query = torch.randn(b, f, s, h, d) * torch.logspace(0.7, -1, s)[:, None, None]
    query[:, :, s // 2 + 1 : s // 2 + 2] = 0
    pages = torch.randn(2, b, r + 2, s, h, d)
    scales = torch.rand(2, b, r + 2, h) / 20 + 0.005
    unused = [page for page in range(r + 2) if page not in slots.tolist()]
    pages[:, :, unused] = scales[:, :, unused] = math.nan
    angle = torch.rand(f, r, g, time, dtype=torch.float64) * 40
    inputs = dict(
        query=query.to(dtype), key_pages=reference.to_e4m3(pages[0] / fp8.by_token(scales[0])),
        value_pages=reference.to_e4m3(reference.pack_values(pages[1] / fp8.by_token(scales[1]))),
        key_scale=scales[0], value_scale=scales[1], slots=slots,
        turn=torch.stack((angle.cos(), angle.sin()), dim=-1).float(), logit_scale=0.5 + torch.rand(f), bias=None,
    )  # fmt: skip
    if bias:
        inputs["bias"] = torch.randn(f, r) * 3
    return inputs


def numbers(inputs: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, P, S, H, D] that the pages stand for."""
    keys = inputs["key_pages"].to(dtype) * fp8.by_token(inputs["key_scale"])
    values = reference.unpack_values(inputs["value_pages"].to(dtype), keys.shape[2]) * fp8.by_token(
        inputs["value_scale"]
    )
    return keys, values


def exact(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle in float64 on what the pages hold: their own rounding is no error of attention."""
    keys, values = numbers(inputs, torch.float64)
    plan = {name: inputs[name] for name in ("slots", "turn", "logit_scale", "bias")}
    return reference.frame_attention(inputs["query"].double(), keys, values, **plan)


def declared(inputs: dict) -> torch.Tensor:
    """The kernel's declared numerics: turned query and P in e4m3, the output rounded, everything else in float32."""
    query, turn, slots = inputs["query"], inputs["turn"], inputs["slots"].long()
    dim, outputs = query.shape[-1], []
    keys, values = (x[:, slots] for x in numbers(inputs, torch.float32))
    for f, factor in enumerate(inputs["logit_scale"]):
        row = query[:, f, None].float()
        scale = row.abs().amax(-1, keepdim=True) * factor * 2**0.5 / 448
        turned = reference.rotate(row, reference.pad_turn(turn[f], dim // 2)[:, None]) * factor
        turned = reference.to_e4m3(turned / scale.where(scale > 0, 1)).float() * scale
        score = torch.einsum("brqhd,brkhd->bhqrk", turned, keys) * (math.log2(math.e) / dim**0.5)
        if inputs["bias"] is not None:
            score = score + inputs["bias"][f][:, None] * math.log2(math.e)
        score = score.flatten(-2)
        pivot = score.amax(-1, keepdim=True).ceil() - 8
        weight = (score - pivot.nan_to_num(neginf=0)).exp2()
        out = torch.einsum("bhqk,bkhd->bqhd", reference.to_e4m3(weight).float(), values.flatten(1, 2))
        outputs.append(out / weight.sum(-1).clamp(min=1e-30).transpose(1, 2)[..., None])
    return torch.stack(outputs, dim=1).to(query.dtype)


def run(inputs: dict, device: str, config: Config = SMALL, programs: int = 3, **options):
    there = {name: x if x is None else x.to(device) for name, x in inputs.items()}
    out, lse = frame_attention_fp8(**there, config=config, programs=programs, **options)
    return out.cpu(), lse if lse is None else lse.cpu()


def check(out: torch.Tensor, inputs: dict) -> None:
    """By the accuracy rule; and where roundings are known one by one, far closer to them than they are to the truth."""
    truth, entitled = exact(inputs)[0], declared(inputs)
    assert_as_accurate(out, truth, entitled)
    if inputs["bias"] is None and out.dtype == torch.float32:
        # a last bit of float32 sends the odd number to the other of two codes
        assert (out - entitled).abs().mean() < 0.05 * (entitled - truth).abs().mean() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(shape, dtype, device):
    inputs = make_inputs(*SHAPES[shape], dtype)
    check(run(inputs, device)[0], inputs)


def test_what_e4m3_costs(device):
    """Against attention on normal numbers that were never rounded: 5.5 % of the output's root mean square."""
    inputs = make_inputs(1, 1, 128, 1, 128, 4, 1) | {"logit_scale": torch.ones(1)}
    inputs["query"] = torch.randn(1, 1, 128, 1, 128)
    pages = torch.randn(2, 1, 6, 128, 1, 128)
    inputs["key_scale"], inputs["value_scale"] = (torch.full((1, 6, 1), 2.0**-6) for _ in "kv")
    inputs["key_pages"] = reference.to_e4m3(pages[0] * 64)
    inputs["value_pages"] = reference.to_e4m3(reference.pack_values(pages[1] * 64))
    plan = {name: inputs[name] for name in ("slots", "turn", "logit_scale")}
    truth, _ = reference.frame_attention(inputs["query"].double(), *pages.double(), **plan)
    out, _ = run(inputs, device, config=Config(block_m=128, block_n=128, num_warps=4, num_stages=1))
    error = ((out - truth).square().mean() / truth.square().mean()).sqrt()
    assert 0.05 < error < 0.06, f"{error:.1%}"


def test_bias_and_log_sum_exp(device):
    inputs = make_inputs(1, 2, 40, 1, 64, 3, 1, bias=True)
    out, lse = run(inputs, device, want_lse=True)
    check(out, inputs)
    total = exact(inputs)[1]
    assert (lse - total).abs().max() < 0.02 * total.abs().max()


@pytest.mark.parametrize("programs", [1, 3, 5])
def test_hidden_frames_are_not_even_read(device, programs):
    inputs = make_inputs(1, 3, 20, 2, 64, 3, 1, bias=True)
    hidden = inputs["slots"].long()[1]
    inputs["bias"][:, 1] = -math.inf
    inputs["bias"][2] = -math.inf
    expected, _ = run(inputs, device, programs=programs)
    check(expected, inputs)
    for name in ("key_pages", "value_pages"):
        inputs[name].view(torch.uint8)[:, hidden] = 0x7F
    inputs["key_scale"][:, hidden] = inputs["value_scale"][:, hidden] = math.nan
    out, lse = run(inputs, device, programs=programs, want_lse=True)
    assert torch.equal(out, expected)
    assert (out[:, 2] == 0).all() and lse[:, 2].isneginf().all()


def test_tensor_descriptors_change_nothing(device):
    inputs = make_inputs(2, 2, 40, 2, 64, 3, 1)
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need compute capability 9.0")
    plain, through = run(inputs, device), run(inputs, device, config=replace(SMALL, tma=True))
    assert torch.equal(plain[0], through[0])


def test_any_number_of_programs(device):
    """Six tiles of three frames: from one program with all of them to one unit each. No cut rounds a weight anew."""
    inputs = make_inputs(1, 2, 40, 2, 64, 3, 1)
    whole, total = run(inputs, device, programs=1, want_lse=True)
    check(whole, inputs)
    for programs in (2, 7, 100):
        out, lse = run(inputs, device, programs=programs, want_lse=True)
        assert (out - whole).abs().max() < 1e-3 * whole.abs().max()
        torch.testing.assert_close(lse, total, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, run(inputs, device, programs=100)[0])


def test_physical_slots_do_not_matter(device):
    inputs = make_inputs(2, 2, 20, 2, 64, 3, 2, torch.bfloat16)
    order = torch.randperm(5)
    moved = dict(inputs, slots=order[inputs["slots"].long()].int())
    for name in ("key_pages", "value_pages", "key_scale", "value_scale"):
        moved[name] = torch.empty_like(inputs[name])
        moved[name].view(torch.uint8)[:, order] = inputs[name].view(torch.uint8)
    assert torch.equal(run(inputs, device)[0], run(moved, device)[0])


def test_a_scale_is_worth_what_it_says(device):
    """The same numbers under scales twice as large on one page: no bit changes."""
    inputs = make_inputs(1, 1, 20, 1, 64, 3, 1)
    page = inputs["slots"].long()[1]
    halved = dict(inputs)
    for name in ("key", "value"):
        stored = inputs[f"{name}_pages"].float().clamp(-200, 200)
        stored = torch.where(stored.abs() < 1, 0, stored)  # so that a half is a number of e4m3 as well
        inputs[f"{name}_pages"] = reference.to_e4m3(stored)
        halved[f"{name}_pages"], halved[f"{name}_scale"] = stored.clone(), inputs[f"{name}_scale"].clone()
        halved[f"{name}_pages"][:, page] /= 2
        halved[f"{name}_scale"][:, page] *= 2
        halved[f"{name}_pages"] = reference.to_e4m3(halved[f"{name}_pages"])
    out, other = run(inputs, device)[0], run(halved, device)[0]
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_address(device):
    inputs = make_inputs(1, 2, 16, 2, 64, 3, 1)
    with pytest.raises(AssertionError, match="must be contiguous"):
        run(inputs | {"query": inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)}, device)
    with pytest.raises(AssertionError, match="S_pad"):
        run(inputs | {"value_pages": inputs["key_pages"]}, device)


def test_refuses_a_chip_without_fp8(device, monkeypatch):
    monkeypatch.setattr(quantize, "arch_of", lambda device: 80)
    with pytest.raises(NotImplementedError):
        run(make_inputs(*SHAPES["one token"]), device)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [1, 3])
def test_the_tuned_tile_matches_the_oracle(frames):
    inputs = make_inputs(1, frames, 1560, 2, 128, 6, 1, torch.bfloat16)
    out, again = (frame_attention_fp8(**{k: v if v is None else v.cuda() for k, v in inputs.items()}) for _ in range(2))
    assert torch.equal(out[0], again[0])
    check(out[0].cpu(), inputs)
