"""Passes that are replayed as graphs give the bits of those that are launched, whatever happens between them."""

import logging
import math
from dataclasses import replace

import pytest
import recorder
import torch
from both_loops import SIZE, prompt_of
from recorder import StandIn
from small_window import with_small_window

from flexkern import capture
from flexkern.engine import Engine
from flexkern.finite import NotFiniteError
from flexkern.graphs import MOST, Passes, find_recorder, why_eager
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan
from flexkern.policies import PRESETS, get_preset

SCHEDULE = Schedule(steps=(1000, 500))


@pytest.fixture
def start(model):
    """Begins a session whose passes a recorder captures, or none."""

    def begin(stand_in=None, *, other=None, prompt=1, **options):
        engine = Engine(other or model, schedule=SCHEDULE, size=SIZE)
        engine.backend, engine.recorder = recorder, (lambda: stand_in) if stand_in else None
        options.setdefault("preset", get_preset("self-forcing", {"retention.window": 6}))
        return engine.session(prompt_of(prompt), **options)

    return begin


def video(session, chunks):
    return torch.cat([session.step().latents for _ in range(chunks)], dim=1)


def live(session, other):
    """A video with all that may happen to one; ``other`` goes on from its state."""
    made = [video(session, 4)]  # the window grows, and is full
    session.switch(prompt_of(2))
    made.append(video(session, 2))
    session.switch(prompt_of(3)[:, :20])  # another number of rows
    if session.preset.position.index == "slot":
        session.cut()
    made.append(video(session, 3))
    if session.preset.noise.kind == "iid":  # antiphase noise has no gaps
        session.prefill(torch.randn(1, 3, 16, *SIZE, generator=torch.Generator().manual_seed(5)))
    session.switch(prompt_of(1))
    made.append(video(session, 1))
    other.step()
    other.restore(session.state())
    made += [video(other, 2), session.cache.keys[:, :, session.cache.slots].flatten()]
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_the_same_bits(start, name):
    preset = with_small_window(name)
    stand_ins = StandIn(), StandIn()
    expected = live(start(preset=preset), start(preset=preset))
    session = start(stand_ins[0], preset=preset)
    got = live(session, start(stand_ins[1], preset=preset))
    assert all(map(torch.equal, got, expected))
    if name == "deep-forcing":
        assert stand_ins[0].replays == 0 and session.passes.why_not.startswith("tokens are chosen in some passes")
    else:
        assert stand_ins[0].replays >= 9 and session.passes.why_not is None


def test_the_window_grows_launched_and_goes_on_replayed(start):
    stand_in = StandIn()
    session = start(stand_in)
    counts = []
    for _ in range(5):
        session.step()
        counts.append((session.passes.count, stand_in.replays))
    assert counts == [(0, 0), (0, 0), (2, 3), (2, 6), (2, 9)]  # a denoising and a clean graph, three passes a chunk
    assert session.passes.bytes > 1000 and repr(session.passes) == f"Passes(2 graphs, {session.passes.bytes} bytes)"


def test_a_prompt_of_the_same_shape_needs_no_new_graph(start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 3)
    session.switch(prompt_of(2))
    video(session, 1)
    assert len(stand_in.graphs) == 2 and stand_in.replays == 6
    session.switch(prompt_of(2)[:, :9])
    video(session, 2)
    assert len(stand_in.graphs) == 4 == session.passes.count


def test_a_recache_is_replayed(start):
    preset, stand_in = get_preset("longlive", {"retention.window": 6}), StandIn()
    videos = []
    for session in (start(preset=preset), start(stand_in, preset=preset)):
        video(session, 3)
        for seed in (2, 3, 4):
            session.switch(prompt_of(seed))
        videos.append(video(session, 2))
    assert torch.equal(*videos)
    recaches = [graph for graph in stand_in.graphs if graph.out is None]
    assert len(recaches) == 2 and stand_in.replays == 3 + 2 + 6  # of the clean pass and of three frames more


def test_graphs_are_few(start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 2)
    for rows in range(4, 10):
        session.switch(prompt_of(2)[:, :rows])
        video(session, 2)
    assert len(stand_in.graphs) == 12 and session.passes.count == MOST
    session.switch(prompt_of(2))
    assert len(session.passes._texts) == MOST // 2 + 1  # prompts that no graph reads are gone


@pytest.mark.parametrize("prediction", ["flow", "x0"])
def test_what_a_session_gives_no_replay_overwrites(model, start, prediction):
    other = CausalWan(replace(model.config, prediction=prediction))
    other.load_state_dict(model.state_dict())
    session = start(StandIn(), other=other.eval().requires_grad_(False))
    video(session, 2)
    chunk = session.step()
    kept = chunk.latents.clone()
    video(session, 2)
    assert torch.equal(chunk.latents, kept) and kept.isfinite().all() and not chunk.latents.is_inference()


def test_what_a_pass_gives_no_replay_overwrites(start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 3)
    memory, z = session.window.memory, torch.randn(1, 3, 16, *SIZE)
    first = session._predict(z, 1000.0, memory)
    kept = first.clone()
    session._predict(-z, 500.0, memory)
    assert stand_in.replays == 5 and torch.equal(first, kept)


def test_a_prompt_that_somebody_put_there_is_followed(start):
    stand_in, made = StandIn(), []
    for recorder_of in (None, stand_in):
        session = start(recorder_of)
        video(session, 3)
        session.text = session.engine.encode(prompt_of(4))
        made.append(video(session, 2))
    assert torch.equal(*made) and stand_in.replays == 3


def test_a_batch_and_a_first_chunk_of_one_frame(start):
    options = dict(first_chunk=1, prompt=1)
    assert torch.equal(video(start(StandIn(), **options), 5), video(start(**options), 5))


def test_a_model_with_hooks_is_launched(model, start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 3)
    calls = []
    hook = model.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
    session.step()
    hook.remove()
    assert len(calls) == 2 and stand_in.replays == 3  # the clean pass ends before it
    session.step()
    assert stand_in.replays == 6


def test_what_is_not_finite_is_found_in_a_replayed_chunk(model, start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 3)
    session.cache.values[1][:, session.cache.slots] = math.inf  # of frames that are seen, by layer 1 alone
    with pytest.raises(NotFiniteError, match=r"began before blocks.1.self_attn.o in denoising step 1 of 2"):
        session.step()
    assert stand_in.replays == 6


def test_a_capture_that_fails_leaves_the_session_as_it_would_be(start, caplog):
    capture.tell.cache_clear()
    session = start(StandIn(fails=RuntimeError("operation not permitted\nwhen stream is capturing")))
    with caplog.at_level(logging.INFO, logger="flexkern"):
        assert torch.equal(video(session, 5), video(start(), 5))
    assert session.passes.count == 0 and session.passes.why_not.startswith("a capture failed with RuntimeError: op")
    assert [r.getMessage() for r in caplog.records if "graphs" in r.getMessage()] == [
        "passes are not replayed as CUDA graphs: a capture failed with RuntimeError: operation not permitted when "
        "stream is capturing"
    ]
    assert repr(session.passes).startswith("Passes(eager: a capture failed")


def test_while_somebody_else_captures_nothing_is_replayed(start):
    stand_in = StandIn()
    session = start(stand_in)
    video(session, 3)
    stand_in.busy = "a capture is under way"
    session.step()
    assert stand_in.replays == 3


def test_moved_weights_are_followed(model, start):
    other = CausalWan(model.config)
    other.load_state_dict(model.state_dict())
    other.requires_grad_(False)
    made = []
    for stand_in in (None, StandIn()):
        session = start(stand_in, other=other)
        video(session, 3)
        changed = {name: value + 1 for name, value in model.state_dict().items() if name.endswith("ffn.2.bias")}
        other.load_state_dict(other.state_dict() | changed, assign=True)  # new memory
        made.append(video(session, 3))
        other.load_state_dict(model.state_dict())
    assert torch.equal(*made)
    assert len(stand_in.graphs) == 4 and session.passes.count == 2


def test_a_prompt_keeps_its_address_and_what_layers_share(model):
    passes = Passes(model, StandIn)
    shared = torch.ones(3)
    first = passes.hold([(torch.zeros(2), shared), (torch.ones(2), shared, None)])
    assert first[0][1] is first[1][1] and first[1][2] is None and first[0][1] is not shared
    double = shared * 2
    again = passes.hold([(torch.full((2,), 5.0), double), (torch.ones(2), double, None)])
    assert again is first and first[0][0].tolist() == [5, 5] and first[1][1].tolist() == [2, 2, 2]
    assert passes.hold([(torch.zeros(2), shared), (torch.ones(2), shared.clone(), None)]) is not first


def test_why_passes_are_launched(model):
    assert why_eager(model, "triton") == "device 'cpu' is not a CUDA GPU"
    assert Engine(model).recorder is None
    on_gpu = type("CausalWan", (), {"device": torch.device("cuda")})()
    assert why_eager(on_gpu, "triton") == "CausalWan is not flexkern's own transformer"
    assert find_recorder(on_gpu, "triton") is None
    with pytest.raises(ValueError, match="graphs must be True or False, got 'off'"):
        Engine(model, graphs="off")
