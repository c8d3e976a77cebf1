"""LoRAs of every trainer change the tensors that they mean, several add up, and other forms are called by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_dicts import flattened, low_rank, peft, to_diffusers

from flexkern.model.checkpoint import Checkpoint
from flexkern.model.lora import listed, read_lora
from flexkern.model.weights import load_transformer

FILE = Path(__file__).parent.parent / "data" / "tiny_wan.safetensors"


@pytest.fixture(scope="module")
def tiny():
    return load_file(FILE)


def merged(lora, scale=1.0, dtype=torch.float32):
    return load_transformer(FILE, lora=lora, lora_scale=scale, dtype=dtype).state_dict()


def every_module(tiny, rank=2):
    """down and up for every linear layer and convolution of the model, those outside of blocks as well."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator) / 16
    weights = {key: tensor for key, tensor in tiny.items() if key.endswith(".weight") and tensor.dim() > 1}
    return {
        key.removesuffix(".weight"): (draw(rank, *t.shape[1:]), draw(t.shape[0], rank)) for key, t in weights.items()
    }


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_"])
@pytest.mark.parametrize("theirs", [False, True])
def test_flat_names_reach_every_module(tiny, tmp_path, prefix, theirs):
    pairs = every_module(tiny)
    assert {"text_embedding.0", "time_projection.1", "head.head", "patch_embedding", "blocks.1.ffn.2"} <= pairs.keys()
    named = pairs
    if theirs:
        renamed = to_diffusers({f"{module}.weight": pair for module, pair in pairs.items()})
        named = {key.removesuffix(".weight"): pair for key, pair in renamed.items()}
    save_file(flattened(named, prefix, alpha=1.0), tmp_path / "flat.safetensors")
    state = merged(tmp_path / "flat.safetensors")
    for module, (down, up) in pairs.items():
        weight = tiny[f"{module}.weight"]
        expected = weight + 0.5 * (up @ down.flatten(1)).view(weight.shape)
        torch.testing.assert_close(state[f"{module}.weight"], expected, rtol=0, atol=2e-6)


def test_blocks_of_two_digits_and_unknown_modules_keep_their_names(tmp_path, tiny):
    one, two = low_rank(tiny)["blocks.0.ffn.0"], low_rank(tiny)["blocks.1.ffn.0"]
    save_file(flattened({"blocks.12.ffn.0": one, "blocks.0.nothing": two}), tmp_path / "flat.safetensors")
    assert read_lora(tmp_path / "flat.safetensors").keys() == {
        "blocks.12.ffn.0.weight",
        "lora_unet_blocks_0_nothing.weight",
    }
    with pytest.raises(ValueError, match="unknown targets 2: .*blocks.12.ffn.0.weight"):
        merged(tmp_path / "flat.safetensors")


def test_differences_of_weights_biases_norms_and_modulation_are_added(tiny, tmp_path):
    generator = torch.Generator().manual_seed(3)
    named = {
        "blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight", "blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight", "blocks.0.diff_m": "blocks.0.modulation",
        "blocks.1.modulation.diff": "blocks.1.modulation", "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }  # fmt: skip
    changes = {key: torch.randn(tiny[target].shape, generator=generator) for key, target in named.items()}
    pair = low_rank(tiny)["blocks.0.self_attn.q"]
    file = tmp_path / "lightx2v.safetensors"
    halves = {"blocks.0.self_attn.q.lora_down.weight": pair[0], "blocks.0.self_attn.q.lora_up.weight": pair[1]}
    save_file({f"diffusion_model.{key}": change for key, change in (changes | halves).items()}, file)
    state = merged(file, 0.5)
    for key, target in named.items():
        torch.testing.assert_close(state[target], tiny[target] + 0.5 * changes[key])
    expected = tiny["blocks.0.self_attn.q.weight"] + 0.5 * pair[1] @ pair[0]
    torch.testing.assert_close(state["blocks.0.self_attn.q.weight"], expected)
    assert set(named.values()) | {"blocks.0.self_attn.q.weight"} == {
        k for k in tiny if not torch.equal(state[k], tiny[k])
    }
    save_file({"blocks.0.ffn.0.diff": torch.ones(3, 3)}, file)
    with pytest.raises(ValueError, match=r"wrongly shaped 1: blocks.0.ffn.0.weight \[512, 256\] from \[3, 3\]"):
        merged(file)


def test_the_bias_of_an_up_projection_is_scaled_with_it(tiny, tmp_path):
    down, up = low_rank(tiny)["blocks.0.ffn.2"]
    name = "base_model.model.blocks.0.ffn.2"
    halves = {f"{name}.lora_A.style.weight": down, f"{name}.lora_B.style.weight": up}
    save_file(
        halves | {f"{name}.lora_B.style.bias": torch.ones(256), "blocks.0.ffn.2.alpha": torch.tensor(8)},
        tmp_path / "l.safetensors",
    )
    state = merged(tmp_path / "l.safetensors")
    torch.testing.assert_close(state["blocks.0.ffn.2.bias"], tiny["blocks.0.ffn.2.bias"] + 2)


@pytest.fixture
def three(tiny, tmp_path):
    """Three LoRAs in different forms, two of which change the same weight."""
    pairs = {"blocks.0.self_attn.q": low_rank(tiny)["blocks.0.self_attn.q"]}
    other = {"blocks.0.self_attn.q": tuple(half + 0.25 for half in pairs["blocks.0.self_attn.q"])}
    save_file(peft(pairs), tmp_path / "one.safetensors")
    save_file(flattened(other), tmp_path / "two.safetensors")
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(512)}, tmp_path / "three.safetensors")
    product = lambda named: named["blocks.0.self_attn.q"][1].double() @ named["blocks.0.self_attn.q"][0].double()
    return tmp_path, product(pairs), product(other)


def test_several_are_added_with_scales_of_their_own_before_the_one_rounding(tiny, three):
    folder, first, second = three
    paths = [folder / f"{name}.safetensors" for name in ("one", "two", "three")]
    exact = tiny["blocks.0.self_attn.q.weight"].double() + 0.5 * first - 2 * second
    for lora, scale in (
        ([(paths[0], 0.5), (str(paths[1]), -2), paths[2]], 1.0),
        ([(paths[0], 0.25), (paths[1], -1), (paths[2], 0.5)], 2.0),
    ):
        state = merged(lora, scale)
        torch.testing.assert_close(state["blocks.0.self_attn.q.weight"].double(), exact, rtol=0, atol=1e-5)
        assert torch.equal(state["blocks.0.ffn.0.bias"], tiny["blocks.0.ffn.0.bias"] + 1)
        rounded = merged(lora, scale, torch.bfloat16)
        assert all(torch.equal(rounded[key], tensor.bfloat16()) for key, tensor in state.items())
    one_by_one = merged(paths[:2])["blocks.0.self_attn.q.weight"]
    assert not torch.equal(one_by_one, merged(paths[1])["blocks.0.self_attn.q.weight"])


def test_a_checkpoint_takes_one_or_several(three):
    folder = three[0]
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    given = Checkpoint(weights=FILE, lora=[one, (str(two), 0.5)], lora_scale=2.0)
    assert given.loras == ((one, 2.0), (two, 1.0)) and hash(given) == hash(given)
    assert Checkpoint(weights=FILE, lora=str(one)).loras == ((one, 1.0),) == listed((one, 1))
    assert Checkpoint(weights=FILE).loras == Checkpoint(weights=FILE, lora=[]).loras == ()
    for wrong in ([3], [(one, "x")], [(one, float("nan"))], [(one, True)], [(one, 1, 1)]):
        with pytest.raises(TypeError, match="a LoRA must be a path, or a path and a finite scale, got"):
            Checkpoint(weights=FILE, lora=wrong)


def test_the_one_that_does_not_fit_is_named(three):
    folder = three[0]
    save_file({"blocks.9.ffn.0.diff_b": torch.ones(512)}, folder / "nine.safetensors")
    with pytest.raises(ValueError, match=r"nine.safetensors does not fit .* unknown targets 1: blocks.9.ffn.0.bias"):
        merged([folder / "one.safetensors", folder / "nine.safetensors"])


OTHERS = {
    "DoRA": "blocks.0.ffn.0.dora_scale",
    "LoHa": "lora_unet_blocks_0_ffn_0.hada_w1_a",
    "LoKr": "lycoris_blocks_0_ffn_0.lokr_w1",
    "OFT": "blocks.0.ffn.0.oft_blocks",
    "LoCon with a core": "lora_unet_patch_embedding.lora_mid.weight",
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_forms_are_refused_by_name(form, tmp_path):
    save_file({OTHERS[form]: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(NotImplementedError, match=f"other.safetensors is a {form} .*; supported: LoRA"):
        merged(tmp_path / "other.safetensors")


LIMIT = float(torch.finfo(torch.float32).max)
WRONG_SCALES = {  # alpha, or PEFT's lora_alpha, or the caller's scale: what is told
    "nan": (float("nan"), 1.0, "lora_unet_blocks_0_ffn_0.alpha must be one finite number, got nan"),
    "infinite": (float("inf"), 1.0, "lora_unet_blocks_0_ffn_0.alpha must be one finite number, got inf"),
    "product too large": (
        LIMIT,
        16.0,
        r"the scale of blocks.0.ffn.0.weight is [\d.e+]+: 16 times alpha over the rank 4",
    ),
    "given too large": (1.0, 1e39, "must be finite in float32, got 1 times 1e"),
    "given nan": (1.0, float("nan"), "must be finite in float32, got 1 times nan"),
}


@pytest.mark.parametrize("case", WRONG_SCALES)
def test_a_scale_that_is_not_finite_is_told_with_its_file_and_key(tiny, tmp_path, case):
    alpha, scale, told = WRONG_SCALES[case]
    file = tmp_path / "k.safetensors"
    down, up = low_rank(tiny)["blocks.0.ffn.0"]
    save_file(flattened({"blocks.0.ffn.0": (down, up)}, alpha=alpha), file)
    with pytest.raises(ValueError, match=f"k.safetensors.*{told}"):
        merged(file, scale)


@pytest.mark.parametrize("alpha", [float("nan"), "many"])
def test_so_is_the_alpha_of_an_adapter(tiny, tmp_path, alpha):
    save_file(peft({"blocks.0.ffn.0": low_rank(tiny)["blocks.0.ffn.0"]}), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    with pytest.raises(ValueError, match=f": lora_alpha must be a finite number, got '?{alpha}"):
        merged(tmp_path)


def test_halves_without_a_rank_are_refused(tiny, tmp_path):
    for down, up in ((torch.ones(0, 256), torch.ones(512, 0)), (torch.ones(256), torch.ones(512))):
        save_file(
            {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}, tmp_path / "l.safetensors"
        )
        with pytest.raises(
            ValueError, match="l.safetensors is not a plain LoRA.*holds 2: blocks.0.ffn.0.lora_A.weight"
        ):
            merged(tmp_path / "l.safetensors")


def test_one_that_is_given_twice_is_refused(three):
    folder = three[0]
    one = folder / "one.safetensors"
    (folder / "link.safetensors").symlink_to(one)
    for twice in ([one, one], [(one, 0.5), str(one)], [one, folder / "link.safetensors"]):
        with pytest.raises(ValueError, match="is given twice: give it once, with the scales' sum"):
            Checkpoint(weights=FILE, lora=twice)
