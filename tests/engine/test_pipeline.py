"""From a checkpoint to an engine: refused before anything is loaded, or the engine that ``flexkern render`` runs."""

import json
import shutil
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
pytest.importorskip("transformers", reason='needs pip install "flexkern[model]"')

import layouts

from flexkern.cli import main
from flexkern.engine import Engine
from flexkern.model import checkpoint as room
from flexkern.model.families import FAMILIES
from flexkern.model.schedule import Schedule
from flexkern.model.text import KnownPrompts, SavedEmbeddings, WanTextEncoder
from flexkern.model.vae import DiffusersDecoder, WanDecoder
from flexkern.pipeline import Checkpoint, MissingPart, check, load
from flexkern.policies import get_preset

pytestmark = pytest.mark.filterwarnings("ignore:.*trained with pictures")
SIZE = (4, 6)  # of a latent frame: 32x48 pixels
FULL = {"dtype": torch.float32, "size": SIZE}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The folder of Wan with all parts, Self-Forcing's repository, a bare file alone, and the embeddings of prompts."""
    root = tmp_path_factory.mktemp("disk")
    layouts.save_wan(root / "wan", text=True)
    layouts.save_self_forcing(root / "self-forcing")
    layouts.save_longlive(root / "longlive")
    layouts.save_prompts(root / "prompts.safetensors")
    layouts.save_prompts(root / "wide.safetensors", width=32)
    state = layouts.tiny_transformer()
    (root / "bare").mkdir()
    save_file(state, root / "bare/bare.safetensors")
    torch.save({key: tensor for key, tensor in state.items() if key != "head.modulation"}, root / "broken.pt")
    torch.save(layouts.peft({"blocks.9.ffn.0": (torch.ones(4, 256), torch.ones(512, 4))}), root / "lora.pt")
    vae = layouts.tiny_vae()
    torch.save({key: tensor for key, tensor in vae.items() if key != "decoder.head.2.bias"}, root / "vae.pth")
    torch.save({"decoder.1.weight": torch.ones(12, 16, 3, 3)}, root / "tiny.pth")
    three = {"patch_embedding.weight": torch.ones(256, 3, 1, 2, 2), "head.head.weight": torch.ones(12, 256)}
    config = {"in_dim": 3, "out_dim": 3, "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 48}
    save_file(
        state | three | {"head.head.bias": torch.ones(12)},
        root / "three.safetensors",
        {"flexkern_config": json.dumps(config)},
    )
    layouts.save_wan(root / "wordless", text=True)
    (root / "wordless/google/umt5-xxl/tokenizer.json").unlink()
    (root / "wordless/google/umt5-xxl/tokenizer_config.json").unlink()
    Image.new("RGB", (64, 40), (200, 30, 30)).save(root / "red.png")
    (root / "text.png").write_text("x")
    return root


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for name in ("load_transformer", "load_vae", "load_tiny_decoder", "load_text_encoder"):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("weights were read"))


def checkpoint(disk, weights="self-forcing", **fields):
    given = {"family": "self-forcing", "embeddings": disk / "prompts.safetensors", "size": SIZE, "dtype": "float32"}
    named = {"vae", "text_encoder", "tokenizer", "embeddings", "lora"} & fields.keys()
    return Checkpoint(weights=disk / weights, **given | fields | {name: disk / fields[name] for name in named})


REFUSED = {  # fields of the checkpoint, how it is used, and what is said
    "no file": ({"weights": "none.pt"}, {}, "no checkpoint at .*none.pt"),
    "several": ({"weights": "longlive", "family": "causvid"}, {}, "several transformers in .*; name one of them"),
    "a VAE": ({"weights": "vae.pth"}, {}, "vae.pth is a VAE; expected a transformer"),
    "no VAE": ({"weights": "bare/bare.safetensors"}, {"pixels": True}, "pixels need a VAE .* pixels=False"),
    "no text": ({"weights": "bare/bare.safetensors", "embeddings": "no"}, {}, "there are no embeddings .* name one as"),
    "unknown prompt": ({}, {"prompts": ["a cow"]}, "prompts.safetensors holds no embedding of 'a cow'"),
    "one text": ({}, {"prompts": "a cat"}, "prompts must be a list of texts, got 'a cat'"),
    "wide": ({"embeddings": "wide.safetensors"}, {}, "wide.safetensors holds embeddings of 32 channels; .* takes 48"),
    "no tokenizer": ({"weights": "wordless", "embeddings": "e"}, {}, "no tokenizer .* pass its folder as tokenizer"),
    "keys": ({"weights": "broken.pt"}, {"pixels": False}, "does not fit the model: missing 1: head.modulation"),
    "VAE's keys": ({"vae": "vae.pth"}, {}, "vae.pth does not fit the model: missing 1: decoder.conv_out.bias"),
    "a LoRA": ({"lora": "lora.pt"}, {}, "lora.pt does not fit .* unknown targets 1: blocks.9.ffn.0.weight"),
    "no EMA": ({"weights": "bare/bare.safetensors", "ema": True}, {"pixels": False}, "does not hold generator_ema"),
    "channels": ({"weights": "three.safetensors"}, {"pixels": False}, "latents of 3 in, 3 out channels; expected 16"),
    "tiny VAE": ({"vae": "tiny.pth", "vae_backend": "diffusers"}, {}, "vae_backend 'diffusers' is for Wan's VAE, and "),
    "odd size": ({"size": (3, 6)}, {}, "latent frame must be a multiple of 2x2, got 3x6"),
    "an image": ({}, {"image": "red.png"}, "of self-forcing cannot begin with one picture"),
    "no image": ({"chunk": 1}, {"image": "none.png"}, "no image at .*none.png"),
    "a text": ({"chunk": 1}, {"image": "text.png"}, "text.png is not an image that can be read"),
    "window": ({}, {"preset": get_preset("flex", {"retention.window": 5})}, "window must hold the sink .3. and the"),
    "first chunk": ({"first_chunk": 20}, {}, "window must hold the sink .3. and the incoming frames .20"),
    "table": ({}, {"preset": get_preset("flex", {"position.table": (1.0,)})}, "table must hold 22 multipliers, got 1"),
    "no preset": ({}, {"preset": "flax"}, "no preset 'flax': .* did you mean 'flex'"),
    "backend": ({}, {"backend": "tritn"}, "backend 'tritn' is not there"),
    "device": ({}, {"device": "tpu"}, "device must be cpu, cuda or cuda:N, got 'tpu'"),
    "absent device": ({}, {"device": "cuda:99"}, "there is no device 'cuda:99'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("way", [check, load])
def test_what_is_wrong_is_told_before_anything_is_loaded(disk, nothing_is_loaded, way, case):
    fields, use, words = REFUSED[case]
    use = use | ({"image": disk / use["image"]} if "image" in use else {})
    given = checkpoint(disk, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        way(given, **{"prompts": ["a cat"]} | use)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"family": "self-forcin"}, ValueError, "no family 'self-forcin': .* did you mean 'self-forcing'"),
        ({"dtype": "fp16"}, ValueError, "Checkpoint.dtype must be 'bfloat16' | 'float16' | 'float32', got 'fp16'"),
        ({"vae_backend": "x"}, ValueError, "Checkpoint.vae_backend must be 'auto' | 'flexkern' | 'diffusers', got 'x'"),
        ({"lora_scale": float("nan")}, TypeError, "Checkpoint.lora_scale must be a finite number"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"size": (60,)}, TypeError, "Checkpoint.size must be a tuple of 2"),
    ],
)
def test_a_checkpoint_checks_its_fields(fields, error, words):
    with pytest.raises(error, match=words):
        Checkpoint(weights="x", **fields)


def test_check_says_what_it_found(disk, nothing_is_loaded):
    parts = check(checkpoint(disk, chunk=1), prompts=["a cat", "a cat"], image=disk / "red.png", frames=9)
    wan = disk / "self-forcing/wan_models/Wan2.1-T2V-1.3B"
    assert parts.transformer == disk / "self-forcing/checkpoints/self_forcing_dmd.pt"
    assert (parts.vae, parts.text_encoder, parts.prompts) == (wan / "Wan2.1_VAE.pth", None, ("a cat",))
    assert (parts.family.chunk, parts.family.first_chunk, parts.family.size) == (1, 1, SIZE)
    assert parts.decodes and not parts.tiny and not parts.saves_embeddings
    assert str(parts).startswith(f"self-forcing: transformer {parts.transformer} (pt, generator_ema, Wan keys), VAE")
    assert parts.notes == ("self-forcing was trained with pictures of 480x832",)


def test_a_missing_part_can_be_told_from_other_errors(disk):
    for part, use in (("VAE", {"pixels": True}), ("text encoder", {"prompts": ["a cat"]})):
        with pytest.raises(MissingPart) as caught:
            check(Checkpoint(weights=disk / "bare/bare.safetensors"), **use)
        assert caught.value.part == part and str(caught.value).startswith(caught.value.why)


@pytest.fixture
def rendered(disk, tmp_path):
    """The latents that the command line makes of a prompt."""

    def run(weights, *more):
        size = ("--size", "32x48", "--dtype", "float32", "--num_output_frames", "6", "--no-progress", "--seed", "3")
        target = tmp_path / "l.safetensors"
        given = ("--weights", str(disk / weights), "--prompt", "a cat", "--latents", str(target))
        assert main(["render", *given, *size, *more]) == 0
        return load_file(target)["latents"]

    return run


def made(engine, preset="flex"):
    session = engine.session("a cat", preset=preset, seed=3, frames=6)
    return torch.cat([chunk.latents for chunk in session], dim=1)


@pytest.mark.parametrize("name", ["self-forcing", "longlive"])
def test_python_gets_what_the_command_line_gets(disk, rendered, name):
    """Weights, schedule, chunk, LoRA and embeddings alike: the latents are equal bit for bit, and so are pictures."""
    repository = disk / "longlive/longlive_models/models"
    weights = disk / name if name == "self-forcing" else repository / "longlive_base.pt"
    lora = None if name == "self-forcing" else repository / "lora.pt"
    saved, preset = disk / "prompts.safetensors", FAMILIES[name].preset
    expected = rendered(weights, "--model", name, "--embeddings", str(saved), *(("--lora", str(lora)) if lora else ()))
    given = Checkpoint(weights=weights, lora=lora, embeddings=saved, size=SIZE, dtype="float32")
    engines = [
        load(given, prompts=["a cat"], preset=preset, frames=6, pixels=True),
        Engine.from_pretrained(weights, lora=lora, embeddings=saved, **FULL),
    ]
    for engine in engines:
        assert torch.equal(made(engine, preset), expected)
    pictures = [engine.decoder()(expected) for engine in engines]
    assert torch.equal(*pictures) and pictures[0].shape == (1, 21, 32, 48, 3)


def test_prompts_known_beforehand_are_encoded_before_the_transformer_is_loaded(disk, rendered, monkeypatch):
    loaded = []
    for name in ("load_text_encoder", "load_transformer"):
        kept = getattr(room, name)
        monkeypatch.setattr(
            room, name, lambda *a, _kept=kept, _name=name, **k: (loaded.append(_name), _kept(*a, **k))[1]
        )
    engine = load(
        Checkpoint(weights=disk / "wan", family="self-forcing", size=SIZE, dtype="float32"), prompts=["a cat"]
    )
    assert loaded == ["load_text_encoder", "load_transformer"] and isinstance(engine.text_encoder, KnownPrompts)
    with pytest.raises(ValueError, match="'a dog' was not encoded before the model was loaded; known are 1: 'a cat'"):
        engine.session("a dog")
    assert torch.equal(made(engine), rendered("wan", "--model", "self-forcing"))


def test_without_prompts_the_encoder_stays(disk, rendered):
    engine = Engine.from_pretrained(disk / "wan", family="self-forcing", **FULL)
    assert isinstance(engine.text_encoder, WanTextEncoder) and engine.encoder is not None
    assert torch.equal(made(engine), rendered("wan", "--model", "self-forcing"))
    saved = Engine.from_pretrained(disk / "self-forcing", embeddings=disk / "prompts.safetensors", **FULL)
    assert isinstance(saved.text_encoder, SavedEmbeddings) and saved.encode("a dog")


def test_embeddings_are_saved_where_there_are_none(disk, tmp_path):
    file = tmp_path / "e.safetensors"
    with pytest.raises(ValueError, match="there are no embeddings at .*; to save them, give the prompts"):
        load(Checkpoint(weights=disk / "wan", embeddings=file))
    with pytest.raises(FileNotFoundError, match="there is no folder .*none to write embeddings to"):
        load(Checkpoint(weights=disk / "wan", embeddings=tmp_path / "none/e.safetensors"), prompts=["a cat"])
    given = Checkpoint(weights=disk / "wan", family="causvid", embeddings=file, size=SIZE)
    assert check(given, prompts=["a cat"]).saves_embeddings and not file.exists()
    load(given, prompts=["a cat"])
    assert SavedEmbeddings(file).prompts == ("a cat",)
    assert check(given, prompts=["a cat"]).text_encoder is None


def test_a_bare_file_gives_an_engine_that_takes_embeddings(disk):
    with pytest.warns(
        UserWarning, match="bare.safetensors does not say its family by its name; it is run as self-forc"
    ):
        engine = Engine.from_pretrained(disk / "bare/bare.safetensors", **FULL)
    assert engine.text_encoder is engine.encoder is engine.decoder is None
    assert (engine.chunk, engine.schedule, engine.size) == (3, Schedule(), SIZE)
    with pytest.raises(ValueError, match="this engine has no text encoder: pass the prompt's embedding"):
        engine.session("a cat")
    assert engine.session(torch.zeros(1, 512, 48)).step().pixels is None


def test_a_lora_that_lies_beside_is_only_told_of(disk):
    file = disk / "longlive/longlive_models/models/longlive_base.pt"
    with pytest.warns(UserWarning, match="lora.pt is a LoRA and is not used; name one as lora to use it"):
        Engine.from_pretrained(file, pixels=False)


@pytest.mark.parametrize("backend, kind", [("auto", WanDecoder), ("diffusers", DiffusersDecoder)])
def test_the_vae_decodes_with_the_backend_that_is_named(disk, backend, kind):
    with pytest.warns(UserWarning, match="does not say its family"):
        engine = Engine.from_pretrained(disk / "wan", text=False, vae_backend=backend, **FULL)
    assert type(engine.decoder()) is kind and engine.encoder is not None


def test_own_parts_take_the_place_of_those_on_disk(disk, monkeypatch):
    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("a part was read"))
    own = {"text_encoder": lambda prompts: torch.zeros(len(prompts), 512, 48), "encoder": lambda pixels: pixels}
    own["decoder"] = lambda: lambda latents: latents
    schedule = Schedule(steps=(1000, 500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine.from_pretrained(disk / "wan", schedule=schedule, chunk=2, first_chunk=1, **own, **FULL)
    assert (engine.text_encoder, engine.encoder, engine.decoder) == tuple(own.values())
    assert engine.schedule is schedule
    session = engine.session("anything", preset="flex")
    assert [session.step().frames for _ in range(2)] == [(0,), (1, 2)]
    for wrong in ({"vae": disk / "wan"}, {"embeddings": disk / "prompts.safetensors"}, {"prompts": ["a cat"]}):
        with pytest.raises(ValueError, match="not both|of no use where the checkpoint's text encoder is left out"):
            Engine.from_pretrained(disk / "wan", **own, **wrong)


@pytest.mark.parametrize("family, horizon", [("self-forcing", 21), ("longlive", 240)])
def test_a_method_gets_the_horizon_that_its_model_was_trained_on(disk, family, horizon):
    engine = load(checkpoint(disk, "bare", family=family), pixels=False)
    session = engine.session(torch.zeros(1, 32, 48), preset="flex")
    assert (engine.horizon, session.window.preset.position.train_len) == (horizon, horizon)
    asked = engine.session(torch.zeros(1, 32, 48), preset=get_preset("flex", {"position.train_len": 60}))
    assert asked.window.preset.position.train_len == 60


def test_parts_can_be_left_out(disk, nothing_is_loaded):
    parts = check(Checkpoint(weights=disk / "wan"), pixels=False)
    assert parts.vae is None and not parts.decodes and parts.text_encoder is not None
    parts = room.validate_checkpoint(Checkpoint(weights=disk / "wan"), text=False)
    assert parts.text_encoder is None and parts.decodes
    with pytest.raises(MissingPart):
        room.validate_checkpoint(Checkpoint(weights=disk / "bare/bare.safetensors"), text=True)


def test_a_family_is_told_by_the_name_of_file_or_folder(disk):
    assert (
        Checkpoint(weights=disk / "longlive/longlive_models/models/longlive_base.pt").chosen_family().name == "longlive"
    )
    assert Checkpoint(weights=disk / "self-forcing/any.pt").chosen_family().name == "self-forcing"
    chosen = Checkpoint(weights="any.pt", family=FAMILIES["causvid"].override(shift=3.0), chunk=1).chosen_family()
    assert (chosen.name, chosen.schedule.shift, chosen.chunk, chosen.first_chunk) == ("causvid", 3.0, 1, 1)


def test_loras_beside_the_weights_are_told_in_whole_sentences(disk, tmp_path):
    folder = shutil.copytree(disk / "self-forcing", tmp_path / "self-forcing")
    told = {
        2: "{0} and {1} are LoRAs and are not used; name",
        6: "{0}, {1}, {2} and 3 more are LoRAs and are not used; ",
    }
    for count, words in told.items():
        paths = [folder / f"style{i}.safetensors" for i in range(count)]
        for path in paths:
            save_file({"blocks.0.ffn.0.diff_b": torch.ones(512)}, path)
        (note,) = check(Checkpoint(weights=folder), pixels=False).notes
        assert note.startswith(words.format(*paths)), note
