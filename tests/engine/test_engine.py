"""The loop against the published cache semantics (support/upstream.py), and what a session promises beyond them."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
import upstream
from both_loops import SIZE, Recorded, assert_equal_to, both, drive, prompt_of

from flexkern.engine import Engine, frames_for
from flexkern.model.schedule import SCHEDULES, Schedule
from flexkern.noise import ResearchNoise
from flexkern.policies import ChosenTokens, Kept, get_preset

DATA = Path(__file__).parent.parent / "data"


WINDOWS = {
    "fifo": ("self-forcing", {"retention.window": 9}, dict(window=9)),
    "sink": ("self-forcing", {"retention.window": 9, "retention.sink": 3}, dict(window=9, sink=3)),
    "odd sink": ("self-forcing", {"retention.window": 8, "retention.sink": 2}, dict(window=8, sink=2)),
    "longlive": ("longlive", {}, dict(window=12, sink=3)),
    "longlive-infinite": ("longlive-infinite", {}, dict(window=12, sink=3, slot=True)),
    "infinity-rope": ("infinity-rope", {}, dict(window=6, sink=1, slot=True)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_sinks(model, name):
    assert_equal_to(both(model, *WINDOWS[name]))


@pytest.mark.parametrize("at", [2, 6], ids=["before the window is full", "after"])
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("name", ["longlive", "longlive-infinite"])
def test_recache_at_a_prompt_switch(model, name, keep_sink, at):
    preset_name, overrides, options = WINDOWS[name]
    switches = {at: (prompt_of(2), partial(upstream.recache, keep_sink=keep_sink))}
    overrides = {**overrides, "switch.keep_sink": keep_sink}
    assert_equal_to(both(model, preset_name, overrides, options, chunks=8, switches=switches))


@pytest.mark.parametrize("at", [1, 4])
def test_flush_at_a_prompt_switch(model, at):
    switches = {at: (prompt_of(2), upstream.flush)}
    assert_equal_to(both(model, *WINDOWS["infinity-rope"], switches=switches))


def test_scene_cut(model):
    ours, theirs = both(model, *WINDOWS["infinity-rope"], cuts=(4,))
    assert_equal_to((ours, theirs))
    uncut, _ = both(model, *WINDOWS["infinity-rope"], chunks=5)
    assert (ours[:, 12:15] - uncut[:, 12:15]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["causvid", "rolling-forcing"])
def test_other_schedules(model, family):
    assert_equal_to(both(model, *WINDOWS["fifo"], chunks=4, schedule=SCHEDULES[family]))


def test_prefill_continues_given_frames(model):
    assert_equal_to(both(model, *WINDOWS["sink"], chunks=4, prefill=torch.randn(1, 6, 16, *SIZE)))


def test_the_decoder_sees_what_a_video_begins_with(model):
    """A decoder that looks back must not take the first generated frame for the first of the video."""
    seen = []
    engine = Engine(model, size=SIZE, decoder=lambda: lambda latents: seen.append(latents) or latents)
    session = engine.session(prompt_of(1))
    given = torch.randn(1, 6, 16, *SIZE)
    start = session.prefill(given)
    assert (start.index, start.frames) == (-1, (0, 1, 2, 3, 4, 5)) and torch.equal(start.pixels, given)
    chunk = session.step()
    assert (chunk.index, chunk.frames) == (0, (6, 7, 8)) and torch.equal(torch.cat(seen[1:]), chunk.latents)
    assert torch.equal(seen[0], given)


def test_prefill_takes_pictures_through_the_encoder(model):
    pictures = torch.randint(0, 256, (1, 3, 8, 8, 3), dtype=torch.uint8)
    latents = torch.randn(1, 3, 16, *SIZE)
    engine = Engine(model, size=SIZE, encoder=lambda pixels: latents if pixels is pictures else None)
    shown, given = engine.session(prompt_of(1)), engine.session(prompt_of(1))
    shown.prefill(pictures)
    given.prefill(latents)
    assert torch.equal(shown.step().latents, given.step().latents)
    with pytest.raises(ValueError, match="no encoder for pictures"):
        Engine(model, size=SIZE).session(prompt_of(1)).prefill(pictures)


def test_without_fresh_noise_the_steps_follow_the_flow(model):
    """Euler steps of dx / dsigma = flow, written out; no noise is drawn after the first."""
    schedule = Schedule(steps=(1000, 750, 500, 250), fresh=False)
    noise = Recorded(1, 1)
    session = Engine(model, schedule=schedule, size=SIZE).session(prompt_of(1), preset="self-forcing", noise=noise)
    memory = session._prepare([0, 1, 2])
    x, timesteps = noise.video.double(), schedule.timesteps()
    for timestep, following in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
        flow = session._predict(x.float(), timestep, memory).double()
        x = x + ((schedule.sigma(following) if following else 0.0) - schedule.sigma(timestep)) * flow
    made = Engine(model, schedule=schedule, size=SIZE).session(prompt_of(1), preset="self-forcing", noise=noise).step()
    assert (made.latents - x).abs().max() < 1e-4


def test_schedules_have_the_published_timesteps():
    close = partial(pytest.approx, abs=1e-3)
    assert SCHEDULES["self-forcing"].timesteps() == close([1000, 937.5, 833.3333, 625])
    assert SCHEDULES["rolling-forcing"].timesteps() == close([1000, 952.381, 882.353, 769.231, 555.556])
    assert Schedule(steps=(1000, 750, 500, 250), shift=8.0).timesteps() == close([1000, 960, 888.889, 727.273])
    causvid = SCHEDULES["causvid"]
    assert causvid.timesteps() == [1000, 757, 522]
    assert [causvid.sigma(t) for t in causvid.timesteps()] == pytest.approx([1, 0.75676, 0.52174], abs=1e-5)
    assert Schedule(steps=(1000, 757, 522, 0), shift=8.0, warp=False) == causvid


def test_scale_one_is_the_base_preset_bit_for_bit(engine):
    base = {"retention.window": 9, "retention.sink": 3}
    make = lambda name, more: drive(engine.session(prompt_of(1), preset=get_preset(name, {**base, **more})), 5)
    expected = make("self-forcing", {})
    for mode in ("by_parts", "pi", "ntk", "yarn", "hard", "riflex"):
        assert torch.equal(make("flex", {"noise.kind": "iid", "position.mode": mode, "position.scale": 1}), expected)
    slowed = {"noise.kind": "iid", "position.scale": 2, "position.reach": "all"}
    assert not torch.equal(make("flex", slowed), expected)


def test_the_horizon_of_the_model_is_that_of_its_videos(model):
    """Where the preset does not say one itself, in positions and in noise alike."""
    make = lambda horizon, **more: drive(
        Engine(model, size=SIZE, horizon=horizon).session(
            prompt_of(1), preset=get_preset("flex", {"noise.kind": "freenoise", **more})
        ),
        4,
    )
    follows, says = make(5), make(21, **{"position.train_len": 5})
    assert torch.equal(follows, says) and not torch.equal(follows, make(21))
    assert torch.equal(make(240, **{"position.train_len": 5}), says)
    with pytest.raises(ValueError, match="horizon must be a whole number >= 1, got 0"):
        Engine(model, horizon=0)


def test_absolute_and_slot_positions_agree_until_the_window_fills(engine):
    absolute, slot = (drive(engine.session(prompt_of(1), preset=name), 6) for name in ("longlive", "longlive-infinite"))
    assert torch.equal(absolute[:, :12], slot[:, :12])
    assert (absolute[:, 15:] - slot[:, 15:]).abs().max() > 1e-3


def test_backends_agree_on_every_preset_and_schedule_of_scale(model):
    for overrides in (
        {},
        {"position.scale_schedule": "dynamic"},
        {"position.mode": "jitter"},
        {"position.logit_temp": 0.3},
    ):
        chosen = get_preset("flex", {"retention.window": 6, "position.train_len": 4, **overrides})
        results = [
            drive(Engine(model, size=SIZE, backend=backend).session(prompt_of(1), preset=chosen), 3)
            for backend in ("sdpa", "reference")
        ]
        assert (results[0] - results[1]).abs().max() < 1e-4


def test_a_batch_is_its_videos_one_by_one(engine):
    together = drive(engine.session(prompt_of(1, batch=2), seed=5), 3)
    alone = [drive(engine.session(prompt_of(1, batch=2)[b, None], seed=5 + b), 3) for b in range(2)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4


def test_same_seed_same_video_and_another_seed_another(engine):
    first, again, other = (drive(engine.session(prompt_of(1), seed=seed), 2) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clean_pass_of_keys_only_writes_the_same_pages(model):
    """Skipping what the last layer does after its keys changes nothing that is kept."""
    session = Engine(model, size=SIZE).session(prompt_of(1))
    latents = session.step().latents
    written = session.cache.keys.clone(), session.cache.values.clone()
    memory = session._prepare([3, 4, 5])
    session._predict(latents, 0.0, memory)
    old, new = session.cache.slots[:3], session.cache.slots[3:]
    assert torch.equal(session.cache.values[:, :, new], written[1][:, :, old]) is False  # they now see a past
    assert torch.equal(session.cache.keys[0][:, new], written[0][0][:, old])  # layer 0 sees none


def test_research_noise_draws_the_video_at_once_then_step_by_step():
    shape = (1, 6, 16, *SIZE)
    noise = ResearchNoise(shape, torch.Generator().manual_seed(1), torch.float32)
    expected = torch.Generator().manual_seed(1)
    video = torch.randn(shape, generator=expected)
    assert torch.equal(noise.initial([3, 4, 5]), video[:, 3:6])
    assert torch.equal(noise.renoise([0, 1, 2], 0)[0], torch.randn(3, 16, *SIZE, generator=expected))
    with pytest.raises(ValueError, match="drawn for 6 frames, got frame 8"):
        noise.initial([6, 7, 8])


def test_iteration_ends_at_the_target_and_not_without_one(engine):
    assert sum(len(chunk.frames) for chunk in engine.session(prompt_of(1), frames=7)) == 9
    endless = iter(engine.session(prompt_of(1), preset="self-forcing"))
    assert [next(endless).frames[0] for _ in range(3)] == [0, 3, 6]


@dataclass(frozen=True, kw_only=True)
class EveryOther:
    """A retention policy of one's own: it looks at the frames, not at how many there are."""

    capacity: int = 7
    pages: int = 7
    pinned: int = 0

    def keep(self, frames, incoming):
        return Kept(pages=tuple(i for i, f in enumerate(frames) if f % 2 == 0)[-4:])


def test_a_retention_policy_of_ones_own(engine):
    session = engine.session(prompt_of(1), preset=replace(get_preset("self-forcing"), retention=EveryOther()))
    drive(session, 4)
    assert session.cache.frames == [2, 4, 6, 8, 9, 10, 11]
    assert session.cache.keys.shape[2] == 7


def test_only_the_windows_of_this_package_have_tokens_chosen(engine):
    @dataclass(frozen=True, kw_only=True)
    class Chooses(EveryOther):
        def keep(self, frames, incoming):
            return Kept(pages=(ChosenTokens(frame=0, indices=(0,)),) if len(frames) else ())

    session = engine.session(prompt_of(1), preset=replace(get_preset("self-forcing"), retention=Chooses()))
    session.step()
    with pytest.raises(NotImplementedError, match="only a SinkWindow has tokens chosen"):
        session.step()


def test_a_window_has_no_memory_before_its_first_chunk(engine):
    with pytest.raises(RuntimeError, match="call prepare first"):
        engine.session(prompt_of(1)).window.memory  # noqa: B018


def test_engine_session_and_window_say_what_they_are(engine):
    session = engine.session(prompt_of(1, batch=2), frames=9)
    session.step()
    sizes = "2 layers, 2 heads of 128, float32 on cpu"
    assert repr(engine) == f"Engine(CausalWan of {sizes}; backend 'sdpa', chunks of 3, latents of 4x6)"
    assert repr(session) == "Session(preset 'flex', 3 of 9 frames in 1 chunks, 2 videos of 4x6 latents)"
    assert repr(session.window) == "CacheWindow(preset 'flex', 3 of 21 pages in use, 2 x 2x3 tokens a frame)"
    assert "of any number of frames" in repr(engine.session(prompt_of(1)))


def test_positions_have_no_end(engine):
    """The research code's table ends at 1024 latent frames."""
    session = engine.session(prompt_of(1), preset=get_preset("flex", {"retention.window": 6}))
    session.step()
    session.next_frame, session.window.frames = 14_400, range(14_397, 14_400)
    session.noise.sources = [replace(session.preset.noise, kind="iid").source(0, shape=(16, *SIZE))]
    assert session.step().latents.isfinite().all()


def test_plans_of_one_shape_share_their_buffers(engine):
    """A captured CUDA graph reads addresses: once the window is full they must not move, whatever stands there."""
    session = engine.session(prompt_of(1), preset=get_preset("flex", {"retention.window": 9}), seed=0)
    plans = []
    prepared = session._prepare
    session._prepare = lambda *args, **kwargs: plans.append(memory := prepared(*args, **kwargs)) or memory
    seen = []
    for _ in range(5):
        session.step()
        seen.append(plans[-1].plan.turn.clone())
    addresses = [[t.data_ptr() for t in (m.plan.turn, m.plan.read_slots, m.plan.write_slots)] for m in plans]
    assert addresses[2] == addresses[3] == addresses[4] and addresses[0] != addresses[2]
    assert not torch.equal(seen[3], seen[4])


def test_first_chunk_of_one_frame(engine):
    session = engine.session(prompt_of(1), preset="self-forcing", first_chunk=1)
    session.prefill(torch.randn(1, 1, 16, *SIZE))
    assert session.step().frames == (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="flux"), "no preset 'flux'.*did you mean"),
        (dict(size=(5, 6)), "multiple of 2x2, got 5x6"),
        (dict(frames=0), "frames must be a whole number >= 1, got 0"),
        (dict(frames=2.5), "frames must be a whole number >= 1, got 2.5"),
        (dict(seed=True), "seed must be a whole number >= 0, got True"),
        (dict(seed=1.0), "seed must be a whole number >= 0, got 1.0"),
        *((dict(first_chunk=n), f"first_chunk must be a whole number >= 1, got {n}") for n in (-1, 0, 2.5, True)),
        *((dict(size=s), r"size must be \(height, width\), two") for s in ((36.0, 36), 36, "36x36", (36,), (0, 36), 0)),
        (dict(noise="iid"), r"noise must have initial\(\) and renoise\(\), got 'iid'"),
        (dict(seed=-1), "seed must be a whole number >= 0, got -1"),
        (dict(preset=get_preset("flex", {"retention.sink": 6, "retention.window": 8})), "window must hold the sink"),
        (dict(preset=get_preset("flex", {"position.scale_schedule": "static"})), "needs the length of the video"),
        (dict(preset=get_preset("flex", {"position.table": (1.0,) * 12})), "table must hold 22 multipliers, got 12"),
    ],
)
def test_refuses_before_any_work(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.session(prompt_of(1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((dict(chunk=n), f"chunk must be a whole number >= 1, got {n}") for n in (0, 2.5, True)),
        *((dict(first_chunk=n), f"first_chunk must be a whole number >= 1, got {n}") for n in (0, -2, 1.5)),
        (dict(horizon=1.5), "horizon must be a whole number >= 1, got 1.5"),
        *((dict(size=s), r"size must be \(height, width\), two whole") for s in ("36x36", (36,), (36.0, 36), 36, None)),
        (dict(schedule="causvid"), "schedule must be a Schedule, got 'causvid'"),
        (dict(decoder=3), "decoder must be callable, got 3"),
    ],
)
def test_an_engine_refuses_what_its_sessions_could_not_use(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **options)


@pytest.mark.parametrize("prompt", [None, 3, ["a", None], numpy.zeros((1, 4, 48)), torch.zeros(1, 4, 48).long()])
def test_what_is_no_prompt_is_refused(engine, prompt):
    with pytest.raises(ValueError, match="prompt must be a text, several, or an embedding|must be floating point, got"):
        engine.session(prompt)


def test_what_is_given_to_begin_with_is_latents_or_pictures(engine):
    session = engine.session(prompt_of(1))
    for given in (torch.zeros(1, 3, 16, *SIZE).long(), numpy.zeros((1, 3, 16, *SIZE)), None):
        with pytest.raises(ValueError, match="latents must be a floating-point tensor, pictures one of uint8, got"):
            session.prefill(given)


def test_whole_numbers_of_numpy_are_whole_numbers(model):
    three, one = numpy.int64(3), numpy.int32(1)
    engine = Engine(model, size=tuple(map(numpy.int64, SIZE)), chunk=three, first_chunk=one, horizon=numpy.int16(21))
    options = dict(preset=get_preset("flex", {"retention.sink": three}), seed=three, frames=numpy.int64(4))
    session, plain = engine.session(prompt_of(1), **options), Engine(model, size=SIZE, first_chunk=1)
    same = plain.session(prompt_of(1), preset=get_preset("flex", {"retention.sink": 3}), seed=3, frames=4)
    for made, expected in zip(session, same, strict=True):
        assert torch.equal(made.latents, expected.latents)
    json.dumps(session.preset.describe())
    assert {type(value) for value in (session.target, session.first_chunk, *session.size, engine.chunk)} == {int}


def test_the_length_of_no_time_is_refused():
    for seconds, fps in ((math.inf, 16), (math.nan, 16), (1, 0), (1, math.inf)):
        with pytest.raises(ValueError, match="must be a finite number"):
            frames_for(seconds, fps)


def test_errors_name_what_was_expected(model, engine):
    with pytest.raises(ValueError, match="no text encoder"):
        engine.session("a red disc")
    with pytest.raises(ValueError, match=r"text must be \[B, L, 48\]"):
        engine.session(torch.zeros(1, 32, 47))
    with pytest.raises(ValueError, match="flash-attn.*There is .*sdpa"):
        Engine(model, backend="flash-attn")
    session = engine.session(prompt_of(1))
    with pytest.raises(ValueError, match="whole chunks of 3 frames.*got 4 frames"):
        session.prefill(torch.zeros(1, 4, 16, *SIZE))
    with pytest.raises(ValueError, match=r"latents must be \[B, n, C, h, w\]"):
        session.prefill(torch.zeros(1, 3, 16, 8, 8))
    with pytest.raises(ValueError, match="a cut needs position.index 'slot'"):
        session.cut()
    with pytest.raises(ValueError, match="for 1 videos, got 2"):
        session.switch(prompt_of(1, batch=2))
    with pytest.raises(ValueError, match="steps must fall"):
        Schedule(steps=(500, 750))
