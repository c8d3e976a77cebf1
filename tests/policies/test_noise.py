import numpy as np
import pytest

from flexkern.policies import NoisePolicy

SHAPE = (4, 64, 64)
PIXELS = 4 * 64 * 64
SIGMAS = 5  # standard errors that a statistic may be off by
KINDS = ["ar1", "iid", "alternating", "zero_sum", "high_pass", "pyoco_mixed", "pyoco_progressive", "freenoise"]
FREE = ["iid", "alternating", "zero_sum", "high_pass", "pyoco_mixed", "freenoise"]  # drawn at any frame in any order


def video(policy, count=48, chunk=3, seed=0, target=None, shape=SHAPE):
    """Noise of a whole video, drawn chunk by chunk, float64 [count, pixels]."""
    source = policy.source(seed, shape=shape, target=target)
    chunks = [source.initial(range(t, t + chunk)) for t in range(0, count, chunk)]
    return np.concatenate(chunks).reshape(count, -1).astype(np.float64)


def covariance(z, lag):
    return (z[lag:] * z[: len(z) - lag]).mean()


def standard_error(z, lag=0):
    return np.sqrt(2.0 / (z.shape[1] * (len(z) - lag))) * 2  # doubled: the terms of one pixel are correlated


# marginals and white noise


@pytest.mark.parametrize("scope", ["sequence", "chunk"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_standard_normal(kind, scope):
    z = video(NoisePolicy(kind=kind, scope=scope))
    assert np.abs(z.mean(1)).max() < SIGMAS / np.sqrt(PIXELS)
    assert np.abs((z * z).mean(1) - 1).max() < SIGMAS * np.sqrt(2 / PIXELS)
    assert np.abs((z**4).mean(1) - 3).max() < SIGMAS * np.sqrt(96 / PIXELS)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_dtype(kind):
    source = NoisePolicy(kind=kind, apply="initial+renoise").source(1, shape=(2, 3, 5))
    for z in (source.initial([0, 1, 2, 3]), source.renoise([0, 1, 2, 3], 2)):
        assert z.shape == (4, 2, 3, 5) and z.dtype == np.float32 and np.isfinite(z).all()


def test_white_noise_is_pinned():
    """A change here changes every video that was ever rendered from a seed."""
    zero, last = (NoisePolicy(kind="iid").source(seed, shape=(4,)) for seed in (0, 2**64 - 1))
    for drawn, expected in (
        (zero.initial([0]), [0.059911035, 0.015559634, -1.1644385, -0.13264713]),
        (zero.renoise([7], 2), [1.0336275, 1.1466775, 0.89502269, -0.17733623]),
        (last.initial([10**7]), [0.85991579, 0.83731276, 0.23680943, 3.3872075]),
    ):
        np.testing.assert_allclose(drawn[0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", FREE)
def test_random_access(kind):
    policy = NoisePolicy(kind=kind, apply="initial+renoise")
    source, other = (policy.source(3, shape=(8, 8)) for _ in range(2))
    frames = [range(t, t + 3) for t in (0, 3, 6, 30, 10**7)]
    forwards = [(source.initial(f), source.renoise(f, 1)) for f in frames]
    backwards = [(other.initial(f), other.renoise(f, 1)) for f in reversed(frames)][::-1]
    np.testing.assert_array_equal(forwards, backwards)


@pytest.mark.parametrize("kind", ["iid", "high_pass", "alternating", "freenoise"])
def test_chunking_does_not_matter(kind):
    policy = NoisePolicy(kind=kind)
    for chunk in (1, 8):
        np.testing.assert_array_equal(video(policy, 24, 3), video(policy, 24, chunk))


def test_draws_are_independent():
    """Seeds, frames, steps and streams: all of them uncorrelated."""
    policy = NoisePolicy(kind="iid")
    sources = [policy.source(seed, shape=SHAPE) for seed in (0, 1, 2**32, 2**63)]
    draws = [s.initial([f])[0] for s in sources for f in (0, 1, 2, 2**32)]
    draws += [sources[0].renoise([f], step)[0] for f in (0, 1, 2) for step in (0, 1, 2)]
    correlation = np.corrcoef(np.reshape(draws, (len(draws), -1)))
    assert np.abs(correlation - np.eye(len(draws))).max() < SIGMAS / np.sqrt(PIXELS)


def test_a_frame_is_white_in_space():
    z = video(NoisePolicy(), 9)[-1].reshape(SHAPE)
    for axis in range(3):
        neighbours = z * np.roll(z, 1, axis)
        assert abs(neighbours.mean()) < SIGMAS / np.sqrt(PIXELS)


# antiphase noise


@pytest.mark.parametrize("rho", [-0.9, -0.7, -0.3, 0.5])
def test_ar1_variance_and_lag_correlation(rho):
    z = video(NoisePolicy(rho=rho))
    for lag in range(6):
        slack = SIGMAS * standard_error(z, lag) * (1 + rho**2) / (1 - rho**2)
        assert covariance(z, lag) == pytest.approx(rho**lag, abs=slack), lag
    steps = np.square(np.diff(z, axis=0)).mean()
    assert steps == pytest.approx(2 * (1 - rho), rel=0.02)


def test_ar1_spectrum_at_zero_and_nyquist():
    count, rho = 240, -0.7
    z = video(NoisePolicy(rho=rho), count, chunk=12)
    lags = np.arange(1, count)
    for sign, limit in ((1, 0.176), (-1, 5.67)):
        # the periodogram of a finite video: its triangular weights move it off the limit by O(1 / count)
        expected = 1 + 2 * np.sum((1 - lags / count) * (sign * rho) ** lags)
        assert expected == pytest.approx(limit, rel=0.02)
        power = np.square(np.tensordot(float(sign) ** np.arange(count), z, 1)).mean() / count
        assert power == pytest.approx(expected, rel=SIGMAS * np.sqrt(2 / PIXELS))


def test_ar1_is_the_recursion_over_white_noise():
    eps, z = video(NoisePolicy(kind="iid"), 12), video(NoisePolicy(rho=-0.7), 12)
    expected = [eps[0]]
    for e in eps[1:]:
        expected.append(-0.7 * expected[-1] + np.sqrt(1 - 0.49) * e)
    np.testing.assert_array_equal(z, np.float32(expected))


@pytest.mark.parametrize("kind", ["ar1", "pyoco_progressive", "pyoco_mixed", "alternating", "high_pass"])
@pytest.mark.parametrize("scope", ["sequence", "chunk"])
def test_no_prior_is_iid_bit_for_bit(kind, scope):
    off = dict(rho=0.0) if kind == "ar1" else dict(weight=0.0)
    np.testing.assert_array_equal(video(NoisePolicy(kind=kind, scope=scope, **off)), video(NoisePolicy(kind="iid")))


@pytest.mark.parametrize("kind", ["ar1", "pyoco_progressive", "pyoco_mixed", "alternating", "high_pass"])
def test_scope_chunk_restarts(kind):
    within = {"ar1": -0.7, "pyoco_progressive": 0.5**0.5, "pyoco_mixed": 0.5, "alternating": -0.49, "high_pass": -0.5}
    z = {scope: video(NoisePolicy(kind=kind, scope=scope)) for scope in ("sequence", "chunk")}
    pairs = {scope: (v[1:] * v[:-1]).mean(1) for scope, v in z.items()}
    borders = np.arange(1, 48) % 3 == 0
    # both share their first chunk; the first frame of a chunk has nothing to differ from where scope is chunk
    inside = within[kind] * np.where((np.arange(1, 48) % 3 == 1) & (kind == "high_pass"), 2**0.5, 1)
    slack = SIGMAS * np.sqrt(2 / PIXELS)
    np.testing.assert_allclose(pairs["sequence"][3:], within[kind], atol=slack)
    np.testing.assert_allclose(pairs["chunk"], np.where(borders, 0, inside), atol=slack)
    np.testing.assert_array_equal(z["sequence"][:3], z["chunk"][:3])


def test_chunk_scope_may_be_drawn_in_any_order():
    policy = NoisePolicy(scope="chunk")
    source = policy.source(0, shape=SHAPE)
    late, early = source.initial([6, 7, 8]), source.initial([0, 1, 2])
    np.testing.assert_array_equal(np.concatenate((early, late)).reshape(6, -1), video(policy, 9)[[0, 1, 2, 6, 7, 8]])


def test_linear_decay_ends_white():
    z = video(NoisePolicy(rho=-0.8, rho_schedule="linear_decay"), 48, target=25)
    expected = -0.8 * np.maximum(0, 1 - np.arange(1, 48) / 24)
    np.testing.assert_allclose((z[1:] * z[:-1]).mean(1), expected, atol=SIGMAS * np.sqrt(2 / PIXELS))
    np.testing.assert_array_equal(z[24:], video(NoisePolicy(kind="iid"))[24:])
    one = NoisePolicy(rho_schedule="linear_decay").source(0, shape=(2,), target=1)
    assert np.isfinite(one.initial([0])).all()


# the other kinds


def test_alternating_shares_one_component_with_flipping_sign():
    z = video(NoisePolicy(kind="alternating", weight=0.6))
    for lag in (1, 2, 7, 40):
        assert covariance(z, lag) == pytest.approx((-1) ** lag * 0.36, abs=SIGMAS * np.sqrt(2 / PIXELS))
    whole = video(NoisePolicy(kind="alternating", weight=1.0), 6)
    np.testing.assert_array_equal(whole[1:], -whole[:-1])


@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_zero_sum(chunk):
    z = video(NoisePolicy(kind="zero_sum"), 48, chunk).reshape(-1, chunk, PIXELS)
    assert np.abs(z.sum(1)).max() < 1e-5
    assert (z[:, 0] * z[:, 1]).mean() == pytest.approx(-1 / (chunk - 1), abs=0.01)


def test_high_pass_is_a_first_difference():
    eps, z = video(NoisePolicy(kind="iid")), video(NoisePolicy(kind="high_pass", weight=0.5))
    np.testing.assert_array_equal(z[0], eps[0])
    np.testing.assert_allclose(z[1:], (eps[1:] - 0.5 * eps[:-1]) / np.sqrt(1.25), atol=1e-6)
    assert covariance(z[1:], 1) == pytest.approx(-0.4, abs=0.01)
    assert covariance(z[1:], 2) == pytest.approx(0, abs=0.01)


def test_pyoco_mixed_shares_one_component():
    z = video(NoisePolicy(kind="pyoco_mixed", weight=2.0))
    for lag in (1, 5, 40):
        assert covariance(z, lag) == pytest.approx(0.8, abs=SIGMAS * np.sqrt(2 / PIXELS))


def test_pyoco_progressive_with_flipped_sign_is_antiphase_noise():
    a = 0.7 / np.sqrt(1 - 0.49)
    left, right = video(NoisePolicy(kind="pyoco_progressive", weight=-a)), video(NoisePolicy(rho=-0.7))
    np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("window, stride", [(16, 4), (6, 3), (5, 1)])
def test_freenoise_shuffles_runs_of_the_first_window(window, stride):
    z = video(NoisePolicy(kind="freenoise", window=window, stride=stride), 60, shape=(4,))
    eps = video(NoisePolicy(kind="iid"), 60, shape=(4,))
    np.testing.assert_array_equal(z[:window], eps[:window])
    origin = [int((eps[:window] == frame).all(1).nonzero()[0].item()) for frame in z]
    for run in range(window, 60, stride):  # each run holds the frames of the run one window earlier
        assert sorted(origin[run : run + stride]) == sorted(origin[run - window : run - window + stride])
    if stride > 1:
        orders = {tuple(o % stride for o in origin[run : run + stride]) for run in range(window, 60, stride)}
        assert len(orders) > 3


# between denoising steps


@pytest.mark.parametrize("kind", KINDS)
def test_renoise_is_iid_unless_asked(kind):
    policy, iid = NoisePolicy(kind=kind), NoisePolicy(kind="iid").source(0, shape=SHAPE)
    np.testing.assert_array_equal(policy.source(0, shape=SHAPE).renoise([3, 4], 1), iid.renoise([3, 4], 1))


@pytest.mark.parametrize("kind", ["ar1", "alternating", "pyoco_mixed"])
def test_renoise_has_a_sequence_per_step(kind):
    source = NoisePolicy(kind=kind, apply="initial+renoise").source(0, shape=SHAPE)
    draws = [[] for _ in range(3)]
    for t in range(0, 24, 3):
        draws[0].append(source.initial(range(t, t + 3)))
        for step in (0, 1):
            draws[1 + step].append(source.renoise(range(t, t + 3), step))
    z = np.stack([np.concatenate(d).reshape(24, -1) for d in draws])
    lag_one = {"ar1": -0.7, "alternating": -0.49, "pyoco_mixed": 0.5}[kind]
    for sequence in z:
        assert covariance(sequence, 1) == pytest.approx(lag_one, abs=0.02)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs((z[a] * z[b]).mean(1)).max() < SIGMAS / np.sqrt(PIXELS)


# state


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_going_on(kind):
    policy = NoisePolicy(kind=kind, apply="initial+renoise")

    def chunk(source, t):
        frames = range(t, t + 3)
        return np.stack([source.initial(frames), *(source.renoise(frames, step) for step in range(3))])

    whole = policy.source(9, shape=(4, 4))
    for t in range(0, 12, 3):
        chunk(whole, t)
    saved = whole.state()
    resumed = policy.source(9, shape=(4, 4))
    expected = [chunk(whole, t) for t in range(12, 30, 3)]  # does not touch what was saved
    resumed.restore(saved)
    np.testing.assert_array_equal([chunk(resumed, t) for t in range(12, 30, 3)], expected)
    assert set(map(type, saved.values())) <= {int, np.ndarray}


def test_state_goes_back_in_time():
    source = NoisePolicy().source(0, shape=(4,))
    start = source.state()
    first = source.initial([0, 1, 2])
    source.restore(start)
    np.testing.assert_array_equal(source.initial([0, 1, 2]), first)


def test_a_recursion_may_start_late():
    """A video that continues given frames has no noise for those."""
    late = NoisePolicy().source(0, shape=(4,)).initial([6, 7, 8])
    np.testing.assert_array_equal(late[0], NoisePolicy(kind="iid").source(0, shape=(4,)).initial([6])[0])


# errors


@pytest.mark.parametrize("kind", ["ar1", "pyoco_progressive"])
def test_recursive_kinds_refuse_other_orders(kind):
    source = NoisePolicy(kind=kind, apply="initial+renoise").source(0, shape=(4,))
    source.initial([0])
    for frames in ([0], [2, 3]):
        with pytest.raises(ValueError, match=f"initial noise is drawn in order: expected frame 1, got {frames[0]}"):
            source.initial(frames)
    source.initial([1, 2])
    source.renoise([0, 1, 2], 1)
    with pytest.raises(ValueError, match="renoise1 noise is drawn in order: expected frame 3, got 6"):
        source.renoise([6, 7, 8], 1)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(kind="ar"), ValueError, "NoisePolicy.kind must be 'ar1' .* got 'ar'; did you mean 'ar1'"),
        (dict(rho=-1.0), ValueError, "rho must be between -1 and 1, both excluded, got -1.0"),
        (dict(rho="-0.7"), TypeError, "NoisePolicy.rho must be a finite number, got '-0.7'"),
        (
            dict(kind="alternating", weight=1.1),
            ValueError,
            r"weight of .* must be in \[-1, 1\], got 1.1",
        ),
        (dict(window=16, stride=5), ValueError, "stride must divide window, got stride 5 and window 16"),
        (dict(stride=0), ValueError, "stride must be at least 1 frame, got 0"),
        (dict(window=0), ValueError, "window must be at least 1 frame, got 0"),
        (dict(scope="video"), ValueError, "NoisePolicy.scope must be 'sequence' | 'chunk', got 'video'"),
        (dict(apply="renoise"), ValueError, "NoisePolicy.apply must be 'initial' | 'initial.renoise', got 'renoise'"),
    ],
)
def test_rejects_fields(fields, error, message):
    with pytest.raises(error, match=message.replace("|", r"\|")):
        NoisePolicy(**fields)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seed=-1), r"seed must be an int in \[0, 2\^64\), got -1"),
        (dict(seed=2**64), r"seed must be an int in \[0, 2\^64\), got 18446744073709551616"),
        (dict(shape=[4]), r"shape must be a tuple of ints >= 1, that of one frame, got \[4\]"),
        (dict(shape=(4, 0)), r"shape must be a tuple of ints >= 1, that of one frame, got \(4, 0\)"),
        (dict(), "rho_schedule 'linear_decay' needs the length of the video: pass target, or set it to 'const'"),
        (dict(target=0), "target must be an int >= 1 latent frames, got 0"),
    ],
)
def test_rejects_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoisePolicy(rho_schedule="linear_decay").source(**dict(seed=0, shape=(4,)) | arguments)


def test_rejects_draws_and_states():
    source = NoisePolicy().source(5, shape=(4,))
    for frames in ([], [1, 3], [-1, 0], [0.0]):
        with pytest.raises(ValueError, match="frames must be consecutive indices >= 0, at least one, got"):
            source.initial(frames)
    with pytest.raises(ValueError, match="step must be an int >= 0, got -1"):
        source.renoise([0], -1)
    with pytest.raises(ValueError, match="zero_sum needs chunks of at least 2 frames, got 1"):
        NoisePolicy(kind="zero_sum").source(0, shape=(4,)).initial([0])
    with pytest.raises(ValueError, match="state must be of seed 5, got 6"):
        source.restore(NoisePolicy().source(6, shape=(4,)).state())
    with pytest.raises(ValueError, match=r"initial.z must have the frame shape \(4,\), got \(3,\)"):
        source.restore({"seed": 5, "initial.index": 2, "initial.z": np.zeros(3)})
    with pytest.raises(ValueError, match="state must hold initial.index beside initial.z"):
        source.restore({"seed": 5, "initial.z": np.zeros(4)})
