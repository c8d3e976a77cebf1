"""Every published container of the same small weights loads bit for bit; every broken one says what is wrong."""

import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from state_dicts import (
    kohya,
    low_rank,
    peft,
    prefixed,
    save_diffusers_folder,
    save_diffusers_root,
    save_shards,
    save_wan_folder,
    scrambled,
    to_diffusers,
)

from flexkern.model import names, weights
from flexkern.model.find import find_parts
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.model.weights import load_transformer, read_state_dict

DATA = Path(__file__).parent.parent / "data"
FILE = DATA / "tiny_wan.safetensors"
TINY = replace(CONFIGS["tiny"], text_len=512)  # no shape shows text_len


@pytest.fixture(scope="module")
def tiny():
    return load_file(FILE)


def save_as(name, save=torch.save):
    """A writer of a dictionary made from the state to a file of that name."""
    return lambda build: lambda state, folder: (save(build(state), folder / name), folder / name)[1]


def linked(state, folder):
    """A link whose name tells nothing to a file that cannot be written to."""
    file = folder / "with spaces (1).safetensors"
    save_file(state, file)
    file.chmod(0o444)
    (folder / "a link").symlink_to(file.name)
    return folder / "a link"


pt, st = save_as("any name.pt"), save_as("any name.safetensors", save_file)
old_format = save_as("old.ckpt", lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False))
FSDP = "_fsdp_wrapped_module."
CONTAINERS = {
    "wan folder": save_wan_folder,
    "wan shards without an index": lambda s, p: (save_shards(s, p), p)[1],
    "diffusers root": save_diffusers_root,
    "diffusers transformer folder": save_diffusers_folder,
    "diffusers file": st(to_diffusers),
    "self-forcing": pt(
        lambda s: {"generator": scrambled(s), "critic": scrambled(s), "generator_ema": prefixed(s, "model.")}
    ),
    "longlive base": pt(lambda s: {"generator": prefixed(s, "model."), "step": 3}),
    "longlive base, model": pt(lambda s: {"model": prefixed(s, "model.")}),
    "causvid folder": lambda s, p: (torch.save({"generator": prefixed(s, "model.")}, p / "model.pt"), p)[1],
    "rolling forcing": pt(lambda s: {"generator_ema": prefixed(s, f"model.{FSDP}", FSDP)}),
    "causal forcing": pt(lambda s: {"generator": prefixed(s, f"model.{FSDP}")}),
    "krea": st(lambda s: prefixed(s, "model.")),
    "comfy": st(lambda s: prefixed(s, "model.diffusion_model.")),
    "comfy, short": st(lambda s: prefixed(s, "diffusion_model.")),
    "compiled and checkpointed": save_as("x.pth")(lambda s: prefixed(s, "_orig_mod.", "_checkpoint_wrapped_module.")),
    "old torch format": old_format(dict),
    "DDP": pt(lambda s: {"model": prefixed(s, "module.model.")}),
    "DDP, compiled, flat": save_as("x.bin")(lambda s: prefixed(s, "module._orig_mod.")),
    "lightning": save_as("epoch=3.ckpt")(lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3, "loops": {}}),
    "lightning, several": pt(
        lambda s: {"state_dict": prefixed(s, "generator.model.") | prefixed(scrambled(s), "critic."), "callbacks": {}}
    ),
    "lightning, averaged": pt(lambda s: {"state_dict": prefixed(scrambled(s), "model.") | prefixed(s, "ema_model.")}),
    "deepspeed": pt(lambda s: {"module": s, "optimizer": None, "global_steps": 7}),
    "averaged": pt(lambda s: {"model": scrambled(s), "ema": s, "opt": {"state": {0: {"step": torch.ones(1)}}}}),
    "averaged, two deep": pt(lambda s: {"net": scrambled(s), "ema": {"decay": 0.99, "shadow": prefixed(s, "module.")}}),
    "torch's AveragedModel": pt(lambda s: {"n_averaged": torch.tensor(5)} | prefixed(s, "module.")),
    "ema_pytorch": pt(
        lambda s: prefixed(s, "ema_model.") | prefixed(scrambled(s), "online_model.") | {"step": torch.tensor([3])}
    ),
    "numbers of NumPy": pt(
        lambda s: {"generator": s, "step": np.int64(5), "loss": np.float32(0.1), "state": np.random.get_state()[1]}
    ),
    "old numbers of NumPy": old_format(lambda s: {"generator": s, "loss": np.float64(0.1)}),
    "arguments of the run": pt(lambda s: {"model": s, "args": Namespace(lr=0.1, out=Path("x"), names=["a"])}),
    "upper case": save_as("WEIGHTS.SAFETENSORS", save_file)(dict),
    "no suffix": save_as("9f8e7d", save_file)(dict),
    "safetensors in a .pt": save_as("a.pt", save_file)(dict),
    "zip in a .safetensors": save_as("a.safetensors")(dict),
    "spaces, a link, read only": lambda s, p: linked(s, p),
    "bare": save_as("bare.bin")(dict),
}


def assert_same(model, state):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in state.items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same_weights(name, tiny, tmp_path):
    model = load_transformer(CONTAINERS[name](tiny, tmp_path), dtype=torch.float32)
    assert model.config == TINY
    assert_same(model, tiny)


def test_loaded_model_is_rounded_once_frozen_and_independent_of_the_file(tiny, tmp_path):
    path = CONTAINERS["bare"](tiny, tmp_path)
    model = load_transformer(path)
    assert_same(model, {key: tensor.bfloat16() for key, tensor in tiny.items()})
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert all(p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())
    kept = load_transformer(path, dtype=torch.float32)
    with path.open("r+b") as file:  # the same file, overwritten in place
        file.write(bytes(path.stat().st_size))
    assert_same(kept, tiny)


def test_ema_is_chosen_refused_or_insisted_on(tiny, tmp_path):
    both, raw, only = tmp_path / "both.pt", tmp_path / "raw.pt", tmp_path / "ema.pt"
    torch.save({"generator": tiny, "generator_ema": scrambled(tiny)}, both)
    torch.save({"generator": tiny, "critic": {}, "step": torch.tensor(3)}, raw)
    torch.save({"generator_ema": tiny}, only)
    key = "head.head.bias"
    for ema, expected in ((None, tiny[key] + 1), (True, tiny[key] + 1), (False, tiny[key])):
        assert torch.equal(read_state_dict(both, ema=ema).tensors[key], expected)
    assert torch.equal(read_state_dict(raw).tensors[key], tiny[key])
    assert "generator_ema" in read_state_dict(only, ema=True).container
    with pytest.raises(ValueError, match=r"raw.pt does not hold generator_ema \| .*; it holds generator, critic"):
        read_state_dict(raw, ema=True)
    with pytest.raises(
        ValueError, match=r"does not hold generator \| model \| .* \| flat tensors; it holds generator_ema"
    ):
        load_transformer(only, ema=False)
    with pytest.raises(ValueError, match=r"tiny_wan.safetensors does not hold generator_ema \| .*; it holds flat"):
        read_state_dict(FILE, ema=True)
    assert read_state_dict(FILE, ema=False).tensors.keys() == tiny.keys()


def test_configuration_comes_from_argument_then_metadata_then_json_then_shapes(tiny, tmp_path):
    folder = save_wan_folder(tiny, tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    (folder / "config.json").write_text(json.dumps({"num_heads": 4, "text_len": 77, "eps": 1e-5, "model_type": "t2v"}))
    told = replace(TINY, num_heads=4, text_len=77, eps=1e-5)
    assert read_state_dict(folder).config == read_state_dict(file).config == told
    declared = replace(TINY, num_heads=8, prediction="x0")
    save_file(tiny, file, metadata={"flexkern_config": json.dumps(declared.to_dict())})
    assert read_state_dict(folder).config == declared
    assert load_transformer(folder, config=TINY).config == TINY
    other = tmp_path / "flat.safetensors"
    save_file(tiny, other)  # an unrelated neighbour of config.json
    assert read_state_dict(other).config == TINY
    wrong = {'{"dims": 3}': r"unknown fields \['dims'\]", '{"num_heads": 3}': "unusable configuration.*num_heads=3"}
    for text, message in (wrong | {'{"num_heads": "two"}': "unusable configuration"}).items():
        save_file(tiny, other, metadata={"flexkern_config": text})
        with pytest.raises(ValueError, match=message):
            read_state_dict(other)


@pytest.mark.parametrize("size, tensors, parameters", [("1.3B", 825, 1_418_996_800), ("14B", 1095, 14_288_491_584)])
def test_full_size_keys_and_shapes(size, tensors, parameters):
    pinned = json.loads((DATA / "key_shapes.json").read_text())[size]
    expected = dict(pinned["top"])
    for layer in range(pinned["layers"]):
        expected |= {f"blocks.{layer}.{name}": shape for name, shape in pinned["block"].items()}
    with torch.device("meta"):
        state = CausalWan(CONFIGS[size]).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected
    assert len(state) == tensors and sum(tensor.numel() for tensor in state.values()) == parameters
    assert weights._config(state, {}, Path("x")) == CONFIGS[size]
    assert [names.original_name(name) for name in to_diffusers(state)] == list(state)


def save_adapter(pairs, folder, **config):
    folder.mkdir(exist_ok=True)
    save_file(peft(pairs), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": False} | config))
    return folder


SAID = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 12}'}
LORAS = {  # form: (writer, alpha / rank)
    "longlive": (pt(lambda p: {"generator_lora": peft(p), "critic_lora": {}}), 1.0),
    "longlive with alpha": (pt(lambda p: {"generator_lora": peft(p), "alpha": 6}), 1.5),
    "bare peft": (pt(peft), 1.0),
    "peft of the wrapper": (st(lambda p: peft(p, "base_model.model.model.")), 1.0),
    "fsdp": (pt(lambda p: peft(p, f"base_model.model.{FSDP}", [f"lora_{m}.default.weight" for m in "AB"])), 1.0),
    "comfy": (st(lambda p: peft(p, "diffusion_model.")), 1.0),
    "kohya names with alpha": (st(lambda p: kohya(p, 2.0)), 0.5),
    "diffusers": (st(lambda p: to_diffusers(peft(p, "transformer."))), 1.0),
    "diffusers with alpha": (save_as("l.safetensors", lambda s, f: save_file(s, f, SAID))(peft), 3.0),
    "peft folder": (save_adapter, 2.0),
    "peft file": (lambda p, folder: save_adapter(p, folder) / "adapter_model.safetensors", 2.0),
}


@pytest.mark.parametrize("name", LORAS)
def test_lora_is_merged(name, tiny, tmp_path):
    save, scale = LORAS[name]
    pairs = low_rank(tiny)
    model = load_transformer(FILE, lora=save(pairs, tmp_path), lora_scale=0.75, dtype=torch.float32)
    for key in tiny.keys() - {f"{module}.weight" for module in pairs}:
        assert torch.equal(model.state_dict()[key], tiny[key]), key
    for module, (down, up) in pairs.items():
        weight = tiny[f"{module}.weight"].double() + 0.75 * scale * up.double() @ down.double()
        x, bias = torch.randn(5, weight.shape[1]), tiny[f"{module}.bias"].double()
        got, expected = model.get_submodule(module)(x).double(), x.double() @ weight.T + bias
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_lora_is_added_before_the_weights_are_rounded(tiny, tmp_path):
    lora = pt(lambda p: to_diffusers(peft(p)))(
        {"blocks.0.cross_attn.v": low_rank(tiny)["blocks.0.cross_attn.v"]}, tmp_path
    )
    exact = load_transformer(FILE, lora=lora, dtype=torch.float32).state_dict()
    rounded = load_transformer(FILE, lora=lora).state_dict()
    assert all(torch.equal(rounded[key], tensor.bfloat16()) for key, tensor in exact.items())
    assert_same(load_transformer(FILE, lora=lora, lora_scale=0.0, dtype=torch.float32), tiny)


def test_lora_errors(tiny, tmp_path):
    def load(state, match):
        torch.save(state, tmp_path / "lora.pt")
        with pytest.raises(ValueError, match=match):
            load_transformer(FILE, lora=tmp_path / "lora.pt")

    a, b = torch.ones(4, 256), torch.ones(256, 4)
    unknown = {"blocks.7.self_attn.q": (a, b), "blocks.0.self_attn.qq": (a, b), "blocks.0.self_attn.q": (a, b)}
    load(peft(unknown), match=r"unknown targets 2: blocks.7.self_attn.q.weight, blocks.0.self_attn.qq.weight;")
    wrong = {"blocks.0.ffn.0": (a, b), "blocks.1.ffn.0": (a[:, :200], torch.ones(512, 4))}
    load(peft(wrong), match=r"wrongly shaped 2: blocks.0.ffn.0.weight \[512, 256\] from \[256, 4\] @ \[4, 256\], blo")
    load({"blocks.0.ffn.0.lora_A.weight": a}, match="1: half of blocks.0.ffn.0.weight")
    doubled = peft({"blocks.0.self_attn.q": (a, b)}) | peft({"blocks.0.self_attn.q": (a, b)}, prefix="model.")
    load(doubled, match="down of blocks.0.self_attn.q.weight twice, the second time as model.blocks")
    load(
        {"critic_lora": peft({"x": (a, b)})},
        match=r"generator_lora \| state_dict \| model \| flat tensors; it holds critic_lora",
    )
    folder = save_adapter({"blocks.0.self_attn.q": (a, b)}, tmp_path / "adapter", use_rslora=True)
    with pytest.raises(NotImplementedError, match="use_rslora"):
        load_transformer(FILE, lora=folder)


def test_one_error_lists_every_key_that_does_not_fit(tiny, tmp_path):
    state = tiny | {f"extra.{index}": torch.ones(1) for index in range(12)}
    state["blocks.1.ffn.2.weight"] = torch.ones(256, 7)
    del state["head.modulation"]
    path = tmp_path / "broken.pt"
    torch.save({"generator": prefixed(state, "model.")}, path)
    with pytest.raises(ValueError) as caught:
        load_transformer(path)
    message = str(caught.value)
    assert f"{path} (pt, generator, Wan keys) does not fit the model: " in message and "extra.8" not in message
    assert "missing 1: head.modulation; unexpected 12: extra.0, " in message and "extra.7, ...;" in message
    assert "wrongly shaped 1: blocks.1.ffn.2.weight [256, 7] instead of [256, 512]" in message


def test_image_and_two_model_checkpoints_are_named(tiny, tmp_path):
    file, supported = tmp_path / "i2v.safetensors", "supported: text-to-video Wan 2.1"
    wide, extra = {"patch_embedding.weight": torch.ones(256, 36, 1, 2, 2)}, torch.ones(256, 256)
    for state, sign in (
        (tiny | wide, "36 input channels"),
        (tiny | {"blocks.0.cross_attn.k_img.weight": extra}, "k_img"),
        (tiny | {"img_emb.proj.1.weight": extra}, "img_emb"),
        (to_diffusers(tiny) | {"blocks.0.attn2.add_k_proj.weight": extra}, "add_k_proj"),
    ):
        save_file(state, file)
        with pytest.raises(NotImplementedError, match=f"{sign}.*{supported}"):
            load_transformer(file)
    folder = save_wan_folder(tiny, tmp_path / "vace")
    (folder / "config.json").write_text('{"model_type": "vace"}')
    with pytest.raises(NotImplementedError, match=f"model_type vace.*{supported}"):
        load_transformer(folder)
    root = save_diffusers_root(tiny, tmp_path / "moe")
    (root / "model_index.json").write_text('{"transformer_2": ["diffusers", "WanTransformer3DModel"]}')
    with pytest.raises(NotImplementedError, match="two transformers"):
        load_transformer(root)


class Unwelcome:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_unreadable_files(tmp_path):
    def fails(name, content, match):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=match) as caught:
            read_state_dict(path)
        assert name in str(caught.value)

    good = FILE.read_bytes()
    fails("cut.safetensors", good[:1000], "is cut off within its header: at least 5,360 bytes are missing")
    fails("cut_late.safetensors", good[:-1000], f"is cut off: 1,000 of {len(good):,} bytes are missing; download it")
    fails("empty.safetensors", b"", "is empty")
    Unwelcome.folder = str(tmp_path / "made")
    fails("object.pt", {"generator": Unwelcome()}, r"tensors alone \(GLOBAL posix.mkdir\); save")
    assert not (tmp_path / "made").exists()
    fails("noise.pt", b"not a pickle", "is a text of 12 bytes that begins 'not a pickle', not weights")
    fails("empty.pt", b"", "is empty")
    fails("zip.pt", b"PK\3\4" + bytes(40), "is cut off: its end is missing")
    fails("old.pt", b"\x80\x02garbage", "cannot be read as tensors alone")
    fails("bytes.pt", bytes(range(64)), "neither a safetensors file nor torch's: it begins with the bytes 00 01 02 03")
    torch.save({"generator": {"a": torch.ones(1000)}}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    fails("cut.pt", whole[:2000], "is cut off: at least 2,000 bytes are missing")
    fails("cut_late.pt", whole[:-100], "is cut off: its end is missing")
    fails("list.pt", [torch.ones(2)], "expected a dictionary of tensors, got list")
    fails("hollow.pt", {"step": 3}, "it holds no tensors")
    fails("other.pt", {"state": {"a": torch.ones(2)}}, "it holds state")
    fails("twice.pt", {"model.a": torch.ones(2), "a": torch.ones(2)}, "holds a twice, the second time as a")
    fails("int.pt", {"a": torch.ones(2, dtype=torch.int8)}, "a is torch.int8; expected floating point")


def test_missing_files(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        load_transformer(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no weights in .*diffusion_pytorch_model\*.*there is 1: notes.txt"):
        load_transformer(tmp_path)
    folder = save_diffusers_folder(tiny, tmp_path / "sharded")
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not there, 1: diffusion_pytorch_model-00002-of-00002"):
        load_transformer(folder)
    folder = save_wan_folder(tiny, tmp_path / "variants")
    save_file({"head.modulation": tiny["head.modulation"]}, folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match="repeats keys of another shard, 1: head.modulation"):
        load_transformer(folder)
    for text in ("{", "3"):
        (folder / "diffusion_pytorch_model.fp16.safetensors").unlink(missing_ok=True)
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json does not hold a JSON object"):
            load_transformer(folder)


@pytest.mark.parametrize("prefix", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_together_or_not_at_all(tiny, tmp_path, prefix, index):
    """Named as transformers or diffusers do; one that is missing is named, one alone is sent to its folder."""
    names, first = [f"{prefix}-0000{number}-of-00002.safetensors" for number in (1, 2)], len(tiny) // 2
    for name, part in zip(names, (list(tiny)[:first], list(tiny)[first:]), strict=True):
        save_file({key: tiny[key] for key in part}, tmp_path / name)
    listed = tmp_path / f"{prefix}.safetensors.index.json"
    if index:
        listed.write_text(json.dumps({"weight_map": {key: names[key in list(tiny)[first:]] for key in tiny}}))
        with pytest.raises(ValueError, match="lists the shards of a model: give their folder, "):
            load_transformer(listed)
    assert load_transformer(tmp_path).state_dict().keys() == tiny.keys()
    assert find_parts(tmp_path).transformer == tmp_path
    with pytest.raises(
        ValueError, match=f"{names[0]} is one of the 2 shards of a model: give their folder, {tmp_path}"
    ):
        load_transformer(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"not .*there.*1: {names[1]}"):
        load_transformer(tmp_path)


def test_something_else_is_not_taken_for_a_transformer(tmp_path):
    path = tmp_path / "vae.pth"
    torch.save({"decoder.conv1.weight": torch.ones(3, 3), "conv2.bias": torch.ones(3)}, path)
    assert read_state_dict(path).config is None
    with pytest.raises(ValueError, match="does not show dim.*2: decoder.conv1.weight, conv2.bias"):
        load_transformer(path)
    with pytest.raises(ValueError, match="unexpected 2: decoder.conv1.weight, conv2.bias"):
        load_transformer(path, config=TINY)


def test_a_buffer_that_no_checkpoint_fills_is_noticed(monkeypatch):
    class Careless(CausalWan):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    monkeypatch.setattr(weights, "CausalWan", Careless)
    with pytest.raises(RuntimeError, match="without data: 1: table"):
        load_transformer(FILE)
