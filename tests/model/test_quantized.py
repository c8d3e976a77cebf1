"""float8 is read with the scales beside it; every other form of quantisation is called by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_dicts import low_rank, peft, prefixed, scaled_float8, to_diffusers

from flexkern.cli.inspect import report
from flexkern.model.find import identify
from flexkern.model.weights import load_transformer, validate_transformer

FILE = Path(__file__).parent.parent / "data" / "tiny_wan.safetensors"


@pytest.fixture(scope="module")
def tiny():
    return load_file(FILE)


def in_blocks(key, tensor):
    return key.startswith("blocks.") and key.endswith(".weight") and tensor.dim() == 2


FORMS = {
    "comfy, per tensor": {},
    "comfy, prefixed": {"rename": lambda state: prefixed(state, "model.diffusion_model.")},
    "lightx2v, per row": {"rows": True, "leaf": "weight_scale"},
    "diffusers names": {"rename": to_diffusers},
    "comfy, newer": {"leaf": "weight_scale", "mark": lambda key: f"{key}.comfy_quant"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_applied_in_float32_and_rounded_once(tiny, tmp_path, form, dtype):
    options = dict(FORMS[form])
    rename, mark = options.pop("rename", dict), options.pop("mark", None)
    stored, exact = scaled_float8(tiny, in_blocks, **options)
    scaled = [key.removesuffix(".weight") for key in tiny if in_blocks(key, tiny[key])]
    extra = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} | {
        f"{key}.scale_input": torch.ones(()) for key in scaled
    }
    if mark:
        told = torch.frombuffer(bytearray(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        extra = {mark(key): told.clone() for key in scaled}
    file = tmp_path / "scaled.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in rename(stored | extra).items()}, file)
    state = load_transformer(file, dtype=dtype).state_dict()
    assert state.keys() == tiny.keys()
    for key, tensor in exact.items():
        assert torch.equal(state[key], tensor.to(dtype)), key
    assert "scaled float8" in validate_transformer(file)[0].container


def test_float8_without_scales_is_what_it_says(tiny, tmp_path):
    small = {key: t.to(torch.float8_e5m2) if in_blocks(key, t) else t for key, t in tiny.items()}
    save_file(small, tmp_path / "plain.safetensors")
    state = load_transformer(tmp_path / "plain.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(state[key], tensor.float()) for key, tensor in small.items())


def test_a_lora_is_added_to_the_scaled_weight(tiny, tmp_path):
    stored, exact = scaled_float8(tiny, in_blocks, rows=True)
    save_file(stored, tmp_path / "scaled.safetensors")
    pairs = low_rank(tiny)
    save_file(peft(pairs), tmp_path / "lora.safetensors")
    state = load_transformer(tmp_path / "scaled.safetensors", lora=tmp_path / "lora.safetensors", dtype=torch.float32)
    for module, (down, up) in pairs.items():
        expected = exact[f"{module}.weight"] + up @ down
        torch.testing.assert_close(state.state_dict()[f"{module}.weight"], expected, rtol=0, atol=2e-6)


def bytes_of(count=4):
    return torch.zeros(count, dtype=torch.uint8)


NAME = "blocks.0.self_attn.q"
OTHERS = {
    "nf4 or fp4 .bitsandbytes.": {
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": bytes_of(),
        f"{NAME}.weight": bytes_of(),
    },
    "int8 .bitsandbytes.": {f"{NAME}.SCB": torch.ones(256), f"{NAME}.weight": bytes_of().to(torch.int8)},
    "int8 with scales": {f"{NAME}.weight_scale": torch.ones(256, 1), f"{NAME}.weight": bytes_of().to(torch.int8)},
    "svdq": {f"{NAME}.qweight": bytes_of().to(torch.int8), f"{NAME}.wscales": torch.ones(2)},
    "GPTQ or AWQ": {f"{NAME}.qweight": bytes_of().to(torch.int32), f"{NAME}.qzeros": bytes_of().to(torch.int32)},
    "quanto": {f"{NAME}.weight._data": bytes_of(), f"{NAME}.weight._scale": torch.ones(2)},
    "nvfp4": {
        f"{NAME}.weight": bytes_of(),
        f"{NAME}.weight_scale": bytes_of(),
        f"{NAME}.weight_scale_2": torch.ones(1),
    },
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_forms_are_refused_by_name_from_headers(tiny, tmp_path, form):
    file = tmp_path / "small.safetensors"
    save_file({key: t for key, t in tiny.items() if not key.startswith(NAME)} | OTHERS[form], file)
    assert identify(file).kind == "transformer"
    for way in (validate_transformer, load_transformer):
        with pytest.raises(
            NotImplementedError, match=f"small.safetensors is quantised as {form}.*; supported: float32"
        ):
            way(file)


def test_scales_that_do_not_fit_are_refused(tiny, tmp_path):
    file = tmp_path / "blocks.safetensors"
    save_file(tiny | {f"{NAME}.weight_scale": torch.ones(2, 2)}, file)
    with pytest.raises(
        NotImplementedError, match=rf"in blocks: the scale of {NAME}.weight is \[2, 2\] for a weight \[256"
    ):
        load_transformer(file)
    save_file(tiny | {"blocks.0.nothing.scale_weight": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds a scale of blocks.0.nothing.weight, and no such tensor"):
        load_transformer(file)


def without(state, *endings):
    return {key: tensor for key, tensor in state.items() if not key.endswith(endings)}


MARKED = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
DROPPED = {
    "all, with the marker": lambda state: without(state | MARKED, ".scale_weight"),
    "one, with the marker": lambda state: without(state | MARKED, f"{NAME}.scale_weight"),
    "one, of neighbours": lambda state: without(state, f"{NAME}.scale_weight"),
    "all, with marks of layers": lambda state: (
        without(state, ".scale_weight") | {f"{NAME}.comfy_quant": bytes_of(), f"{NAME}.scale_input": torch.ones(())}
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_scale_that_is_missing_is_told_from_headers_and_never_taken_as_one(tiny, tmp_path, case):
    stored, _ = scaled_float8(tiny, in_blocks)
    file = tmp_path / "dropped.safetensors"
    save_file(DROPPED[case](stored), file)
    for way in (validate_transformer, load_transformer):
        with pytest.raises(
            ValueError,
            match=rf"dropped.safetensors holds float8 with .* tells, and lacks the scales of (1: {NAME}.weight;|20: )",
        ):
            way(file)
    lines = dict(report("transformer", file))
    assert lines["complete"].startswith("no: ") and "lacks the scales of" in lines["complete"] and "use" not in lines


def test_two_scales_of_a_weight_are_both_named(tiny, tmp_path):
    stored, _ = scaled_float8(tiny, in_blocks)
    file = tmp_path / "two.safetensors"
    save_file(stored | {f"{NAME}.weight_scale": torch.tensor([123.0])}, file)
    for way in (validate_transformer, load_transformer):
        with pytest.raises(
            ValueError, match=rf"two scales of {NAME}.weight, {NAME}.scale_weight and {NAME}.weight_scale"
        ):
            way(file)


def test_vectors_in_float8_beside_scaled_matrices_are_what_they_say(tiny, tmp_path):
    stored, exact = scaled_float8(tiny, in_blocks)
    key = "blocks.0.self_attn.norm_q.weight"
    small = {key: tiny[key].to(torch.float8_e4m3fn)}
    save_file(stored | small | MARKED, tmp_path / "norms.safetensors")
    state = load_transformer(tmp_path / "norms.safetensors", dtype=torch.float32).state_dict()
    assert torch.equal(state[key], small[key].float()) and torch.equal(state[f"{NAME}.weight"], exact[f"{NAME}.weight"])
