"""What a tired person does to an engine and its sessions: each is done right, or refused in one short sentence."""

import copy
import pickle

import numpy
import pytest
import torch
from both_loops import SIZE, prompt_of

from flexkern.engine import Engine
from flexkern.noise import ResearchNoise
from flexkern.policies import PRESETS, get_preset


@pytest.mark.parametrize("preset", ["flex", "self-forcing", get_preset("pi", {"noise.kind": "pyoco_progressive"})])
def test_frames_may_be_given_in_the_middle_of_a_video(engine, preset):
    """Noise that is drawn in order goes on after them, and is that of a video which begins there."""
    session, begun = (engine.session(prompt_of(1), preset=preset, seed=4) for _ in range(2))
    given = torch.randn(1, 6, 16, *SIZE)
    made = session.step().latents
    session.prefill(given[:, 3:])
    begun.prefill(torch.cat((made, given[:, 3:]), dim=1))
    for _ in range(2):
        chunk, expected = session.step(), begun.step()
        assert chunk.frames == expected.frames
        torch.testing.assert_close(chunk.latents, expected.latents)


def test_what_is_given_is_no_longer_than_the_video(engine):
    session = engine.session(prompt_of(1), frames=6)
    session.step()
    with pytest.raises(ValueError, match="was to have 6 frames: 3 are there, and 6 are given"):
        session.prefill(torch.randn(1, 6, 16, *SIZE))
    session.prefill(torch.randn(1, 3, 16, *SIZE))
    assert list(session) == []


def test_an_engine_is_made_last(model):
    """Its backend is chosen for the model's device and dtype: moved to a GPU later, it would stay a CPU's."""
    moved = copy.deepcopy(model)
    engine = Engine(moved, size=SIZE)
    moved.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match="must stay torch.float32 on cpu, got torch.bfloat16 on cpu: make the engine la"
    ):
        engine.session(prompt_of(1))
    assert Engine(moved, size=SIZE).session(prompt_of(1)).step().latents.isfinite().all()
    moved.to("meta", torch.float32)
    with pytest.raises(ValueError, match="got torch.float32 on meta: make the engine last"):
        engine.session(prompt_of(1))


def test_a_file_is_no_state(engine):
    for wrong in (None, "state.safetensors"):
        with pytest.raises(TypeError, match=r"a state is a mapping, as state\(\) returns it, got "):
            engine.session(prompt_of(1)).restore(wrong)


def test_the_last_chunk_is_whole(engine):
    assert [chunk.frames for chunk in engine.session(prompt_of(1), frames=4)] == [(0, 1, 2), (3, 4, 5)]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_neither_engine_nor_session_is_copied(engine, copied):
    with pytest.raises(TypeError, match="an Engine is not copied: its sessions share it"):
        copied(engine)
    with pytest.raises(TypeError, match=r"a Session is not copied: begin another, and let it restore\(\)"):
        copied(engine.session(prompt_of(1)))
    for preset in PRESETS.values():
        assert pickle.loads(pickle.dumps(preset)) == preset == copy.deepcopy(preset)


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (720, 1280)])
def test_the_size_of_a_picture_is_not_that_of_a_latent_frame(model, engine, size):
    message = r"size must be that of a latent frame, an eighth of the picture's .* for 480x832; got \(\d+, \d+\)"
    with pytest.raises(ValueError, match=message):
        Engine(model, size=size)
    with pytest.raises(ValueError, match=message):
        engine.session(prompt_of(1), size=size)
    assert Engine(model, size=(270, 480)).size == (270, 480)  # 4K


@pytest.mark.parametrize("name", ["prompt", "noise", "seed", "frames", "size"])
@pytest.mark.parametrize("value", [numpy.zeros((2, 3, 4)), [torch.zeros(30, 30)] * 2], ids=["array", "list of tensors"])
def test_messages_show_no_whole_arrays(engine, name, value):
    options = {"prompt": prompt_of(1)} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must .*got ") as raised:
        engine.session(**options)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 300
    assert not isinstance(value, numpy.ndarray) or "got ndarray [2, 3, 4]" in message


def test_a_chunk_says_what_it_is(engine):
    shown = repr(engine.session(prompt_of(1)).step())
    assert shown == f"Chunk(0, frames (0, 1, 2), latents {[1, 3, 16, *SIZE]}, pixels None)"


def test_the_noise_of_research_code_is_a_video_of_a_generator():
    for shape, generator in (((6, 4, 6, 8), torch.Generator()), ((1, 6, 4, 6, 8), 0)):
        with pytest.raises(TypeError, match=r"expected a shape \[B, F, C, h, w\] and a torch.Generator, got \("):
            ResearchNoise(shape, generator)
