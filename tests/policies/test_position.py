import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from flexkern.policies import PositionPolicy, SinkWindow

BANDS, HEADS = 22, 12  # Wan 1.3B, head_dim 128
MODES = ["none", "pi", "ntk", "yarn", "by_parts", "hard", "riflex"]


def phases(policy, query, visible, heads=HEADS, **more):
    return policy.phases(query=query, visible=visible, bands=BANDS, heads=heads, **more)


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


def relative(result):
    """Angle from each key to each query, [F, R, G, T]."""
    return wrap(result.query[:, None] - result.key)


def assert_equal(left, right):
    for name in ("query", "key", "logit_scale"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def chunks(sink, window, count):
    policy, cached = SinkWindow(sink=sink, window=window), []
    for n in range(count):
        query = [3 * n, 3 * n + 1, 3 * n + 2]
        cached = [cached[i] for i in policy.keep(cached, 3).pages] + query
        yield query, cached


# what the method says


def test_cycles_made_in_training():
    expected = [3.34, 2.20, 1.45, 0.95, 0.63, 0.41, 0.27, 0.18, 0.12, 0.077, 0.051, 0.033]
    cycles = PositionPolicy().cycles(BANDS)
    np.testing.assert_allclose(cycles[:12], expected, atol=0.006)
    assert cycles[-1] == pytest.approx(0.0005, abs=1e-5)
    assert (cycles >= 1).sum() == 3


def test_default_table():
    np.testing.assert_allclose(
        PositionPolicy().kept(BANDS), [1, 1, 1, 0.94, 0.50, 0.22, 0.03, *[0] * 15], rtol=0, atol=0.005
    )


def test_language_model_thresholds_interpolate_nearly_everything():
    assert PositionPolicy(mode="yarn").kept(BANDS).max() == pytest.approx(0.076, abs=5e-4)


def test_frequencies_are_those_of_the_model():
    np.testing.assert_allclose(PositionPolicy().frequencies(22), 10000.0 ** (-2 * np.arange(22) / 44), rtol=1e-15)
    np.testing.assert_allclose(PositionPolicy(base=500.0).frequencies(12), 500.0 ** (-np.arange(12) / 12), rtol=1e-15)


# multipliers, mode by mode


@pytest.mark.parametrize("s", [1.0, 1.5, 6, 12.0, 400.0])
def test_multipliers_of_every_mode(s):
    table = {mode: PositionPolicy(mode=mode).multipliers(s, BANDS)[0] for mode in MODES}
    g = PositionPolicy().kept(BANDS)
    lm = np.clip((PositionPolicy().cycles(BANDS) - 1) / 31, 0, 1)
    expected = {
        "none": np.ones(BANDS),
        "pi": np.full(BANDS, 1 / s),
        "by_parts": g + (1 - g) / s,
        "yarn": lm + (1 - lm) / s,
        "hard": np.where(np.arange(BANDS) < 3, 1, 1 / s),
        "ntk": (10000 * s ** (44 / 42)) ** (-2 * np.arange(BANDS) / 44) / PositionPolicy().frequencies(BANDS),
    }
    for mode, values in expected.items():
        np.testing.assert_allclose(table[mode], values, rtol=1e-13, err_msg=mode)
    assert table["ntk"][0] == 1 and table["ntk"][-1] == pytest.approx(1 / s)


@pytest.mark.parametrize(
    "ramp, half", [("linear", 0.25), ("smooth", 0.15625), ("cosine", (1 - math.cos(math.pi / 4)) / 2)]
)
def test_ramps(ramp, half):
    base = PositionPolicy(ramp=ramp)
    cycles = base.cycles(BANDS)
    # place band 4 a quarter of the way up the ramp
    g = replace(base, alpha=cycles[4] - 0.1, beta=cycles[4] + 0.3).kept(BANDS)
    assert g[4] == pytest.approx(half)
    assert g[0] == 1 and g[-1] == 0 and (np.diff(g) <= 0).all()


def test_hard_keeps_a_band_that_completes_beta():
    edge = PositionPolicy().cycles(BANDS)[5]
    assert PositionPolicy(mode="hard", beta=edge).kept(BANDS).sum() == 6
    assert PositionPolicy(mode="hard", beta=np.nextafter(edge, 1)).kept(BANDS).sum() == 5


def test_riflex_slows_one_band():
    policy = PositionPolicy(mode="riflex")
    theta = policy.frequencies(BANDS)
    moved = policy.multipliers(4.0, BANDS)[0] * theta
    assert moved[3] == pytest.approx(0.9 * 2 * math.pi / 84)  # the period of band 3, 22.1 frames, is nearest 21
    np.testing.assert_array_equal(np.delete(moved, 3), np.delete(theta, 3))
    assert (replace(policy, riflex_band=7).multipliers(4.0, BANDS)[0] != 1).nonzero()[0] == [7]
    assert (replace(policy, train_len=240).multipliers(4.0, BANDS)[0] != 1).nonzero()[0] == [9]


def test_jitter_gives_every_head_a_base():
    policy = PositionPolicy(mode="jitter", jitter_seed=5)
    result = policy.multipliers(1.0, BANDS, HEADS)
    assert result.shape == (HEADS, BANDS)
    bases = 10000 * result[:, 11] ** -2  # (1 + sigma e)^(-11/22)
    assert len(set(bases)) == HEADS
    theta = policy.frequencies(BANDS)
    np.testing.assert_allclose(result * theta, bases[:, None] ** (-np.arange(BANDS) / BANDS), rtol=1e-12)
    many = (10000 * policy.multipliers(1.0, BANDS, 1000)[:, 11] ** -2 - 10000) / 8000
    assert -1 <= many.min() < -0.98 and 0.98 < many.max() <= 1 and abs(many.mean()) < 0.1
    np.testing.assert_array_equal(result, policy.multipliers(7.0, BANDS, HEADS))
    np.testing.assert_array_equal(result[:5], policy.multipliers(1.0, BANDS, 5))
    assert (replace(policy, jitter_seed=6).multipliers(1.0, BANDS, HEADS)[:, 1:] != result[:, 1:]).all()
    np.testing.assert_array_equal(replace(policy, jitter_sigma=0.0).multipliers(1.0, BANDS, 2), np.ones((2, BANDS)))


def test_table_overrides_mode_scale_and_start():
    table = tuple(np.linspace(1, 0.1, BANDS).tolist())
    for policy in (PositionPolicy(table=table), PositionPolicy(table=table, mode="jitter", start="past", scale=9.0)):
        np.testing.assert_array_equal(policy.multipliers(3.0, BANDS, HEADS), [table])
        result = phases(policy, [3, 4, 5], range(6))
        np.testing.assert_allclose(result.query[1, 0], policy.frequencies(BANDS) * table, rtol=1e-12)
    dynamic = PositionPolicy(table=table, scale_schedule="dynamic")
    assert phases(dynamic, [33, 34, 35], range(36)).key.shape == (1, 36, 1, BANDS)


# scale, schedule, start


def test_schedules():
    query = [60, 61, 62]
    auto = lambda schedule, **more: PositionPolicy(scale_schedule=schedule, **more)
    np.testing.assert_array_equal(auto("static").scales(query, target=126), [6, 6, 6])
    np.testing.assert_array_equal(auto("static").scales([0, 1, 2], target=126), [6, 6, 6])
    np.testing.assert_array_equal(auto("static").scales(query, target=20), [1, 1, 1])
    np.testing.assert_array_equal(auto("per_chunk").scales(query), [3, 3, 3])
    np.testing.assert_array_equal(auto("dynamic").scales(query), [61 / 21, 62 / 21, 3])
    np.testing.assert_array_equal(auto("dynamic").scales([19, 20, 21]), [1, 1, 22 / 21])
    np.testing.assert_array_equal(auto("static", scale=2.5).scales(query), [2.5] * 3)
    np.testing.assert_array_equal(auto("static", train_len=240).scales(query, target=480), [2, 2, 2])


def test_start_past_leaves_the_trained_horizon_alone():
    for schedule in ("static", "per_chunk", "dynamic"):
        policy = PositionPolicy(start="past", scale_schedule=schedule)
        np.testing.assert_array_equal(policy.scales([18, 19, 20], target=42), [1, 1, 1])
        assert policy.scales([19, 20, 21], target=42)[-1] > 1
    np.testing.assert_array_equal(PositionPolicy(start="past", scale=3.0).scales([18, 19, 20]), [1, 1, 1])
    np.testing.assert_array_equal(PositionPolicy(start="past", scale=3.0).scales([21, 22, 23]), [3, 3, 3])


def test_static_without_a_target_is_refused_only_where_it_matters():
    with pytest.raises(ValueError, match="'static' needs the length of the video: pass target, set scale"):
        phases(PositionPolicy(scale_schedule="static"), [0], [0])
    with pytest.raises(ValueError, match="target must be an int >= 1 latent frames, got 2.5"):
        phases(PositionPolicy(scale_schedule="static"), [0], [0], target=2.5)
    for fixed in (dict(mode="none"), dict(mode="jitter"), dict(table=(1.0,) * BANDS), dict(scale=2.0)):
        phases(PositionPolicy(scale_schedule="static", **fixed), [0], [0])


def test_dynamic_gives_each_query_its_own_keys():
    query, visible = [40, 41, 42], [0, 1, 2, *range(25, 43)]
    policy = PositionPolicy(scale_schedule="dynamic")
    result = phases(policy, query, visible)
    assert result.key.shape == (3, 21, 1, BANDS) and result.query.shape == (3, 1, BANDS)
    for i, frame in enumerate(query):
        fixed = phases(replace(policy, scale=(frame + 1) / 21), query, visible)
        assert fixed.key.shape == (1, 21, 1, BANDS)
        np.testing.assert_array_equal(result.key[i], fixed.key[0])
        np.testing.assert_array_equal(result.query[i], fixed.query[i])


def test_logit_scale():
    scale = lambda policy: phases(policy, [0, 1, 2], [0, 1, 2]).logit_scale
    np.testing.assert_allclose(scale(PositionPolicy(mode="yarn", scale=6.0)), [(1 + 0.1 * math.log(6)) ** 2] * 3)
    np.testing.assert_array_equal(scale(PositionPolicy(scale=6.0)), [1, 1, 1])
    np.testing.assert_allclose(scale(PositionPolicy(scale=6.0, logit_temp=0.2)), [(1 + 0.2 * math.log(6)) ** 2] * 3)
    np.testing.assert_array_equal(scale(PositionPolicy(mode="yarn", scale=6.0, logit_temp=0.0)), [1, 1, 1])
    dynamic = phases(PositionPolicy(mode="yarn", scale_schedule="dynamic"), [20, 41, 83], [20, 41, 83]).logit_scale
    np.testing.assert_allclose(dynamic, (1 + 0.1 * np.log([1, 2, 4])) ** 2)


# phases


@pytest.mark.parametrize("index", ["absolute", "slot"])
@pytest.mark.parametrize("mode", MODES)
def test_scale_one_is_the_base_model_bit_for_bit(mode, index):
    base = PositionPolicy(mode="none", index=index)
    for query, visible in chunks(3, 12, 9):
        for s in (dict(scale=1.0), dict(scale="auto", scale_schedule="static", train_len=27)):
            assert_equal(phases(replace(base, mode=mode, **s), query, visible, target=27), phases(base, query, visible))


@pytest.mark.parametrize("mode", MODES)
def test_per_chunk_is_the_base_model_inside_the_trained_horizon(mode):
    policy, base = PositionPolicy(mode=mode), PositionPolicy(mode="none")
    for query, visible in chunks(3, 21, 7):
        assert_equal(phases(policy, query, visible), phases(base, query, visible))


@pytest.mark.parametrize(
    ("gap", "visible", "sink"),
    [
        (3, [0, 1, 2, 9, 10, 11, 12], [3, 4, 5]),  # Deep Forcing: three frames between the sink and what follows
        (0, [0, 1, 2, 9, 10, 11, 12], [6, 7, 8]),
        (0, [0, 1, 2, 0, 0, 9, 10, 11, 12], [4, 5, 6]),  # two pages of chosen tokens lie between
        (8, [0, 1, 2, 9, 10, 11, 12], [0, 1, 2]),  # never to before its own frames
        (None, [0, 1, 2, 9, 10, 11, 12], [0, 1, 2]),
        (3, [5, 6, 7, 8, 9], [5, 6, 7]),  # nothing has left
    ],
)
def test_a_sink_may_move_along(gap, visible, sink):
    query = visible[-2:]
    policy = PositionPolicy(mode="none", sink_gap=gap)
    options = dict(query=query, bands=22, heads=1)
    moved = PositionPolicy(mode="none").phases(visible=[*sink, *visible[3:]], **options)
    assert np.array_equal(policy.phases(visible=visible, **options).key, moved.key)


def test_slot_positions_are_those_of_longlive_infinite():
    policy = PositionPolicy(mode="none", index="slot", train_len=240)
    for query, visible in chunks(3, 12, 9):
        count = len(visible)
        distance = np.arange(count - 3, count)[:, None] - np.arange(count)
        expected = wrap(distance[..., None, None] * policy.frequencies(BANDS))
        np.testing.assert_allclose(relative(phases(policy, query, visible)), expected, atol=1e-13)


def test_absolute_positions_are_those_of_longlive():
    policy = PositionPolicy(mode="none", train_len=240)
    for query, visible in chunks(3, 12, 9):
        distance = np.array(query)[:, None] - np.array(visible)
        expected = wrap(distance[..., None, None] * policy.frequencies(BANDS))
        np.testing.assert_allclose(relative(phases(policy, query, visible)), expected, atol=1e-13)


def test_absolute_and_slot_agree_until_the_window_fills():
    absolute, slot = PositionPolicy(mode="none"), PositionPolicy(mode="none", index="slot")
    for n, (query, visible) in enumerate(chunks(3, 12, 6)):
        left, right = phases(absolute, query, visible), phases(slot, query, visible)
        if n < 4:
            assert_equal(left, right)
        else:  # only the distance to the sink differs
            np.testing.assert_array_equal(left.query, right.query)
            np.testing.assert_array_equal(left.key[:, 3:], right.key[:, 3:])
            assert (left.key[:, :3] != right.key[:, :3]).all()


def test_reach_beyond_slows_the_distance_to_the_sink_alone():
    """Keys less than train_len frames before the chunk's last are turned as trained, the sink as by reach all."""
    query, visible = [60, 61, 62], [0, 1, 2, 42, 43, 59, 60, 61, 62]
    for mode in ("by_parts", "pi"):
        beyond, everywhere, trained = (
            phases(PositionPolicy(mode=m, scale_schedule="per_chunk", reach=reach), query, visible)
            for m, reach in ((mode, "beyond"), (mode, "all"), ("none", "all"))
        )
        np.testing.assert_array_equal(beyond.query, trained.query)
        np.testing.assert_array_equal(beyond.key[:, 4:], trained.key[:, 4:])
        np.testing.assert_array_equal(beyond.key[:, 3], trained.key[:, 3])  # 20 frames before the last
        np.testing.assert_array_equal(beyond.key[:, :3], everywhere.key[:, :3])
        assert not np.array_equal(beyond.key[:, :3], trained.key[:, :3])
    clip = range(30)  # a whole clip in one chunk: a frame and itself stay together, all distances are slowed
    beyond, every = (phases(PositionPolicy(mode="pi", reach=reach), clip, clip) for reach in ("beyond", "all"))
    assert (beyond.key == every.key).all() and (beyond.query == every.query).all()
    own = phases(PositionPolicy(scale_schedule="dynamic", reach="beyond"), query, visible)
    assert own.key.shape[0] == 3 and not np.array_equal(own.key[0, :3], own.key[2, :3])
    np.testing.assert_array_equal(own.key[:, 3:], np.broadcast_to(trained.key[:, 3:], own.key[:, 3:].shape))


def test_cut_moves_the_newest_frames_away():
    policy = PositionPolicy(mode="none", index="slot", cut_position=45)
    result = phases(policy, [9, 10, 11], [0, 7, 8, 9, 10, 11], cut=True)
    distance = np.array([45, 46, 47])[:, None] - np.array([0, 1, 2, 45, 46, 47])
    expected = wrap(distance[..., None, None] * policy.frequencies(BANDS))
    np.testing.assert_allclose(relative(result), expected, atol=1e-13)


def test_adding_a_constant_to_all_positions_changes_nothing():
    policy = PositionPolicy(scale=3.0)
    near = phases(policy, [30, 31, 32], [0, 5, *range(20, 33)])
    far = phases(policy, [10**12 + f for f in (30, 31, 32)], [10**12 + f for f in (0, 5, *range(20, 33))])
    assert_equal(near, far)


def pi_times(scale):
    """pi * scale in integers (Machin), an oracle independent of the constant in the code."""
    arctan = lambda n: sum((-1) ** k * scale // ((2 * k + 1) * n ** (2 * k + 1)) for k in range(150))
    return 4 * (4 * arctan(5) - arctan(239))


@pytest.mark.parametrize("mode", ["none", "by_parts", "ntk", "jitter"])
@pytest.mark.parametrize("last", [10**7, 10**15])
def test_phases_have_no_horizon(mode, last):
    full_turn = Fraction(2 * pi_times(10**60), 10**60)
    query, visible = [last - 2, last - 1, last], [0, 1, 2, 1000, *range(last - 17, last + 1)]
    policy = PositionPolicy(mode=mode)
    heads = 2
    actual = relative(phases(policy, query, visible, heads=heads))
    theta = policy.frequencies(BANDS) * policy.multipliers((last + 1) / 21, BANDS, heads)
    for i, q in enumerate(query):
        for r, k in enumerate(visible):
            for g, t in np.ndindex(*theta.shape):
                exact = (q - k) * Fraction(theta[g, t]) % full_turn
                error = (Fraction(actual[i, r, g, t]) - exact) % full_turn
                assert min(error, full_turn - error) < 1e-12, (q, k, g, t)


def test_angles_are_reduced_float64():
    result = phases(PositionPolicy(mode="jitter"), [900, 901, 902], [0, 1, 2, 900, 901, 902])
    assert result.query.shape == (3, HEADS, BANDS) and result.key.shape == (1, 6, HEADS, BANDS)
    for angles in (result.query, result.key, result.logit_scale):
        assert angles.dtype == np.float64
        assert np.isfinite(angles).all() and np.abs(angles).max() <= np.pi


# errors


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (
            dict(mode="by_part"),
            ValueError,
            "PositionPolicy.mode must be 'none' | 'pi'.*got 'by_part'; did you mean 'by_parts'",
        ),
        (dict(mode=3), TypeError, "PositionPolicy.mode must be 'none'.*got 3"),
        (dict(train_len=0), ValueError, "train_len must be at least 1 latent frame, got 0"),
        (dict(train_len=21.0), TypeError, "PositionPolicy.train_len must be an int or None, got 21.0"),
        (dict(alpha=1.0), ValueError, "alpha must be below beta, got alpha = 1.0 and beta = 1.0"),
        (dict(alpha=-0.1), ValueError, "alpha must be >= 0 and beta > 0, got -0.1 and 1.0"),
        (dict(alpha=float("nan")), TypeError, "PositionPolicy.alpha must be a finite number or None, got nan"),
        (dict(scale=0.5), ValueError, "scale must be 'auto' or >= 1, got 0.5"),
        (
            dict(scale="automatic"),
            ValueError,
            "PositionPolicy.scale must be a finite number or 'auto', got 'automatic'",
        ),
        (dict(scale_schedule="chunk"), ValueError, "'static' | 'dynamic' | 'per_chunk', got 'chunk'"),
        (dict(logit_temp=-1.0), ValueError, "logit_temp must be >= 0, got -1.0"),
        (dict(table=(1.0, -0.5)), ValueError, "table must hold multipliers >= 0"),
        (dict(table=[1.0]), TypeError, r"PositionPolicy.table must be a tuple \(a finite number each\) or None"),
        (dict(base=1.0), ValueError, "base must be > 1, got 1.0"),
        (dict(jitter_sigma=1.0), ValueError, r"jitter_sigma must be in \[0, 1\), got 1.0"),
        (dict(riflex_band=-1), ValueError, "riflex_band must be >= 0, got -1"),
        (dict(jitter_seed=-1), ValueError, "jitter_seed must be >= 0, got -1"),
        (dict(cut_position=-1), ValueError, "cut_position must be >= 0, got -1"),
    ],
)
def test_rejects_fields(fields, error, message):
    with pytest.raises(error, match=message.replace("|", r"\|")):
        PositionPolicy(**fields)


@pytest.mark.parametrize(
    "fields, arguments, message",
    [
        ({}, dict(query=[]), "query must list frame indices >= 0, at least one, got \\[\\]"),
        ({}, dict(visible=[0, -1]), "visible must list frame indices >= 0, at least one, got \\[0, -1\\]"),
        ({}, dict(query=[0.5]), "query must list frame indices"),
        ({}, dict(cut=True), "a cut needs index 'slot'"),
        (dict(index="slot"), dict(query=[0, 1, 2], visible=[2]), "visible must include the query frames, got 1 for 3"),
        (dict(table=(1.0, 1.0)), {}, "table must hold 22 multipliers, got 2"),
        (dict(mode="riflex", riflex_band=22), {}, "riflex_band must be below the 22 bands of this model, got 22"),
        ({}, dict(bands=0), "bands must be an int >= 1, got 0"),
        ({}, dict(heads=0), "heads must be an int >= 1, got 0"),
    ],
)
def test_rejects_arguments(fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionPolicy(**fields).phases(**dict(query=[0], visible=[0], bands=BANDS, heads=HEADS) | arguments)


def test_rejects_a_scale_below_one():
    with pytest.raises(ValueError, match="scale must be finite and >= 1, got 0.9"):
        PositionPolicy().multipliers(0.9, BANDS)
