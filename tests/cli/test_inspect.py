"""``flexkern inspect`` says what a file is, what is missing of it, and which --model fits."""

import json
import re
import shlex
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')

import layouts

from flexkern.cli import main
from flexkern.model.wan import CONFIGS, CausalWan


@pytest.fixture
def inspect_(capsys):
    """Runs the command: (status, {place: {name: text}}, stderr)."""

    def run(path):
        try:
            status = main(["inspect", str(path)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        places = {}
        for part in filter(None, out.split("\n\n")):
            place, *lines = part.strip("\n").split("\n")
            places.setdefault(place, {}).update(line.strip().split(None, 1) for line in lines)
        return status, places, err

    return run


@pytest.fixture(scope="module")
def tiny():
    return layouts.tiny_transformer()


def sparse(file, shapes, dtype="BF16"):
    """A safetensors file of these shapes whose data was never written: reading it would take minutes."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("size", "parameters", "data", "cache"), [
    ("1.3B", "825, 1,418,996,800 parameters", "bfloat16, 2.84 GB", "287.5 MB"),
    ("14B", "1,095, 14,288,491,584 parameters", "bfloat16, 28.58 GB", "1,278.0 MB"),
])  # fmt: skip
def test_published_sizes_are_told_from_headers(inspect_, tmp_path, size, parameters, data, cache):
    with torch.device("meta"):
        shapes = {f"model.{key}": tensor.shape for key, tensor in CausalWan(CONFIGS[size]).state_dict().items()}
    file = tmp_path / "krea.safetensors"
    sparse(file, shapes)
    status, places, _ = inspect_(file)
    told = places[str(file)]
    assert status == 0 and f"{size}: dim {CONFIGS[size].dim}, " in told["is"]
    assert (told["tensors"], told["data"], told["complete"]) == (parameters, data, "yes")
    assert told["cache"] == f"{cache} per cached frame of 480x832 in bfloat16"
    assert (told["prefix"], told["EMA"]) == ("model.", "no")


def test_a_repository_with_averaged_weights(inspect_, tmp_path):
    root = layouts.save_self_forcing(tmp_path / "repo")
    status, places, _ = inspect_(root)
    told = places[f"{root}/checkpoints/self_forcing_dmd.pt"]
    assert status == 0 and told["container"] == "pt, generator_ema, Wan keys; there are generator as well"
    assert told["EMA"].startswith("yes, it is taken") and "lacks a text encoder: give --text" in told["use"]
    assert told["data"] == "float32, 8695 kB" and "other: dim 256, feed-forward 512, 2 heads, 2 layers" in told["is"]
    wan = root / "wan_models/Wan2.1-T2V-1.3B"
    assert places[f"{wan}/Wan2.1_VAE.pth"]["latents"] == "16 channels, strides 4 in time, 8 in space"
    assert "not distilled" in places[str(wan)]["note"]
    assert places[str(root)] == {"lacks": layouts_lack("text encoder")}


def layouts_lack(kind):
    from flexkern.cli.inspect import NEEDED

    return f"{kind}: {NEEDED[kind]}"


def test_wrappers_and_the_family_of_a_folder(inspect_, tmp_path):
    root = layouts.save_rolling_forcing(tmp_path / "repo")
    told = inspect_(root / "checkpoints/rolling_forcing_dmd.pt")[1].popitem()[1]
    assert told["prefix"] == "_fsdp_wrapped_module. model." and told["use"].endswith("--model rolling-forcing")
    root = layouts.save_causvid(tmp_path / "causvid")
    assert inspect_(root)[1][f"{root}/model.pt"]["use"].endswith("--model causvid")


def test_a_diffusers_folder(inspect_, tmp_path):
    root = layouts.save_diffusers(tmp_path / "any")
    layouts.save_text(root)
    status, places, _ = inspect_(root)
    command = f"flexkern render --weights {root} --prompt 'a cat walks on grass' --model wan-diffusers"
    assert status == 0 and places[str(root)]["use"] == command
    assert "VAE of Wan, diffusers keys" in places[f"{root}/vae"]["is"]


def test_a_lora(inspect_, tiny, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(layouts.kohya(layouts.low_rank(tiny), 8.0), file)
    status, places, _ = inspect_(file)
    told = places[str(file)]
    assert status == 0 and told["is"] == "LoRA of a Wan transformer, for another size"
    assert (told["rank"], told["alpha"].split(",")[0]) == ("4", "8")
    assert told["targets"].startswith("20: ") and "self_attn.q in 2 blocks" in told["targets"]


def test_a_text_encoder_and_saved_embeddings(inspect_, tmp_path):
    folder = layouts.save_wan(tmp_path / "wan", text=True)
    told = inspect_(folder)[1][f"{folder}/models_t5_umt5-xxl-enc-bf16.pth"]
    assert "text encoder UMT5, Wan keys" in told["is"] and told["complete"] == "yes, the tokenizer as well"
    (folder / "google/umt5-xxl/tokenizer.json").unlink()
    (folder / "google/umt5-xxl/tokenizer_config.json").unlink()
    status, places, _ = inspect_(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    assert status == 1 and "no tokenizer" in places.popitem()[1]["complete"]
    file = layouts.save_prompts(tmp_path / "e.safetensors")
    assert inspect_(file)[1][str(file)]["prompts"] == "2: 'a cat', 'a dog'"


def test_what_is_missing_or_unknown_is_listed(inspect_, tiny, tmp_path):
    broken = {key: tensor for key, tensor in tiny.items() if key != "head.modulation"} | {"extra.1": torch.ones(1)}
    torch.save({"generator": broken}, tmp_path / "broken.pt")
    status, places, _ = inspect_(tmp_path / "broken.pt")
    expected = "no: missing 1: head.modulation; unexpected 1: extra.1; wrongly shaped 0"
    assert status == 1 and places.popitem()[1]["complete"] == expected
    vae = layouts.tiny_vae()
    del vae["decoder.head.2.bias"]
    torch.save(vae, tmp_path / "vae.pth")
    status, places, _ = inspect_(tmp_path / "vae.pth")
    assert status == 1 and "missing 1: decoder.conv_out.bias" in places.popitem()[1]["complete"]


def test_what_is_not_supported_or_unknown_is_said(inspect_, tiny, tmp_path):
    save_file(tiny | {"patch_embedding.weight": torch.ones(256, 36, 1, 2, 2)}, tmp_path / "i2v.safetensors")
    status, places, _ = inspect_(tmp_path / "i2v.safetensors")
    told = places.popitem()[1]
    assert status == 1 and told["is"] == "transformer, not supported" and "36 input channels" in told["complete"]
    torch.save({"classifier.weight": torch.ones(2)}, tmp_path / "other.pt")
    status, places, _ = inspect_(tmp_path / "other.pt")
    told = places.popitem()[1]
    assert status == 1 and "nothing that flexkern knows" in told["is"] and told["names"] == "classifier.weight"
    (tmp_path / "text.txt").write_text("x")
    assert inspect_(tmp_path / "text.txt")[0] == 1
    status, _, err = inspect_(tmp_path / "nowhere")
    assert status == 2 and re.fullmatch(r"flexkern: error: no weights at [^\n]*nowhere\n", err)


def test_the_demo_is_told_by_its_form(inspect_, tiny, tmp_path):
    from flexkern.demo import WEIGHTS

    told = inspect_(WEIGHTS)[1][str(WEIGHTS)]
    assert told["use"] == f"flexkern render --model {WEIGHTS}" and "cache" not in told
    three = {"patch_embedding.weight": torch.ones(256, 3, 1, 2, 2), "head.head.weight": torch.ones(12, 256)}
    save_file(tiny | three | {"head.head.bias": torch.ones(12)}, tmp_path / "three.safetensors")
    told = inspect_(tmp_path / "three.safetensors")[1].popitem()[1]
    assert "cannot be rendered: its latents have 3 channels, and" in told["use"]
    assert "is not of the demo's form" in told["use"]


@pytest.mark.parametrize("name", ["self-forcing", "my weights"])
def test_the_line_on_use_runs_as_it_stands(inspect_, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    layouts.save_wan(tmp_path / name, text=True)
    line = inspect_(tmp_path / name)[1][str(tmp_path / name)]["use"]
    assert ("# or longlive" in line) == (name == "my weights")
    program, *words = shlex.split(line, comments=True)
    assert program == "flexkern"
    assert main([*words, "--size", "32x48", "--frames", "1", "--no-progress"]) == 0
    assert (tmp_path / "video.mp4").exists()


def test_what_render_would_refuse_is_not_promised(inspect_, tiny, tmp_path):
    """A bare file lacks two parts; beside embeddings of another width, or a VAE that is broken, no command is given."""
    folder = tmp_path / "self-forcing"
    folder.mkdir()
    save_file(tiny, folder / "bare.safetensors")
    told = inspect_(folder / "bare.safetensors")[1].popitem()[1]["use"]
    assert told.startswith("lacks a VAE: give --vae PATH") and "; lacks a text encoder: give --text-encoder" in told
    vae = layouts.tiny_vae()
    del vae["decoder.head.2.bias"]
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    told = inspect_(folder / "bare.safetensors")[1].popitem()[1]["use"]
    assert re.match("it cannot be rendered as it is: .*Wan2.1_VAE.pth .* missing 1: decoder.conv_out.bias", told)


def test_a_link_of_the_hubs_cache_is_told_by_its_own_name(inspect_, tiny, tmp_path):
    """The blob's name is a hash; the link's name, its folder's or the repository's says the family."""
    for repository, name, family in (
        ("models--gdhe17--anything", "self_forcing_dmd.safetensors", "self-forcing"),
        ("models--tianweiy--CausVid", "model.safetensors", "causvid"),
    ):
        cache = tmp_path / repository
        link = cache / "snapshots/1a2b/checkpoints" / name
        link.parent.mkdir(parents=True)
        (cache / "blobs").mkdir()
        save_file(tiny, cache / "blobs/9f8e7d")
        link.symlink_to("../../../blobs/9f8e7d")
        assert inspect_(link)[1][str(link)]["use"].endswith(f"--model {family}")


def test_a_name_that_tells_of_a_link_holds_for_the_file_as_well(inspect_, tiny, tmp_path):
    save_file(tiny, tmp_path / "longlive_base.safetensors")
    (tmp_path / "current.safetensors").symlink_to("longlive_base.safetensors")
    assert inspect_(tmp_path / "current.safetensors")[1].popitem()[1]["use"].endswith("--model longlive")


def test_what_cannot_be_read_is_said_for_a_file_and_in_a_folder(inspect_, tiny, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 507609880\n"
    (tmp_path / "Wan2.1_VAE.pth").write_text(pointer)
    save_file(tiny, tmp_path / "self_forcing.safetensors")
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path):
        status, places, _ = inspect_(path)
        told = places[f"{tmp_path}/Wan2.1_VAE.pth"]
        assert status == 1 and "is a Git LFS pointer for a file of 507,609,880 bytes" in told["complete"]
    use = inspect_(tmp_path / "self_forcing.safetensors")[1].popitem()[1]["use"]
    assert use.startswith("lacks a VAE") and places[f"{tmp_path}/self_forcing.safetensors"]["complete"] == "yes"


def test_inspect_and_render_say_the_same_of_every_form_of_weights(inspect_, tiny, tmp_path, monkeypatch, capsys):
    """What inspect calls complete renders, what it does not is refused, with the same reason."""
    from state_dicts import scaled_float8

    monkeypatch.chdir(tmp_path)
    chosen = lambda key, tensor: key.startswith("blocks.") and tensor.dim() == 2 and key.endswith(".weight")
    name = "blocks.0.self_attn.q"
    forms = {
        "self-forcing scaled": scaled_float8(tiny, chosen)[0],
        "self-forcing rows": scaled_float8(tiny, chosen, rows=True, leaf="weight_scale")[0],
        "self-forcing small": {key: t.to(torch.float8_e5m2) if chosen(key, t) else t for key, t in tiny.items()},
        "self-forcing blocks": tiny | {f"{name}.scale_weight": torch.ones(2, 2)},
        "self-forcing nf4": tiny | {f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(2, dtype=torch.uint8)},
        "self-forcing int8": tiny | {f"{name}.weight": tiny[f"{name}.weight"].to(torch.int8)},
    }
    layouts.save_prompts(tmp_path / "e.safetensors", ["a cat walks on grass"])
    complete = []
    for name, state in forms.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(state, file)
        status, places, _ = inspect_(file)
        told = places[str(file)]
        command = (
            "render --model self-forcing --dtype float32 --size 32x48 --frames 1 --no-progress --latents l.safetensors"
            " --overwrite"
        )
        given = ["--weights", str(file), "--embeddings", "e.safetensors", "--prompt", "a cat walks on grass"]
        try:
            rendered = main([*command.split(), *given])
        except SystemExit as stop:
            rendered = stop.code
        capsys.readouterr()
        assert (status == 0) == (told["complete"] == "yes") == (rendered == 0), name
        complete.append(status == 0)
    assert complete == [True, True, True, False, False, False]


def test_loras_that_no_transformer_of_wan_could_take_are_not_promised(inspect_, tiny, tmp_path):
    pair = (torch.ones(4, 3072), torch.ones(3072, 4))
    save_file(
        layouts.peft({"single_transformer_blocks.0.attn.to_q": pair}, "transformer."), tmp_path / "flux.safetensors"
    )
    status, places, _ = inspect_(tmp_path / "flux.safetensors")
    told = places.popitem()[1]
    assert status == 1 and "a transformer of Wan 2.1 has no 1: single_transformer_blocks.0" in told["complete"]
    save_file({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    status, places, _ = inspect_(tmp_path / "loha.safetensors")
    told = places.popitem()[1]
    assert (status, told["is"]) == (1, "LoRA, not supported") and "is a LoHa" in told["complete"]
    named = {
        "diffusion_model.blocks.7.ffn.0.diff_b": torch.ones(8960),
        "diffusion_model.blocks.7.diff_m": torch.ones(2),
    }
    save_file(named, tmp_path / "diff.safetensors")
    status, places, _ = inspect_(tmp_path / "diff.safetensors")
    assert status == 0 and places.popitem()[1]["differences"] == "2 of whole tensors, without a rank"


def test_halves_of_a_lora_that_do_not_fit_each_other_are_not_promised(inspect_, tmp_path):
    named = {"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 256), "blocks.0.ffn.0.lora_B.weight": torch.ones(512, 7)}
    save_file(named, tmp_path / "l.safetensors")
    status, places, _ = inspect_(tmp_path / "l.safetensors")
    told = "the halves of blocks.0.ffn.0.weight do not fit each other: [512, 7] @ [4, 256]"
    assert status == 1 and told in places.popitem()[1]["complete"]


def test_latents_of_a_render_are_known(inspect_, tmp_path, monkeypatch, capsys):
    """Its line on use runs, or says what is lacking."""
    monkeypatch.chdir(tmp_path)
    about = {"model": "demo", "pictures": "5", "fps": "16", "title": "a disc"}
    save_file({"latents": torch.zeros(1, 5, 3, 16, 24)}, "l.safetensors", about)
    status, places, _ = inspect_(Path("l.safetensors"))
    told = places["l.safetensors"]
    assert status == 0 and told["is"].startswith("latents of a video by demo, 5 frames of 3 channels, 16 high")
    assert (told["pictures"], told["complete"]) == ("5 ordered, 16 a second", "yes")
    assert told["use"] == "flexkern decode l.safetensors" and main(told["use"].split()[1:]) == 0
    assert re.fullmatch(
        r"flexkern: 5 of 5 latent frames \(100 %\), [\d.e+]+ latent frames/s, done\n", capsys.readouterr().err
    )
    save_file({"latents": torch.zeros(1, 3, 16, 4, 6)}, "wan.safetensors")
    assert inspect_(Path("wan.safetensors"))[1]["wan.safetensors"]["use"].startswith("lacks a VAE: flexkern decode wan")
    with pytest.raises(SystemExit, match="2"):
        main(["render", "--model", "self-forcing", "--weights", "wan.safetensors", "--prompt", "a", "--out", "a.mp4"])
    assert capsys.readouterr().err.endswith("wan.safetensors holds latents; expected a transformer\n")


def test_json_says_what_the_lines_say(tiny, tmp_path, capsys):
    save_file(tiny, tmp_path / "self_forcing.safetensors")
    (tmp_path / "vae.pth").write_text("<html>")
    status = main(["inspect", str(tmp_path), "--json"])
    told = {part.pop("path"): part for part in json.loads(capsys.readouterr().out)}
    assert status == 1 and told[f"{tmp_path}/self_forcing.safetensors"]["complete"] == "yes"
    assert "web page" in told[f"{tmp_path}/vae.pth"]["complete"]


def test_a_name_with_a_dash_in_front_can_be_copied(inspect_, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(tiny, "-self-forcing.safetensors")
    _, places, _ = inspect_("./-self-forcing.safetensors")
    words = shlex.split(next(iter(places.values()))["use"].partition("with them: ")[2])
    assert words[2:4] == ["--weights", "./-self-forcing.safetensors"]


@pytest.mark.parametrize("layout", ["causvid", "self-forcing"])
def test_parts_of_a_folder_say_how_they_are_used_with_its_transformer(inspect_, tmp_path, monkeypatch, layout):
    layouts.LAYOUTS[layout](tmp_path / layout)
    layouts.save_text(next((tmp_path / layout).rglob("Wan2.1_VAE.pth")).parent)
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(512)}, tmp_path / layout / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    status, places, _ = inspect_(layout)
    uses = {lines["is"].split()[0]: lines["use"] for lines in places.values()}
    assert status == 0 and uses.keys() == {"transformer", "VAE", "text", "LoRA"}
    assert uses["transformer"].startswith("flexkern render --weights ")
    assert uses["VAE"] == uses["text"] == "the transformer's command finds it"
    assert uses["LoRA"] == f"add --lora {layout}/style.safetensors to the command that renders the transformer"
