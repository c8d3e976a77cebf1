import sys
from pathlib import Path

import pytest
import torch

from flexkern.kernels import quantize, reference
from flexkern.kernels.norm_rope_write import norm_rope_write
from flexkern.kernels.norm_rope_write_fp8 import norm_rope_write_fp8
from flexkern.testing import assert_as_accurate

sys.path.insert(0, str(Path(__file__).parent))
import fp8  # noqa: E402

pytestmark = [fp8.NEEDED, pytest.mark.usefixtures("poisoned_outputs")]
SHAPES = {  # B, F, S, H, D, T
    "odd heads, two videos": (2, 2, 3, 5, 64, 12),
    "two blocks of values, the last one short": (1, 1, 69, 1, 32, 4),
    "one token": (1, 3, 1, 12, 128, 22),
    "odd head dim": (1, 2, 17, 3, 48, 8),
}
SMALL = SHAPES["odd heads, two videos"]
SPARE = 2  # pages more than frames
NAN = 0x7F


def make_inputs(shape, dtype, device) -> dict:
    """Arguments of norm_rope_write_fp8; pages hold NaN."""
    batch, frames, tokens, heads, dim, time = shape
    pages = frames + SPARE
    query, key, value = (torch.randn(batch, frames, tokens, heads, dim).to(dtype) for _ in range(3))
    angle = torch.rand(tokens, dim // 2 - time, dtype=torch.float64) * 40
    page = lambda *sizes: torch.full((batch, pages, *sizes), NAN, dtype=torch.uint8).view(torch.float8_e4m3fn)
    inputs = {
        "query": query, "key": key, "value": value,
        "query_weight": 1 + 0.1 * torch.randn(heads * dim), "key_weight": 1 + 0.1 * torch.randn(heads * dim),
        "place_turn": torch.stack((angle.cos(), angle.sin()), dim=-1).float(),
        "key_pages": page(tokens, heads, dim), "value_pages": page(heads, dim, -(-tokens // 16) * 16),
        "key_scale": 0.01 + torch.rand(batch, pages, heads) / 50,
        "value_scale": torch.randint(-7, -3, (batch, pages, heads)).float().exp2(),
        "value_seen": torch.zeros(batch, pages, heads),
        "slots": torch.randperm(pages)[:frames].int(),
    }  # fmt: skip
    return {name: x.to(device) for name, x in inputs.items()}


def run(inputs: dict, **options) -> torch.Tensor | None:
    return norm_rope_write_fp8(**inputs, **options)


def truth(inputs: dict, dtype: torch.dtype, **options) -> tuple[torch.Tensor, ...]:
    """The oracle's query and pages, computed and kept in dtype."""
    names = "query", "key", "value", "query_weight", "key_weight", "place_turn"
    there = {name: inputs[name] if inputs[name] is None else inputs[name].to(dtype) for name in names}
    pages = [torch.zeros(inputs["key_pages"].shape, dtype=dtype, device=inputs["key"].device) for _ in "kv"]
    slots = inputs["slots"]
    query = reference.norm_rope_write(**there, key_pages=pages[0], value_pages=pages[1], slots=slots, **options)
    return query, *pages


def written(inputs: dict) -> list[int]:
    return [slot for slot in inputs["slots"].tolist() if slot >= 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(shape, dtype, device):
    inputs = make_inputs(SHAPES[shape], dtype, device)
    run(inputs)
    at, tokens = written(inputs), inputs["key"].shape[2]
    scale = fp8.by_token(inputs["key_scale"])[:, at]
    exact, single = (truth(inputs, d)[1][:, at] for d in (torch.float64, torch.float32))
    codes = inputs["key_pages"][:, at]
    assert_as_accurate(codes.float() * scale, exact, reference.to_e4m3(single / scale).float() * scale)
    different = codes.view(torch.uint8) != reference.to_e4m3(single / scale).view(torch.uint8)
    assert different.float().mean() < 1e-2, "only what lies between two codes may go to the other one"

    values = reference.to_e4m3(truth(inputs, torch.float32)[2] / fp8.by_token(inputs["value_scale"]))
    expected = reference.pack_values(values.float())[:, at]
    assert torch.equal(inputs["value_pages"][:, at].float(), expected), "a power of two divides exactly"
    assert torch.equal(reference.unpack_values(inputs["value_pages"], tokens)[:, at].float(), values[:, at].float())


def test_the_query_is_that_of_the_other_kernel(device):
    inputs = make_inputs(SMALL, torch.bfloat16, device)
    names = "query", "key", "value", "query_weight", "key_weight", "place_turn", "slots"
    pages = [torch.zeros_like(inputs["key_pages"], dtype=torch.bfloat16) for _ in "kv"]
    query = norm_rope_write(**{n: inputs[n] for n in names}, key_pages=pages[0], value_pages=pages[1], eps=0.25)
    assert torch.equal(run(inputs, eps=0.25), query)
    keys = inputs["key_pages"].clone()
    assert run(inputs | {"query": None}, eps=0.25) is None
    assert torch.equal(inputs["key_pages"].view(torch.uint8), keys.view(torch.uint8))


@pytest.mark.parametrize("slots", [[-1, 2], [3, -1], [-1, -7]], ids=str)
def test_only_the_listed_pages_change(slots, device):
    inputs = make_inputs(SMALL, torch.bfloat16, device) | {"slots": torch.tensor(slots, dtype=torch.int32).to(device)}
    run(inputs)
    others = [page for page in range(inputs["key_pages"].shape[1]) if page not in slots]
    for name in ("key_pages", "value_pages"):
        assert (inputs[name].view(torch.uint8)[:, others] == NAN).all()
        assert inputs[name][:, written(inputs)].float().isfinite().all()
    assert (inputs["value_seen"][:, others] == 0).all()


def test_records_the_largest_value_of_each_head(device):
    inputs = make_inputs(SHAPES["two blocks of values, the last one short"], torch.float32, device)
    slot = written(inputs)[0]
    for largest in (3.0, -70.0, 40.0):  # from the second on, more than the scale reaches
        inputs["value"].clamp_(-1, 1)[0, 0, -1, 0, 5] = largest
        run(inputs)
    assert inputs["value_seen"][0, slot].tolist() == [70.0]
    assert inputs["value_seen"].count_nonzero() == 1


def test_two_passes_find_the_scale(device):
    """Values that saturate at first; the next pass over the same pages is as good as any."""
    inputs = make_inputs(SMALL, torch.float32, device)
    inputs["value"] *= 1000
    inputs["value_scale"].fill_(quantize.FIRST_VALUE_SCALE)
    at, tokens, errors = written(inputs), inputs["key"].shape[2], []
    exact = truth(inputs, torch.float64)[2][:, at]
    for _ in range(2):
        quantize.renew_value_scales(inputs["value_scale"], inputs["value_seen"], inputs["slots"])
        run(inputs)
        stored = reference.unpack_values(inputs["value_pages"], tokens).double() * fp8.by_token(inputs["value_scale"])
        errors.append(((stored[:, at] - exact).square().mean() / exact.square().mean()).sqrt())
    assert errors[0] > 0.5 and 0.02 < errors[1] < 0.032


def test_a_key_that_is_too_large_saturates(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    inputs["key_scale"] /= 1000
    run(inputs)
    stored = inputs["key_pages"][:, written(inputs)].float()
    assert stored.isfinite().all() and stored.abs().max() == 448


def test_strided_inputs_are_refused(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    for name in ("query", "key", "value"):
        with pytest.raises(AssertionError, match="contiguous"):
            run(inputs | {name: inputs[name].transpose(2, 3).contiguous().transpose(2, 3)})
