"""Figures worked out by hand: single pictures, curves, and the sink's prediction."""

import math

import numpy as np
import pytest

for package in ("av", "cv2", "matplotlib"):
    pytest.importorskip(package, reason='needs pip install "flexkern[metrics]"')

import cv2
from footage import blobs

from flexkern.metrics import CURVES, LEARNED, WHOLE, curves, latent_frames, measure, per_picture, sink_alignment, vision
from flexkern.policies import PRESETS, PositionPolicy

PLAIN = PRESETS["longlive"].position


def texture(height=160, width=240, size=2.0, seed=0):
    return np.rint(np.clip(128 + 40 * blobs(seed, height, width, size), 0, 255)).astype(np.uint8)


def grey(level, height=64, width=96):
    return np.full((height, width, 3), level, np.uint8)


def test_a_video_that_stands_still():
    report = measure(np.repeat(texture(48, 64)[None], 60, axis=0), fps=10)
    assert report.summary["flicker"] == 1 and report.summary["motion"] == 0
    assert report.summary["structure"] == pytest.approx(1) and report.summary["palette"] == pytest.approx(0, abs=1e-5)
    quiet = [name for name in report.summary if name.endswith(("_drift", "_change"))]
    assert len(quiet) == 2 * len(CURVES) and max(abs(report.summary[name]) for name in quiet) < 1e-5
    assert report.summary["loop"] == 0 and report.summary["sink_collapse"] == 0
    assert math.isnan(report.summary["chunk_discontinuity"])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_known_shift_is_a_known_motion(step):
    picture = texture(240, 340)
    before, after = picture[20:180, 20:260], picture[20 - step : 180 - step, 20:260]
    found = vision.motion(vision.settle(before), vision.settle(after))
    assert found == pytest.approx(100 * step / math.hypot(160, 240), rel=0.05)


def test_motion_does_not_depend_on_the_size_of_the_picture():
    before, after = texture(240, 340)[20:180, 20:260], texture(240, 340)[17:177, 18:258]
    larger = [cv2.resize(picture, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for picture in (before, after)]
    small, large = (vision.motion(*map(vision.settle, pair)) for pair in ((before, after), larger))
    assert large == pytest.approx(small, rel=0.05)


def test_flicker_is_that_of_vbench():
    assert vision.flicker(grey(0), grey(255)) == 0 and vision.flicker(grey(7), grey(7)) == 1
    assert vision.flicker(grey(100), grey(110)) == pytest.approx((255 - 10) / 255)
    half = grey(100)
    half[:32] = 140
    assert vision.flicker(grey(100), half) == pytest.approx((255 - 20) / 255)


def test_exposure_is_mean_luma():
    assert vision.exposure(grey(51)) == pytest.approx(0.2)
    assert vision.exposure(np.full((8, 8, 3), (0, 255, 0), np.uint8)) == pytest.approx(0.587, abs=0.002)


def test_sharpness_falls_with_blur_and_not_with_light():
    picture = texture(size=1)
    blurred = cv2.GaussianBlur(picture, (0, 0), 2)
    assert vision.sharpness(grey(90)) == pytest.approx(-30)
    assert vision.sharpness(blurred) < vision.sharpness(picture) - 10
    assert vision.sharpness((picture * 0.6).astype(np.uint8)) == pytest.approx(vision.sharpness(picture), abs=0.1)
    stripes = grey(100)
    stripes[:, ::2] = 120  # Laplacian +-40, luma +-10
    assert vision.sharpness(stripes) == pytest.approx(10 * math.log10(1600.001 / 101), abs=0.05)


def test_a_palette_moves_by_the_distance_between_colours():
    one, other = (np.full((64, 64, 3), colour, np.uint8) for colour in ((150, 100, 100), (100, 150, 100)))
    lab = [cv2.cvtColor(x[:1, :1].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0] for x in (one, other)]
    chroma = [x[1:] * 66 / (x[0] + 16) for x in lab]
    found = vision.palette_distance(vision.palette(one), vision.palette(other))
    assert found == pytest.approx(math.dist(*chroma), rel=1e-3) and found > 30


def test_a_palette_keeps_with_light_and_place():
    picture = np.clip(texture(size=8).astype(int) + [40, 0, -40], 0, 255).astype(np.uint8)
    linear = ((picture / 255) ** 2.2 * 0.5) ** (1 / 2.2) * 255
    home = vision.palette(picture)
    assert vision.palette_distance(home, vision.palette(picture[::-1, ::-1])) < 0.1
    assert vision.palette_distance(home, vision.palette(np.rint(linear).astype(np.uint8))) < 1.5
    assert vision.palette_distance(home, vision.palette(picture[..., ::-1])) > 5


def test_structure_is_ssim():
    one, other = (vision.shrink(np.full((64, 64), level), 64) for level in (60, 120))
    assert vision.structure(one, other) == pytest.approx((2 * 60 * 120 + 6.5025) / (60**2 + 120**2 + 6.5025), rel=1e-4)
    pattern, foreign = (vision.shrink(vision.luma(texture(seed=seed)), 64) for seed in (0, 1))
    assert vision.structure(pattern, pattern) == pytest.approx(1)
    assert abs(vision.structure(pattern, foreign)) < 0.15


def test_drift_and_change_of_a_ramp():
    ramp = np.arange(100.0)
    assert curves.drift(ramp) == curves.drift(ramp[::-1]) == 92 - 7  # means of 85..99 and 0..14
    assert curves.change(ramp, fps=10) == 50 == -curves.change(ramp[::-1], fps=10)
    assert curves.change(ramp, fps=1) == 95  # means of 95..99 and 0..4
    assert curves.drift(np.r_[np.nan, ramp[1:]]) == 92 - 7.5


def test_smoothing_skips_what_is_not_known():
    assert curves.smooth(np.array([np.nan, 1, 2, 3, np.nan]), 3) == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert np.isnan(curves.smooth(np.full(3, np.nan), 3)).all()


def test_chunk_discontinuity_is_the_largest_over_the_mean():
    motion = np.r_[np.nan, np.ones(20)]
    motion[[7, 14]] = 10
    assert curves.chunk_discontinuity(motion, chunks=3) == pytest.approx(10 / 1.9)
    assert curves.chunk_discontinuity(np.ones(20), chunks=3) == 1
    for chunks in (1, 22):
        with pytest.raises(ValueError, match="chunks must be in 2..21 for 20 motions"):
            curves.chunk_discontinuity(motion, chunks)


def test_a_sharp_dip_is_a_collapse_and_a_slow_one_is_not():
    distance = np.r_[np.full(9, np.nan), np.linspace(0.1, 5, 20), np.full(300, 5.0)]
    calm = curves.sink_collapse(distance, fps=16)
    assert calm.collapse == 0 and calm.dips == [] and np.nanmax(calm.distance) == 1
    distance[200:203] = 3, 1, 3
    found = curves.sink_collapse(distance, fps=16)
    assert found.collapse == pytest.approx(0.8) and found.dips == [201]
    slow = np.r_[np.full(9, np.nan), np.linspace(8, 4, 1000)]
    assert curves.sink_collapse(slow, fps=16).collapse < 0.1
    assert curves.sink_collapse(np.full(50, np.nan), fps=16).collapse == 0


def test_a_loop_is_found_with_its_length():
    random = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    found = curves.find_loop(random[np.arange(200) % 40], fps=16)
    assert (found.lag, round(found.strength, 3)) == (40, 1) and found.repeats[40:] == pytest.approx(1)
    assert np.isnan(found.repeats[:40]).all()
    half = random.copy()
    half[100:] = random[100 + np.arange(100) % 20]
    assert curves.find_loop(half, fps=16).lag == 20 and 0.3 < curves.find_loop(half, fps=16).strength < 0.7


def test_neither_stillness_nor_change_is_a_loop():
    random = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    still, ramp = np.repeat(random[:1], 200, axis=0), random[:1] * np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
    pulsing = still + 0.005 * random[1] * (np.arange(200) % 16 == 0)[:, None]  # key frames of a codec
    wandering = np.cumsum(random, axis=0)
    for thumbnails, most in ((still, 0), (pulsing, 0.1), (ramp, 0.02), (random, 0.2), (wandering, 0.2)):
        assert curves.find_loop(thumbnails, fps=16).strength <= most


def test_correlation_is_that_of_its_definition():
    moved = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    direct = []
    for lag in range(30):
        late, early = moved[lag:], moved[: 30 - lag]
        scale = math.sqrt((late**2).sum() * (early**2).sum()) + curves.STILL**2 * late.size
        direct.append((late * early).sum() / scale)
    assert curves.correlate(moved) == pytest.approx(direct, abs=1e-5)


def test_alignment_is_the_formula():
    theta = PLAIN.frequencies(22)
    direct = np.abs(np.exp(1j * np.arange(300)[:, None] * theta).mean(axis=1))
    found = sink_alignment(PLAIN, 300)
    assert found[0] == 1 and found == pytest.approx(direct, abs=1e-9)


def test_alignment_has_maxima_where_lol_saw_collapse():
    found = sink_alignment(PLAIN, 300)
    maxima = [t for t in range(100, 299) if found[t] >= max(found[t - 1], found[t + 1])]
    for seen in (132, 201):
        assert min(abs(t - seen) for t in maxima) <= 1
    assert sink_alignment(PRESETS["lol"].position, 300, heads=12)[133] < found[133] - 0.05


def test_alignment_follows_a_preset():
    scaled = PositionPolicy(mode="pi", train_len=21, scale=4)
    assert sink_alignment(scaled, 81)[80] == pytest.approx(sink_alignment(PLAIN, 81)[20])
    slots = PRESETS["infinity-rope"].position
    found = sink_alignment(slots, 100, window=6)
    assert found[:6] == pytest.approx(sink_alignment(PLAIN, 6)) and found[48:51] == pytest.approx(found[3:6])
    with pytest.raises(ValueError, match="positions are slots: window must be given and hold a chunk of 3, got None"):
        sink_alignment(slots, 100)
    with pytest.raises(ValueError, match="frames must be a whole number >= 1, got 0"):
        sink_alignment(PLAIN, 0)
    with pytest.raises(ValueError, match="no preset 'flx'.+did you mean 'flex'"):
        sink_alignment("flx", 9)
    with pytest.raises(TypeError, match="policy must be a PositionPolicy, a Preset or its name, got SinkWindow"):
        sink_alignment(PRESETS["flex"].retention, 9)
    for preset in ("infinity-rope", PRESETS["infinity-rope"]):
        assert np.array_equal(sink_alignment(preset, 100), found)


@pytest.mark.parametrize(("name", "apart"), [("deep-sink", 21), ("deep-forcing", 16)])
def test_a_sink_that_moves_along_stays_as_near(name, apart):
    """It lies so many frames before the chunk, or what the last choice has left; Deep Forcing's code chunk by chunk."""
    plain, found = sink_alignment(PLAIN, 60), sink_alignment(name, 300)
    assert np.allclose(found[:21], plain[:21])
    starts = range(21, 300, 6)  # of chunks in which deep-forcing chooses
    assert all(np.allclose(found[start : start + 3], plain[apart : apart + 3]) for start in starts)
    with pytest.raises(ValueError, match="the sink moves along behind the other frames of the window: give a preset"):
        sink_alignment(PRESETS[name].position, 9)


def test_frames_and_pictures():
    assert per_picture(np.array([0.0, 1, 2]), 10).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [latent_frames(count) for count in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]


@pytest.mark.parametrize("metric", [*CURVES.values(), *LEARNED.values(), *WHOLE.values()], ids=lambda m: m.name)
def test_every_figure_is_defined_and_has_a_source(metric):
    assert "Source:" in metric.definition and metric.unit and metric.title
