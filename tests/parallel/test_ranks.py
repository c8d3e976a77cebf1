"""A video that ranks compute together is that of one rank, bit for bit, whatever happens to it."""

import gc
from dataclasses import replace

import pytest
import torch
from small_ranks import CONFIG, SIZE, USUAL, given, make_model, prompt_of, video
from small_window import with_small_window

from flexkern.engine import Engine
from flexkern.finite import NotFiniteError
from flexkern.model.schedule import Schedule
from flexkern.policies import PRESETS


def life(session, other):
    """A video with all that may happen to one; ``other`` goes on from its state. Returns what both made, and that."""
    made = [video(session, 2)]
    session.switch(prompt_of(2))
    made.append(video(session, 1))
    session.switch(prompt_of(3, rows=5))
    if session.preset.position.index == "slot":
        session.cut()
    made.append(video(session, 1))
    if session.preset.noise.kind == "iid":  # antiphase noise has no gaps
        session.prefill(given(3))
    state = session.state()
    other.restore(state)
    made.append(video(other, 1))
    return made, state


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"deep-forcing"}))
def test_every_preset_gives_the_bits_of_one_rank(one, many, name):
    """The state of several ranks is that of one, so that any number of them goes on from any other's."""
    preset = with_small_window(name)
    begin = lambda engine: engine.session(prompt_of(1), preset=preset, frames=60, seed=3)
    expected, state = life(begin(one), begin(one))
    got, gathered = life(begin(many), begin(many))
    assert all(map(torch.equal, got, expected))
    assert_same(gathered, state)


@pytest.mark.parametrize(
    ("options", "batch", "size"),
    [
        ({"first_chunk": 1}, 2, SIZE),
        ({}, 1, (12, 8)),  # six rows of four: rectangles two by two of four ranks
        ({}, 1, (6, 8)),  # three rows: two and four ranks side by side
        ({}, 1, (16, 2)),  # one below the other
    ],
)
def test_batches_and_sizes(one, many, options, batch, size):
    made = []
    for engine in (one, many):
        session = engine.session(prompt_of(1, batch), preset="lol", size=size, seed=1, **options)
        made.append(video(session, 2))
    assert torch.equal(*made)


def test_tokens_are_not_chosen_by_the_heads_of_several_ranks(many):
    told = "ranks must be 1 with preset 'deep-forcing', whose tokens are chosen by the queries of all heads, got [24]"
    with pytest.raises(ValueError, match=told):
        many.session(prompt_of(1), preset="deep-forcing")
    assert many.session(prompt_of(1), preset="deep-sink").step() is not None


def test_half_precision_and_the_oracle(ranks, model):
    for transformer, backend in ((make_model().to(torch.bfloat16), "sdpa"), (model, "reference")):
        made = [
            video(Engine(transformer, ranks=among, backend=backend, **USUAL).session(prompt_of(1), preset="lol"), 2)
            for among in (None, ranks)
        ]
        assert torch.equal(*made) and made[0].isfinite().all()


@pytest.mark.triton(3, 4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_kernels_cut_other_tiles_of_fewer_heads(ranks):
    """So that sums of the backend triton differ in their last bits; here in its interpreter."""
    options = {"schedule": Schedule(steps=(1000,)), "size": (4, 4), "backend": "triton"}
    model = make_model(replace(CONFIG, num_layers=1))
    made = [
        video(Engine(model, ranks=among, **options).session(prompt_of(1), preset="lol"), 1) for among in (None, ranks)
    ]
    assert (made[0] - made[1]).abs().max() < 1e-5 < made[0].abs().max()


def test_videos_go_side_by_side_and_their_pages_go_with_them(one, many, ranks):
    expected = [one.session(prompt_of(seed), seed=seed, preset="longlive") for seed in (1, 2)]
    sessions = [many.session(prompt_of(seed), seed=seed, preset="longlive") for seed in (1, 2)]
    for _ in range(2):
        for session, alone in zip(sessions, expected, strict=True):
            assert torch.equal(session.step().latents, alone.step().latents)
    del session, sessions[0]
    gc.collect()
    assert len(ranks._forgotten) == 1
    sessions[0].step()
    assert not ranks._forgotten


def test_latents_that_are_not_finite_end_a_video_and_no_rank(ranks):
    model = make_model()
    model.blocks[1].ffn[2].bias[3] = float("inf")
    engine = Engine(model, ranks=ranks, **USUAL)
    with pytest.raises(NotFiniteError, match=r"the latents of chunk 0 are not finite .* blocks\.1\.ffn\.2 "):
        engine.session(prompt_of(1)).step()
    video(Engine(make_model(), ranks=ranks, **USUAL).session(prompt_of(1)), 1)


def test_a_state_of_another_form_is_refused_before_anything_travels(many):
    session = many.session(prompt_of(1), preset="longlive")
    session.step()
    state = session.state()
    state["window.cache.keys"] = state["window.cache.keys"][..., :2, :]
    with pytest.raises(ValueError, match=r"keys of the state must be torch.float32 \[L, B, R, S, H, D\]"):
        session.restore(state)
    assert session.step().index == 1


def test_one_engine_at_a_time(model, ranks):
    session = Engine(model, ranks=ranks, **USUAL).session(prompt_of(1))
    other = make_model()
    engine = Engine(other, ranks=ranks, **USUAL)
    with pytest.raises(ValueError, match="model of an engine that was made later: this session is over"):
        session.step()
    video(engine.session(prompt_of(1)), 1)


def test_what_cannot_be_shared_is_refused(model, ranks):
    class Other:
        config, dtype, device = model.config, model.dtype, model.device

    with pytest.raises(NotImplementedError, match="only flexkern's own transformer is shared by ranks, got Other"):
        Engine(Other(), ranks=ranks, **USUAL)
    engine = Engine(model, ranks=ranks, **USUAL)
    with pytest.raises(ValueError, match="ranks must share 4 heads and the 1x1 tokens of a frame evenly: .* one of 1,"):
        engine.session(prompt_of(1), size=(2, 2))
    assert engine.recorder is None and "have not been captured" in engine.session(prompt_of(1)).passes.why_not
