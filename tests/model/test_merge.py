"""A weight that is not finite is an error that names the tensor, says where it began, and what to try."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_dicts import scaled_float8

from flexkern.finite import all_finite
from flexkern.model.weights import load_transformer

FILE = Path(__file__).parent.parent / "data" / "tiny_wan.safetensors"
KEY = "blocks.1.cross_attn.v.weight"


@pytest.fixture
def changed(tmp_path):
    """A file of the tiny weights with one number replaced."""

    def make(value, key=KEY, dtype=torch.float32):
        state = {name: tensor.to(dtype) for name, tensor in load_file(FILE).items()}
        state[key].view(-1)[-1] = value
        save_file(state, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_with_one_value_not_finite(changed, value, stored):
    dtype = str(stored).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"w.safetensors .*: {KEY} \({dtype}\) holds 1 of 65536 values not finite; the"
    ):
        load_transformer(changed(value, dtype=stored))


def test_what_overflows_in_float16_says_which_dtype_holds_it(changed):
    file = changed(-1e5, key="head.head.bias")
    with pytest.raises(ValueError, match="head.head.bias is not finite in float16: its largest value is 1e.05, and .*"
                       "ends at 6.55e.04; take dtype bfloat16 or float32"):  # fmt: skip
        load_transformer(file, dtype=torch.float16)
    assert load_transformer(file, dtype=torch.bfloat16).head.head.bias.min() < -9e4


def test_what_a_lora_makes_infinite_names_the_lora(tmp_path):
    save_file({"head.head.diff_b": torch.full((64,), 1e30)}, tmp_path / "wild.safetensors")
    assert load_transformer(FILE, lora=tmp_path / "wild.safetensors")
    with pytest.raises(
        ValueError, match="wild.safetensors makes head.head.bias not finite at scale 1e.10; .* too large"
    ):
        load_transformer(FILE, lora=tmp_path / "wild.safetensors", lora_scale=1e10)
    save_file({"head.head.diff_b": torch.full((64,), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="nan.safetensors makes head.head.bias not finite at scale 1; .* is damaged"):
        load_transformer(FILE, lora=[(tmp_path / "wild.safetensors", 0.5), tmp_path / "nan.safetensors"])
    with pytest.raises(ValueError, match="head.head.bias is not finite in float16: its largest value is 1e.30"):
        load_transformer(FILE, lora=tmp_path / "wild.safetensors", dtype=torch.float16)


def test_a_scale_that_is_nan(tmp_path):
    stored, _ = scaled_float8(load_file(FILE), lambda key, _: key == KEY)
    save_file(stored | {KEY.replace("weight", "scale_weight"): torch.tensor(float("nan"))}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"{KEY} .float32. holds 65536 of 65536 values not finite"):
        load_transformer(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 64, 1023])
def test_no_value_escapes_wherever_it_stands(dtype, count):
    assert all_finite(torch.zeros(0, dtype=dtype)) and all_finite(
        torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
    )
    for place in {0, count // 2, count - 1}:
        for value in (float("nan"), float("inf"), float("-inf")):
            tensor = torch.ones(count, dtype=dtype)
            tensor[place] = value
            assert not all_finite(tensor)
