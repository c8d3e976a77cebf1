"""Orders: what they hold, how they travel as JSON, and how an engine carries one out."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flexkern.engine import Engine
from flexkern.model.families import FAMILIES
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.policies import get_preset
from flexkern.render import Order, PromptSwitch, prepare, run
from flexkern.render.loop import first_wait

CAT = (PromptSwitch(at=0, prompt="a cat"),)
BOTH = (*CAT, PromptSwitch(at=2.5, prompt="a dog", cut=True))
PLAIN = Order(script=CAT, pictures=9, target=Path("v.mp4"), preset="flex")
FULL = Order(
    script=BOTH,
    pictures=960,
    target=Path("folder/l.safetensors"),
    preset="longlive-infinite",
    overrides={"retention.sink": 6, "position.table": (1.0, 0.5), "noise.rho": -0.3, "switch.keep_sink": False},
    seed=7,
    writes="latents",
    image=Path("cat.png"),
)


@pytest.mark.parametrize(
    ("backend", "device", "said"),
    [("triton", "cuda:0", "compiling or loading kernels"), ("triton", "cpu", "chunk 0"), ("sdpa", "cuda", "chunk 0")],
)
def test_the_first_chunk_says_what_it_waits_for(backend, device, said):
    model = SimpleNamespace(device=torch.device(device))
    assert first_wait(SimpleNamespace(chunks=0, engine=SimpleNamespace(backend_name=backend, model=model))) == said


@pytest.mark.parametrize("order", [PLAIN, FULL])
def test_an_order_travels_as_json(order):
    arrived = Order.from_dict(json.loads(json.dumps(order.to_dict())))
    assert arrived == order and arrived.method == order.method and hash(arrived) == hash(order)
    assert arrived.to_dict() == order.to_dict()


def test_overrides_without_effect_are_known():
    assert PLAIN.idle == () and FULL.idle == ("noise.rho",)  # this preset's noise is iid
    chosen = replace(FULL, overrides=FULL.overrides | {"noise.kind": "ar1", "position.mode": "pi"})
    assert chosen.idle == ()
    assert replace(
        chosen, overrides={"position.table": (1.0,), "position.mode": "pi", "position.ramp": "smooth"}
    ).idle == ("position.ramp",)


def test_numbers_of_numpy_travel_as_json(tmp_path):
    numbers = {
        "retention.sink": np.int64(6),
        "noise.rho": np.float32(-0.5),
        "position.table": [np.float64(1), np.int64(2)],
    }
    order = replace(PLAIN, pictures=np.int64(5), seed=np.int32(3), overrides=numbers)
    assert Order.from_dict(json.loads(json.dumps(order.to_dict()))) == order
    assert json.loads(json.dumps(order.method.describe()))["retention.sink"] == 6


def test_what_has_a_default_may_be_left_out():
    written = {"script": {"0": "a cat"}, "pictures": 9, "target": "v.mp4", "preset": "flex"}
    assert Order.from_dict(written) == PLAIN  # JSON knows no numbers as keys
    assert Order.from_dict(written | {"script": [{"at": 0, "prompt": "a cat"}]}) == PLAIN


def test_the_method_is_the_preset_with_its_overrides():
    assert PLAIN.method == get_preset("flex")
    assert FULL.method == get_preset("longlive-infinite").override(FULL.overrides) != get_preset("longlive-infinite")
    assert FULL.prompts == ("a cat", "a dog")


def test_overrides_are_the_orders_own():
    mine = {"retention.sink": 6}
    order = replace(PLAIN, overrides=mine)
    mine["retention.sink"] = 3
    assert order.overrides == {"retention.sink": 6}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"script": ()}, ValueError, "a script needs at least one prompt, got none"),
        ({"script": BOTH[1:]}, ValueError, "the first prompt must be at 0 seconds, got 2.5"),
        ({"script": BOTH}, ValueError, "the cut at 2.5 seconds needs position.index 'slot', the preset has 'absolute'"),
        ({"script": [CAT]}, TypeError, "Order.script must be a tuple"),
        ({"pictures": 0}, ValueError, "pictures must be at least 1, got 0"),
        ({"pictures": 2.5}, TypeError, "Order.pictures must be an int, got 2.5"),
        (
            {"target": Path("v.gif")},
            ValueError,
            "the video must be named .mp4, .mov, or FOLDER/%06d.png .*, got 'v.gif'",
        ),
        ({"writes": "latents"}, ValueError, "latents must be named .safetensors, got 'v.mp4'"),
        ({"writes": "video!"}, ValueError, "Order.writes must be 'video' | 'latents', got 'video!'; did you mean 'vid"),
        ({"preset": "flax"}, ValueError, "no preset 'flax': .* did you mean 'flex'"),
        ({"overrides": {"retention.sinks": 1}}, ValueError, "no field 'retention.sinks': .* did you mean"),
        ({"overrides": {"retention.window": 2}}, ValueError, "window must exceed the sink of 3 frames, got 2"),
        ({"seed": -1}, ValueError, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_what_no_video_can_be_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        replace(PLAIN, **fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pictures": None}, "Order.pictures must be an int, got None"),
        ({"picturs": 3}, "an order has no field 'picturs'; did you mean 'pictures'"),
        ({"script": [{"at": 0}]}, "entry 1: expected {at: seconds, prompt: text}"),
        ({"script": "a cat"}, "expected a list of .* got str"),
        ({"target": 3}, "Order.target must be a Path, got 3"),
        ({"overrides": [1]}, "Order.overrides must be a Mapping, got"),
        ({"seed": True}, "Order.seed must be an int, got True"),
    ],
)
def test_what_is_no_order_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Order.from_dict(PLAIN.to_dict() | change)


@pytest.mark.parametrize("name", ["script", "pictures", "target", "preset"])
def test_what_is_missing_is_named(name):
    content = {key: value for key, value in PLAIN.to_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"an order needs script, pictures, target, preset, got no {name}"):
        Order.from_dict(content)


def test_targets_are_looked_for_when_asked(tmp_path):
    replace(PLAIN, target=tmp_path / "v.mp4").validate_files()
    for order in (PLAIN, FULL):
        with pytest.raises(FileNotFoundError, match="there is no folder .*none"):
            replace(order, target=tmp_path / "none" / order.target.name).validate_files()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="folder.mp4 is a folder"):
        replace(PLAIN, target=tmp_path / "folder.mp4").validate_files()


@pytest.fixture(scope="module")
def family():
    """Latents of 4x4 of three channels, each frame a picture of 32x32."""
    schedule = Schedule(steps=(1000, 500))
    return replace(FAMILIES["self-forcing"], name="small", schedule=schedule, size=(4, 4), pictures_per_frame=1)


class Enlarge:
    def __call__(self, latents):
        pictures = latents.float().repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)
        return ((pictures.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).movedim(2, -1)

    def state(self):
        return {}

    def restore(self, state):
        pass


@pytest.fixture(scope="module")
def engine(family):
    torch.manual_seed(0)
    config = WanConfig(
        dim=64, ffn_dim=64, num_heads=1, num_layers=1, in_dim=3, out_dim=3, freq_dim=32, text_len=4, text_dim=8
    )
    known = {"a cat": 1.0, "a dog": -1.0}

    def encode(prompts):
        if unknown := [prompt for prompt in prompts if prompt not in known]:
            raise ValueError(f"I know no {unknown[0]}")
        return torch.stack([torch.full((4, 8), known[prompt]) for prompt in prompts])

    shrink = lambda pixels: pixels.movedim(-1, 2)[..., ::8, ::8].float() / 127.5 - 1
    return Engine(
        CausalWan(config).eval(),
        schedule=family.schedule,
        size=family.size,
        text_encoder=encode,
        encoder=shrink,
        decoder=Enlarge,
    )


def test_an_order_is_carried_out(engine, family, tmp_path, capsys):
    """The file holds the session's own pictures, as many as were ordered, and the metadata of latents says of what."""
    order = replace(PLAIN, target=tmp_path / "v.mp4", seed=3)
    assert run(order, engine, family, progress=False) and not capsys.readouterr().err
    with av.open(str(order.target)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (32, 32, 3)
    kept = replace(order, target=tmp_path / "l.safetensors", writes="latents")
    assert run(kept, engine, family, progress=False)
    latents = load_file(kept.target)["latents"]
    session = engine.session("a cat", preset="flex", seed=3, frames=9)
    assert torch.equal(latents, torch.cat([chunk.latents for chunk in session], dim=1))
    with safe_open(kept.target, framework="pt") as file:
        told = {"prompt": "a cat", "seed": "3", "preset": "flex", "model": "small", "pictures": "9"}
        told |= {"fps": "16", "title": "a cat", "comment": "seed 3, preset flex, model small"}
        assert file.metadata() == told


def test_a_script_is_followed(engine, family, tmp_path):
    order = Order(
        script=(*CAT, PromptSwitch(at=0.3, prompt="a dog")), pictures=9, target=tmp_path / "l.safetensors",
        preset="infinity-rope", writes="latents",
    )  # fmt: skip
    for name, ordered in (("a", order), ("b", replace(order, script=CAT))):
        assert run(replace(ordered, target=tmp_path / f"{name}.safetensors"), engine, family, progress=False)
    a, b = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "ab")
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])  # 0.3 s lie in the second chunk


def test_an_image_comes_first(engine, family, tmp_path):
    Image.new("RGB", (64, 40), (200, 30, 30)).save(tmp_path / "red.png")
    first = replace(family, first_chunk=1)
    own = Engine(
        engine.model, schedule=first.schedule, size=first.size, first_chunk=1, text_encoder=engine.text_encoder,
        encoder=engine.encoder, decoder=engine.decoder,
    )  # fmt: skip
    order = replace(PLAIN, target=tmp_path / "l.safetensors", writes="latents", image=tmp_path / "red.png")
    assert run(order, own, first, progress=False)
    latents = load_file(order.target)["latents"]
    red = torch.tensor([200, 30, 30]) / 127.5 - 1
    assert latents.shape[1] == 9 and torch.allclose(latents[0, 0], red.view(3, 1, 1).expand(3, 4, 4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"script": (PromptSwitch(at=0, prompt="a cow"),)}, "I know no a cow"),
        ({"script": (*CAT, PromptSwitch(at=9, prompt="a cow"))}, "I know no a cow"),
        ({"overrides": {"position.table": (1.0,)}}, "table must hold .* multipliers, got 1"),
        ({"overrides": {"retention.window": 5}}, "window must hold the sink"),
        ({"target": Path("none/v.mp4")}, "there is no folder none"),
    ],
)
def test_what_an_engine_cannot_make_is_refused_before_work(engine, family, tmp_path, monkeypatch, fields, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare(replace(PLAIN, **fields), engine, family)
    assert not list(tmp_path.iterdir())


def test_an_engine_without_decoder_makes_latents_alone(engine, family, tmp_path):
    bare = Engine(engine.model, schedule=family.schedule, size=family.size, text_encoder=engine.text_encoder)
    with pytest.raises(ValueError, match="this engine has no decoder: an order for it must write latents"):
        prepare(replace(PLAIN, target=tmp_path / "v.mp4"), bare, family)
    assert run(replace(PLAIN, target=tmp_path / "l.safetensors", writes="latents"), bare, family, progress=False)
