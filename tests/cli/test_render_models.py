"""``flexkern render --model``: every published layout at tiny size, the research flags, images, and what is refused."""

import hashlib
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')

import layouts

import flexkern.render
from flexkern.cli.policies import with_policies
from flexkern.cli.render import Render
from flexkern.metrics.video import read_pictures
from flexkern.model.families import FAMILIES
from flexkern.model.vae import load_vae
from flexkern.model.wan import CONFIGS
from flexkern.policies import PRESETS, get_preset
from flexkern.render.segments import SegmentWriter
from flexkern.session import Session

FIRST = ("self-forcing", "@self-forcing")
SMALL = ("--size", "32x48", "--dtype", "float32", "--no-progress")


def tiny_render(command, model="self-forcing", weights="@self-forcing", *more):
    named = ("--model", model) if model else ()
    given = ("--weights", weights, "--embeddings", "@prompts.safetensors", *SMALL, *more)
    return command("render", *named, *given, *(() if "--data_path" in more else ("--prompt", "a cat")))


def pictures_in(path):
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        return sum(1 for _ in video.decode(stream)), (stream.height, stream.width), stream.average_rate


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_renders_from_its_folder(command, disk, name):
    more = ["--frames", 10]
    folder = f"@{name}" if name != "longlive" else f"@{name}/longlive_models/models/longlive_base.pt"
    more += ["--lora", "@longlive/longlive_models/models/lora.pt"] if name == "longlive" else []
    status, out, err = tiny_render(command, name, folder, *more)
    assert status == 0 and out == "video.mp4: 10 pictures, 0.6 s\n", err
    assert pictures_in("video.mp4") == (10, (32, 48), 16)
    size = r"flexkern: --size: 32 high, 48 wide \(landscape\)\n"
    assert re.match(rf"{size}flexkern: {name}: transformer .*, VAE .*, embeddings .*\n", err)
    assert f"{name} was trained with pictures of 480x832" in err


def test_pictures_are_those_of_the_engine(command, disk):
    """The command's latents, decoded by hand, are the command's pictures."""
    assert tiny_render(command, *FIRST, "--frames", 13, "--latents", "l.safetensors")[0] == 0
    latents = load_file("l.safetensors")["latents"]
    assert list(latents.shape) == [1, 4, 16, 4, 6]  # 1 + 3 * 4 pictures
    assert tiny_render(command, *FIRST, "--frames", 10, "--preset", "longlive", "--latents", "ten.safetensors")[0] == 0
    assert tiny_render(command, *FIRST, "--frames", 2, "--preset", "longlive", "--latents", "two.safetensors")[0] == 0
    two, ten = (load_file(f"{name}.safetensors")["latents"] for name in ("two", "ten"))
    assert ten.shape[1] == 4 and torch.equal(two, ten[:, :2])  # the second picture needs the second latent frame
    with safe_open("l.safetensors", framework="pt") as file:
        told = {"prompt": "a cat", "seed": "0", "preset": "flex", "model": "self-forcing", "pictures": "13"}
        told |= {"fps": "16", "title": "a cat", "comment": "seed 0, preset flex, model self-forcing"}
        assert file.metadata() == told
    seen, write = [], SegmentWriter.write

    def watched(writer, pixels):
        seen.append(torch.from_numpy(pixels))
        write(writer, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentWriter, "write", watched)
        assert tiny_render(command, *FIRST, "--frames", 13)[0] == 0
    decoded = load_vae(disk / "vae.pth").decoder()(latents)[0]
    assert (decoded.int() - torch.cat(seen).int()).abs().max() <= 1


def test_the_average_is_taken_unless_the_raw_weights_are_asked_for(command):
    for name, flags in (("ema", ()), ("same", ("--ema",)), ("raw", ("--no-ema",))):
        assert tiny_render(command, *FIRST, "--frames", 1, "--latents", f"{name}.safetensors", *flags)[0] == 0
    ema, same, raw = (load_file(f"{name}.safetensors")["latents"] for name in ("ema", "same", "raw"))
    assert torch.equal(ema, same) and not torch.allclose(ema, raw)


def test_a_lora_is_merged_with_its_scale(command):
    lora = ("--lora", "@longlive/longlive_models/models/lora.pt")
    for name, flags in (("without", ()), ("none", (*lora, "--lora-scale", 0)), ("full", lora)):
        assert tiny_render(command, *FIRST, "--frames", 2, "--latents", f"{name}.safetensors", *flags)[0] == 0
    without, none, full = (load_file(f"{name}.safetensors")["latents"] for name in ("without", "none", "full"))
    assert torch.equal(without, none) and not torch.allclose(without, full)


def test_research_flags_and_their_configuration(command, monkeypatch, disk):
    Path("self_forcing.yaml").write_text(
        "generator_ckpt: x.pt\nlr: 2.0e-06\nrope_theta: 5\nmoods: 3\nnum_frame_per_block: 1\n"
        "denoising_step_list: [1000, 500, 0]\n"
        "warp_denoising_step: false\ncontext_noise: 20\n"
        "model_kwargs:\n  timestep_shift: 8.0\n  local_attn_size: 9\n  sink_size: 2\n"
    )
    Path("p.txt").write_text("a cat\n\na dog\n")
    sessions, seeds = [], []
    kept = flexkern.render.Job.run
    monkeypatch.setattr(flexkern.render.Job, "run", lambda j, **k: sessions.append(j.session) or kept(j, **k))
    opened = Session.__init__
    monkeypatch.setattr(Session, "__init__", lambda s, *a, **k: seeds.append(k["seed"]) or opened(s, *a, **k))
    flags = ("--config_path", "self_forcing.yaml", "--data_path", "p.txt", "--output_folder", "videos/here")
    flags += ("--num_output_frames", "3", "--use_ema", "--seed", "5")
    given = ("--embeddings", "@prompts.safetensors", "--checkpoint_path", "@self-forcing", *SMALL)
    status, out, err = command("render", *flags, *given)
    assert status == 0, err
    assert out == "".join(f"videos/here/{i:04}.mp4: 9 pictures, 0.6 s\n" for i in range(2))
    told = "not supported, though the video would differ: rope_theta; unknown: moods; for training only: lr"
    assert f"flexkern: self_forcing.yaml: {told}\n" in err and seeds == [5, 6]
    engine, chosen = sessions[0].engine, sessions[0].preset
    assert engine.schedule.timesteps() == [1000, 500] and engine.chunk == 1
    assert (engine.schedule.shift, engine.schedule.context_timestep) == (8.0, 20)
    assert chosen == get_preset("flex", {"retention.window": 9, "retention.sink": 2})
    assert [pictures_in(f"videos/here/{i:04}.mp4")[0] for i in range(2)] == [9, 9]
    assert not torch.equal(sessions[0].text[0][0], sessions[1].text[0][0])


def test_options_win_over_the_configuration(command, monkeypatch):
    Path("c.yaml").write_text("local_attn_size: -1\nsink_size: 1\nnum_frame_per_block: 3\nglobal_sink: false\n")
    caught = []
    monkeypatch.setattr(flexkern.render.Job, "run", lambda job, **_: caught.append(job.session) or True)
    more = ("--config_path", "c.yaml", "--retention.sink", "4", "--chunk", "2", "--preset", "longlive")
    assert tiny_render(command, "causvid", "@causvid", *more)[0] == 0
    chosen = {"retention.sink": 4, "switch.keep_sink": False}
    assert caught[0].preset == get_preset("longlive", chosen) and caught[0].engine.chunk == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_brings_its_preset(name):
    arguments = with_policies(Render, ["--model", name])()
    assert arguments.retention.window == get_preset(FAMILIES[name].preset).retention.window


def test_prompts_by_time_need_no_encoder_at_the_switch(command, disk):
    Path("s.yaml").write_text("0: a cat\n0.3: a dog\n")
    given = ("--weights", "@longlive/longlive_models/models/longlive_base.pt", "--embeddings", "@prompts.safetensors")
    for name, prompts in (("a", ("--prompt", "a cat")), ("b", ("--prompts", "s.yaml"))):
        length = ("--num_output_frames", 9, "--latents", f"{name}.safetensors")
        status, _, err = command("render", "--model", "longlive", *given, *SMALL, *length, *prompts)
        assert status == 0, err
    assert "lora.pt is a LoRA and is not used; add --lora PATH to use one\n" in err
    a, b = (load_file(f"{name}.safetensors")["latents"] for name in "ab")
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 6:], b[:, 6:])


def test_a_text_encoder_fills_the_file_of_embeddings(command, tmp_path):
    layouts.save_wan(tmp_path / "wan", text=True)
    given = ("--model", "self-forcing", "--weights", "wan", "--prompt", "a cat", *SMALL, "--frames", 1)
    status, _, err = command("render", *given, "--embeddings", "e.safetensors", "--latents", "a.safetensors")
    assert status == 0 and "e.safetensors: embeddings of 1 prompts" in err
    (tmp_path / "wan/models_t5_umt5-xxl-enc-bf16.pth").unlink()
    assert command("render", *given, "--embeddings", "e.safetensors", "--latents", "b.safetensors")[0] == 0
    a, b = (load_file(f"{name}.safetensors")["latents"] for name in "ab")
    assert torch.equal(a, b)


def test_a_video_can_begin_with_an_image(command, disk):
    more = ("--image", "@red.png", "--first-chunk", 1, "--frames", 9)
    status, out, err = tiny_render(command, *FIRST, *more, "--latents", "l.safetensors")
    assert status == 0 and out == "l.safetensors: 3 latent frames\n", err
    vae, latents = load_vae(disk / "vae.pth"), load_file("l.safetensors")["latents"]
    given = torch.full((1, 1, 32, 48, 3), 0, dtype=torch.uint8) + torch.tensor([200, 30, 30], dtype=torch.uint8)
    torch.testing.assert_close(latents[:, :1], vae.encode(given))
    status, out, err = tiny_render(command, *FIRST, *more)
    assert status == 0 and pictures_in("video.mp4")[0] == 9, err


def test_interrupted_latents_are_kept(command, stop):
    stop(2)
    status, out, err = tiny_render(command, *FIRST, "--frames", 40, "--latents", "l.safetensors")
    assert status == 130 and not out and "l.unfinished.safetensors holds the first 21 of 40 pictures" in err
    assert load_file("l.unfinished.safetensors")["latents"].shape[1] == 6


def test_latents_are_decoded_to_the_video_that_a_render_makes(command, disk):
    for more in ((), ("--latents", "l.safetensors")):
        assert tiny_render(command, *FIRST, "--frames", 10, *more)[0] == 0
    status, out, err = command("decode", "l.safetensors", "--vae", "@vae.pth", "--out", "d.mp4", "--no-progress")
    assert (status, out, err) == (0, "d.mp4: 10 pictures, 0.6 s\n", "")
    rendered, decoded = (list(read_pictures(name)) for name in ("video.mp4", "d.mp4"))
    assert len(decoded) == 10 and all(np.array_equal(a, b) for a, b in zip(rendered, decoded, strict=True))
    for more, words in (
        ((), "d.mp4 exists already: --overwrite replaces it"),
        (("--overwrite",), "l.safetensors needs a VAE: give --vae PATH"),
        (("--overwrite", "--vae", "@bare.safetensors"), "bare.safetensors is not a VAE or tiny VAE"),
        (("--overwrite", "--threads", 0), "--threads must be at least 1, got 0"),
    ):
        status, out, err = command("decode", "l.safetensors", "--out", "d.mp4", *more)
        assert status == 2 and not out and re.search(words, err), err


def test_latents_become_every_form_of_video(command, disk):
    given = ("--frames", 10, "--latents", "l.safetensors", "--seed", 3)
    assert tiny_render(command, *FIRST, *given)[0] == 0
    assert tiny_render(command, *FIRST, "--frames", 10, "--out", "shots/%03d.png", "--seed", 3)[0] == 0
    decode = ("decode", "l.safetensors", "--vae", "@vae.pth", "--no-progress")
    assert command(*decode, "--out", "cut/%03d.png")[0] == 0
    shots, cut = (sorted(Path(folder).glob("*.png")) for folder in ("shots", "cut"))
    assert len(cut) == 10 and [a.read_bytes() for a in shots] == [b.read_bytes() for b in cut]
    status, out, _ = command(*decode, "--out", "d.mp4", "--fps", 8, "--crf", 30)
    assert (status, out) == (0, "d.mp4: 10 pictures, 1.2 s\n")
    with av.open("d.mp4") as video:
        assert video.streams.video[0].average_rate == 8 and "seed 3" in video.metadata["comment"]
    said = json.loads(Path("d.mp4.json").read_text())
    assert said["video"]["sha256"] == hashlib.sha256(Path("d.mp4").read_bytes()).hexdigest()
    assert said["decoded"]["sha256"] == hashlib.sha256(Path("l.safetensors").read_bytes()).hexdigest()
    assert said["decoded"]["rendered"]["order"]["seed"] == 3 and said["video"]["fps"] == "8"
    for more, words in (
        (("--out", "d.avi"), "must be named .mp4, .mov, or FOLDER/%06d.png"),
        (("--out", "e.mp4", "--format", "png"), "format png contradicts the name of the output"),
        (("--out", "e.mp4", "--fps", 0), "fps must be at least 1"),
        (("--out", "cut/%03d.png"), "exists already: --overwrite replaces it"),
        (("--out", "e.mov"), "ProRes"),
    ):
        status, out, err = command(*decode, *more)
        assert status == 2 and not out and re.search(words, err), err
    assert not Path("e.mov").exists() and not Path("e.mp4").exists()


REFUSED = {
    "no weights": ("--model longlive --prompt x", "--model longlive needs --weights PATH"),
    "no prompt": ("--model longlive --weights @causvid", "needs --prompt TEXT, --prompts FILE or --data-path FILE"),
    "a typo": ("--model self-forcin --prompt x", "there is no model 'self-forcin': .* did you mean 'self-forcing'"),
    "no file": ("@@ --weights none.pt", "no checkpoint at none.pt"),
    "several": ("@@ --model causvid --weights @longlive", "several transformers in .*; name one of them"),
    "a VAE": ("@@ --weights @vae.pth", "vae.pth is a VAE; expected a transformer"),
    "no VAE": ("@@ --weights @bare/bare.safetensors", "pixels need a VAE .* or --latents FILE to write latents"),
    "no text": ("--model causvid --weights @causvid --prompt x", "a prompt needs a text encoder .* --embeddings FILE"),
    "an unknown prompt": ("@@ --prompt cow", "prompts.safetensors holds no embedding of 'cow'; it holds 2: 'a cat'"),
    "absent embeddings": ("@@ --embeddings no.safetensors", "there are no embeddings at no.safetensors; a prompt"),
    "odd size": ("@@ --size 30x48", "size must be a multiple of 16 pixels, .* got 30x48; the nearest is 32x48"),
    "no size": ("@@ --size big", "--size must be HEIGHTxWIDTH in pixels, such as 480x832, got 'big'"),
    "half a chunk": ("@@ --num_output_frames 7", "makes chunks of 3 latent frames, .* got 7 in all; .* 6 and 9"),
    "an image": ("@@ --image @red.png", "of self-forcing cannot begin with one picture: .* first chunk is 3 frames"),
    "no image": ("@@ --image none.png --chunk 1", "no image at none.png"),
    "a text image": ("@@ --image p.txt --chunk 1", "p.txt is not an image"),
    "another lora": ("@@ --lora lora.pt", "lora.pt does not fit .* unknown targets 1: blocks.9.ffn.0.weight"),
    "keys": ("@@ --weights broken.pt --vae @vae.pth", "does not fit the model: missing 1: head.modulation"),
    "no average": ("@@ --weights @causvid --ema", r"does not hold generator_ema \| .*; it holds generator"),
    "both": ("@@ --ema --no-ema", "give --ema or --no-ema, not both"),
    "channels": ("@@ --weights demo.safetensors --vae @vae.pth", "latents of 3 in, 3 out channels; expected 16"),
    "wide embeddings": ("@@ --embeddings wide.safetensors", "holds embeddings of 32 channels; .* takes 48"),
    "small window": ("@@ --retention.window 5", r"window must hold the sink \(3\) and the incoming frames \(3\)"),
    "a table": ("@@ --position.table 1 1", "table must hold 22 multipliers, got 2"),
    "a backend": ("@@ --backend tritn", "backend 'tritn' is not there"),
    "a cut": ("@@ --prompts cut.yaml", "the cut at 1 seconds needs position.index 'slot'"),
    "latents": ("@@ --latents l.pt", "latents must be named .safetensors, got 'l.pt'"),
    "no config": ("@@ --config_path none.yaml", "there is no configuration none.yaml"),
    "a bad config": ("@@ --config_path bad.yaml", "bad.yaml: num_frame_per_block must be a whole number, got 'three'"),
    "bad steps": (
        "@@ --config_path steps.yaml",
        r"denoising_step_list must fall from at most 1000 to above 0, got \[500, 900\]",
    ),
    "a file as folder": ("@@ --data_path p.txt --output_folder p.txt", "--output-folder p.txt is not a folder"),
    "below a file": ("@@ --data_path p.txt --output_folder p.txt/x", "--output-folder p.txt/x cannot be made in p.txt"),
    "many prompts": ("@@ --data_path p.txt", "makes several videos: give --output-folder as well"),
    "a decoder": ("--vae-backend flexkern", "--vae-backend is for checkpoints: name what --weights are with --model"),
    "for the demo": ("--lora lora.pt", "--lora is for checkpoints: name what --weights are with --model self-forcing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_weights_are_read(command, monkeypatch, tmp_path, disk, case):
    for name in ("load_transformer", "load_vae", "load_tiny_decoder", "load_text_encoder"):
        monkeypatch.setattr(f"flexkern.model.checkpoint.{name}", lambda *_, **__: pytest.fail("weights were read"))
    state = layouts.tiny_transformer()
    torch.save({k: t for k, t in state.items() if k != "head.modulation"}, "broken.pt")
    torch.save(layouts.peft({"blocks.9.ffn.0": (torch.ones(4, 256), torch.ones(512, 4))}), "lora.pt")
    config = {"in_dim": 3, "out_dim": 3, "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 48}
    three = {"patch_embedding.weight": torch.ones(256, 3, 1, 2, 2), "head.head.weight": torch.ones(12, 256)}
    three["head.head.bias"] = torch.ones(12)
    save_file(state | three, "demo.safetensors", {"flexkern_config": json.dumps(config)})
    layouts.save_prompts("wide.safetensors", width=32)
    for name, text in {
        "p.txt": "a cat\n", "cut.yaml": "[{at: 0, prompt: a cat}, {at: 1, prompt: a dog, cut: true}]",
        "bad.yaml": "num_frame_per_block: three", "steps.yaml": "denoising_step_list: [500, 900]",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    (disk / "bare").mkdir(exist_ok=True)
    (disk / "bare/bare.safetensors").write_bytes((disk / "bare.safetensors").read_bytes())
    before = sorted(tmp_path.iterdir())
    arguments, words = REFUSED[case]
    last = dict(zip(arguments.split()[1::2], arguments.split()[2::2], strict=False)) if "@@" in arguments else {}
    usual = {"--model": "self-forcing", "--weights": "@self-forcing", "--embeddings": "@prompts.safetensors"}
    usual |= {} if {"--prompts", "--data_path"} & last.keys() else {"--prompt": "a cat"}
    extra = [word for name, value in usual.items() if name not in last for word in (name, value)]
    given = arguments.replace("@@", "").split() + (extra if "@@" in arguments else [])
    status, out, err = command("render", *given)
    assert status == 2 and not out
    assert re.fullmatch(rf"(flexkern: (?!error)[^\n]*\n)*flexkern: error: [^\n]*({words})[^\n]*\n", err), err
    assert sorted(tmp_path.iterdir()) == before


DOCS = Path(flexkern.render.__file__).parents[1] / "docs/weights.md"


@pytest.fixture
def described(tmp_path):
    """What the page on weights names, in the current folder."""
    for name, save in {
        "Self-Forcing": layouts.save_self_forcing, "LongLive": layouts.save_longlive,
        "RollingForcing": layouts.save_rolling_forcing, "SFWan2.1-T2V-1.3B-Diffusers": layouts.save_diffusers,
        "autoregressive_checkpoint": layouts.save_causvid, "Wan2.1-T2V-1.3B": layouts.save_wan,
    }.items():  # fmt: skip
        folder = save(tmp_path / name)
        layouts.save_text(next(iter(folder.glob("wan_models/*")), folder))
    (tmp_path / "Self-Forcing/configs").mkdir()
    (tmp_path / "Self-Forcing/configs/self_forcing_dmd.yaml").write_text("num_frame_per_block: 3\n")
    (tmp_path / "autoregressive_checkpoint/Wan2.1_VAE.pth").rename("Wan2.1_VAE.pth")
    for name in ("self_forcing_dmd.pt", "framewise.pt"):
        torch.save({"generator_ema": layouts.prefixed(layouts.tiny_transformer(), "model.")}, name)
    Image.new("RGB", (64, 40), (200, 30, 30)).save("cat.png")
    Path("schedule.yaml").write_text("0: a cat walks\n0.5: a dog walks\n")
    Path("prompts.txt").write_text("a cat walks on grass\n")


def test_every_command_of_the_page_on_weights(command, described, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else warmup would compile all that 1.3B launches
    commands = re.findall(r"^    flexkern (.+)$", DOCS.read_text(), re.MULTILINE)
    assert len(commands) > 10
    for line in commands:
        short = re.sub("--seconds 60", "--seconds 0.1", line).replace("frames 240", "frames 3")
        given = re.findall(r'"[^"]+"|\S+', short)
        limit = () if re.search("--seconds|--num_output", line) else ("--frames", 13 if "--prompts" in line else 1)
        extra = (*SMALL, "--overwrite", *limit) if line.startswith("render") else ()
        status, _, err = command(*(word.strip('"') for word in given), *extra)
        if line.startswith("warmup"):  # its options are known; the GPU is missing
            assert status == 2 and re.fullmatch(
                "flexkern: error: [^\n]*(nothing compiles|nothing can be compiled|CUDA GPU)[^\n]*\n", err
            ), err
            continue
        assert status == 0, f"{line}: {err}"


def test_the_page_on_weights_lists_presets_and_families_as_they_are():
    text = DOCS.read_text()
    for name, known in PRESETS.items():
        assert f"| `{name}` | {known.doc} |" in text
    for name, family in FAMILIES.items():
        row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)[0]
        assert f"`{family.preset}`" in row and f"| {family.chunk} |" in row
        steps = " ".join(f"{step:g}" for step in family.schedule.steps)
        told = f"| {steps}{' warped' * family.schedule.warp}, {family.schedule.shift:g} |"
        assert told in row or "| as `self-forcing` |" in row
    for size, known in (("2.8", CONFIGS["1.3B"]), ("28.6", CONFIGS["14B"])):
        page = 4 * known.num_layers * known.dim * 1560 / 1e9
        cells = [f"{frames * page:.1f}" for frames in (21, 27, 24, 12, 6)]
        rows = re.findall(r"^\| (?:weights|cache).*$", text, re.MULTILINE)
        column = 2 if size == "2.8" else 3
        assert [row.split("|")[column].strip() for row in rows] == [size, *cells]
