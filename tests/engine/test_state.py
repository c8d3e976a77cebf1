"""A session that is saved to a file and restored in another continues bit for bit, and refuses what is not its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_window import with_small_window

from flexkern.engine import Engine
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan
from flexkern.noise import PolicyNoise, ResearchNoise
from flexkern.policies import PRESETS, NoisePolicy, get_preset

DATA = Path(__file__).parent.parent / "data"
SIZE = (4, 6)
PROMPTS = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))


class Differences:
    """A decoder that looks back: each latent frame less the one before."""

    def __init__(self):
        self.last = torch.zeros(1, 16, *SIZE)

    def __call__(self, latents):
        shifted = torch.cat((self.last[:, None], latents[:, :-1]), dim=1)
        self.last = latents[:, -1]
        return latents - shifted

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, schedule=Schedule(steps=(1000, 500)), size=SIZE, decoder=Differences)


def through_a_file(state, path):
    """The state as safetensors and JSON give it back."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in state.items() if name not in tensors}
    save_file(tensors, path, {"state": json.dumps(others)})
    with safe_open(path, "pt") as file:
        return load_file(path) | json.loads(file.metadata()["state"])


def continued(session):
    made = [session.step()]
    session.switch(PROMPTS[1] * 3)
    made.append(session.step())
    return [chunk.frames for chunk in made], torch.cat([torch.cat((c.latents, c.pixels)) for c in made], dim=1)


def assert_continues(engine, session, path, **options):
    """The session goes on; another, that got its state in between and has seen other frames, does the same."""
    state = through_a_file(session.state(), path)
    frames, expected = continued(session)
    other = engine.session(PROMPTS[1], **options)
    other.step()
    other.restore(state)
    again, got = continued(other)
    assert again == frames and torch.equal(got, expected)
    assert other.chunks == session.chunks and other.cache.frames == session.cache.frames


@pytest.mark.parametrize("before", [0, 1, 4], ids=["nothing made", "window not full", "window full"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_continues_bit_for_bit(engine, name, before, tmp_path):
    options = dict(preset=with_small_window(name), seed=3)
    session = engine.session(PROMPTS[0], **options)
    for _ in range(before):
        session.step()
    assert_continues(engine, session, tmp_path / "state.safetensors", **options)


@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("before", [1, 5])
@pytest.mark.parametrize("name", ["flex", "longlive", "longlive-infinite", "infinity-rope"])
def test_it_continues_after_a_prompt_switch(engine, name, before, keep_sink, tmp_path):
    options = dict(preset=get_preset(name, {"switch.keep_sink": keep_sink}), seed=1)
    session = engine.session(PROMPTS[0], **options)
    for _ in range(before):
        session.step()
    session.switch(PROMPTS[1] * 2)
    assert_continues(engine, session, tmp_path / "state.safetensors", **options)


@pytest.mark.parametrize(
    "overrides",
    [
        {"noise.apply": "initial+renoise"},
        {"noise.kind": "pyoco_progressive", "noise.weight": -1.0},
        {"noise.kind": "high_pass"},
        {"noise.kind": "freenoise", "noise.window": 4, "noise.stride": 2},
        {"noise.rho_schedule": "linear_decay", "position.scale_schedule": "static"},
        {"position.scale_schedule": "dynamic"},
    ],
    ids=str,
)
def test_noise_and_positions_continue(engine, overrides, tmp_path):
    options = dict(preset=get_preset("flex", {"retention.window": 6, **overrides}), seed=2**40, frames=30)
    session = engine.session(PROMPTS[0], **options)
    session.step()
    session.step()
    assert_continues(engine, session, tmp_path / "state.safetensors", **options)


def test_a_first_chunk_given_frames_and_a_cut_continue(engine, tmp_path):
    options = dict(preset="infinity-rope", first_chunk=1)
    session = engine.session(PROMPTS[0], **options)
    session.prefill(torch.randn(1, 1, 16, *SIZE))
    session.step()
    session.cut()
    assert_continues(engine, session, tmp_path / "state.safetensors", **options)


def test_a_batch_continues(model, tmp_path):
    engine = Engine(model, schedule=Schedule(steps=(1000,)), size=SIZE)
    session, other = (engine.session(PROMPTS[:, 0], seed=seed) for seed in (4, 4))
    session.step()
    other.restore(through_a_file(session.state(), tmp_path / "state.safetensors"))
    assert torch.equal(other.step().latents, session.step().latents)


def test_the_research_codes_noise_continues(engine, tmp_path):
    noise = lambda seed: ResearchNoise((1, 9, 16, *SIZE), torch.Generator().manual_seed(seed), torch.float32)
    session, other = (engine.session(PROMPTS[0], preset="self-forcing", noise=noise(seed)) for seed in (1, 2))
    session.step()
    other.restore(through_a_file(session.state(), tmp_path / "state.safetensors"))
    assert torch.equal(other.step().latents, session.step().latents)
    with pytest.raises(ValueError, match=r"noise must be .*\[1, 9, 16, 4, 6\], got a state of .*\[1, 6, 16"):
        other.noise.restore(ResearchNoise((1, 6, 16, *SIZE), torch.Generator(), torch.float32).state())


def test_a_state_is_a_copy(engine):
    session = engine.session(PROMPTS[0])
    session.step()
    state = session.state()
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    continued(session)
    session.cache.keys.zero_()
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_another_pass_over_the_same_chunk_after_a_restore(engine):
    """A loop of somebody else's may be saved in the middle of a chunk."""
    session, other = (engine.session(PROMPTS[0], preset="longlive") for _ in range(2))
    for _ in range(5):
        session.step()
    session.switch(PROMPTS[1])  # a recache: the window is at work on frames of which the sink is not written
    other.window.restore(session.window.state())
    mine, theirs = session.window, other.window
    assert theirs.frames == mine.frames and theirs.prepare(mine.frames.start, len(mine.frames)) is theirs.memory
    for name in ("write_slots", "read_slots", "turn", "logit_scale"):
        assert torch.equal(getattr(theirs.memory.plan, name), getattr(mine.memory.plan, name)), name


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def test_a_state_of_another_session_is_refused(model, engine):
    session = engine.session(PROMPTS[0], preset="flex")
    session.step()
    state = session.state()
    for other, message in [
        (engine.session(PROMPTS[0], preset="pi"), "another session: preset.name must be 'pi', got 'flex'"),
        (
            engine.session(PROMPTS[0], preset=get_preset("flex", {"position.alpha": 0.3})),
            "preset.position.alpha must be 0.3, got 0.25",
        ),
        (engine.session(PROMPTS[0], frames=9), "frames must be 9, got None"),
        (engine.session(PROMPTS[:, 0]), "batch must be 2, got 1"),
        (engine.session(PROMPTS[0], size=(4, 4)), r"size must be \[4, 4\], got \[4, 6\]"),
        (engine.session(PROMPTS[0], first_chunk=1), "first_chunk must be 1, got 3"),
        (Engine(model, size=SIZE, decoder=Differences).session(PROMPTS[0]), r"schedule.steps must be \[1000, 750"),
        (Engine(model, schedule=engine.schedule, size=SIZE).session(PROMPTS[0]), "decoder must be None, got 'Differ"),
        (engine.session(PROMPTS[0], seed=1), "state must be of seed 1, got 0"),
    ]:
        before = other.state()
        with pytest.raises(ValueError, match=message):
            other.restore(state)
        after = other.state()
        assert before.keys() == after.keys()
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(
            before.values(), after.values(), strict=True
        ))  # fmt: skip
    larger = CausalWan(replace(model.config, num_layers=3))
    with pytest.raises(ValueError, match="model.num_layers must be 3, got 2"):
        Engine(larger, size=SIZE, decoder=Differences).session(PROMPTS[0]).restore(state)


def test_a_window_refuses_a_state_that_is_not_its_own(engine):
    window = engine.session(PROMPTS[0], preset="flex").window
    other = engine.session(PROMPTS[0], preset="flex", size=(4, 4)).window
    with pytest.raises(ValueError, match=r"another window: shape must be \[1, 2, 2\], got \[1, 2, 3\]"):
        other.restore(window.state())
    with pytest.raises(ValueError, match="another window: dtype must be 'torch.float32', got nothing"):
        window.restore(without(window.state(), "made_for.dtype"))
    with pytest.raises(ValueError, match="another window: colour is not known here"):
        window.restore(window.state() | {"made_for.colour": 1})


def test_a_cache_refuses_pages_that_do_not_fit(engine):
    cache = engine.session(PROMPTS[0]).cache
    cache.allocate([0, 1])
    state = cache.state()
    with pytest.raises(ValueError, match=r"keys of the state must be torch.float32 .*got torch.bfloat16"):
        cache.restore(state | {"keys": state["keys"].bfloat16()})
    with pytest.raises(ValueError, match=r"values of the state must be .* = \[2, 1, 2, 6, 2, 128\], got .*\[1, 1"):
        cache.restore(state | {"values": state["values"][:1]})
    for slots in ([0, 0], [0, 21], [0]):
        with pytest.raises(ValueError, match="slots must be different ones of 21, one a frame"):
            cache.restore(state | {"slots": slots})


def test_noise_refuses_a_state_of_another_batch():
    one, two = (PolicyNoise(NoisePolicy(), 0, batch, (2, 2), None) for batch in (1, 2))
    with pytest.raises(ValueError, match="noise must be of 2 videos, got a state of 1"):
        two.restore(one.state())


def test_what_cannot_be_saved_says_so(model):
    engine = Engine(model, size=SIZE, decoder=lambda: lambda latents: latents)
    with pytest.raises(TypeError, match=r"the decoder of a session that is saved needs state\(\) and restore\(\)"):
        engine.session(PROMPTS[0]).state()
    noise = type("Mine", (), {"initial": print, "renoise": print})()
    with pytest.raises(TypeError, match="the noise of a session .*: Mine"):
        engine.session(PROMPTS[0], noise=noise).state()
