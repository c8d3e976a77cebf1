import warnings
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from flexkern.policies import PRESETS, LoopPolicy, NoisePolicy, PositionPolicy, SinkWindow, SwitchPolicy, get_preset

NAMES = ["self-forcing", "longlive", "longlive-infinite", "infinity-rope", "reward-forcing", "memrope", "rolling-sink"]
NAMES += ["deep-forcing", "deep-sink", "lol", "riflex", "pi", "ntk", "yarn", "flex"]
EVICTED = {"reward-forcing": "sink", "memrope": "memory", "rolling-sink": "sweep", "deep-forcing": "choose"}
POLICIES = ("position", "retention", "noise", "switch")


def test_names():
    assert list(PRESETS) == NAMES
    assert all(PRESETS[name].name == name and PRESETS[name].doc and PRESETS[name].source for name in NAMES)


@pytest.mark.parametrize(
    "name, mode, index, train_len, sink, window, noise, switch",
    [
        ("self-forcing", "none", "absolute", 21, 0, 21, "iid", ("keep", None)),
        ("longlive", "none", "absolute", 240, 3, 12, "iid", ("recache", 12)),
        ("longlive-infinite", "none", "slot", 240, 3, 12, "iid", ("recache", 12)),
        ("infinity-rope", "none", "slot", 21, 1, 6, "iid", ("flush", 2)),
        ("reward-forcing", "none", "slot", 21, 3, 9, "iid", ("keep", None)),
        ("memrope", "none", "slot", 21, 3, 12, "iid", ("keep", None)),
        ("rolling-sink", "none", "slot", 21, 18, 21, "iid", ("keep", None)),
        ("deep-forcing", "none", "absolute", 21, 10, 21, "iid", ("keep", None)),
        ("deep-sink", "none", "absolute", 21, 14, 21, "iid", ("keep", None)),
        ("lol", "jitter", "absolute", 240, 3, 12, "iid", ("keep", None)),
        ("riflex", "riflex", "absolute", 21, 0, 21, "iid", ("keep", None)),
        ("pi", "pi", "absolute", 21, 3, 21, "iid", ("keep", None)),
        ("ntk", "ntk", "absolute", 21, 3, 21, "iid", ("keep", None)),
        ("yarn", "yarn", "absolute", 21, 3, 21, "iid", ("keep", None)),
        ("flex", "by_parts", "absolute", 21, 3, 21, "ar1", ("keep", None)),
    ],
)
def test_the_family(name, mode, index, train_len, sink, window, noise, switch):
    it = get_preset(name)
    assert (it.position.mode, it.position.index, it.position.horizon) == (mode, index, train_len)
    assert (it.retention.sink, it.retention.window, it.retention.evicted) == (sink, window, EVICTED.get(name, "drop"))
    assert it.noise.kind == noise
    used = it.resolve().switch
    assert (used.kind, used.recent, used.keep_sink) == (*switch, True)


def test_values_behind_the_names():
    assert PRESETS["flex"].position.reach == "beyond"  # flexkern/docs/evidence.md says why
    assert PRESETS["flex"].noise == NoisePolicy(kind="ar1", rho=-0.7, scope="sequence", apply="initial")
    assert PRESETS["flex"].position.thresholds == (0.25, 1.0) and PRESETS["flex"].position.temperature == 0
    assert PRESETS["yarn"].position.thresholds == (1.0, 32.0) and PRESETS["yarn"].position.temperature == 0.1
    assert PRESETS["infinity-rope"].resolve().position.cut_position == 45
    assert PRESETS["lol"].position.jitter_sigma == 0.8
    assert PRESETS["reward-forcing"].retention.sink_rate == 0.001
    memory = PRESETS["memrope"].retention
    assert (memory.slow_rate, memory.fast_rate, memory.average) == (0.01, 0.1, "tokens")
    deep = PRESETS["deep-forcing"].retention
    assert (deep.budget, deep.recent, deep.reuse) == (16, 4, 7)
    assert PRESETS["deep-forcing"].position == PRESETS["deep-sink"].position
    assert PRESETS["deep-sink"].position.sink_gap == 3


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_rivals_differ_from_flex_in_modulation_and_noise_only(name):
    flex, rival = PRESETS["flex"], PRESETS[name]
    assert replace(rival.position, mode="by_parts", reach="beyond") == flex.position
    assert (rival.retention, rival.switch) == (flex.retention, flex.switch)


@pytest.mark.parametrize("name", NAMES)
def test_an_endless_session_needs_no_target(name):
    it = get_preset(name)
    result = it.position.phases(query=[999, 1000, 1001], visible=[0, 1, 998, 999, 1000, 1001], bands=22, heads=2)
    assert np.isfinite(result.key).all() and (result.logit_scale >= 1).all()
    assert it.noise.source(0, shape=(2, 2)).initial([999, 1000, 1001]).shape == (3, 2, 2)
    kept = it.retention.keep(range(40), 3)
    full = it.retention.budget if it.retention.evicted == "choose" else it.retention.window
    assert len(kept.pages if kept.seen is None else kept.seen) == full - 3


def test_overrides():
    changes = {"position.alpha": 0.3, "position.beta": 2, "retention.sink": 6, "noise.kind": "iid"}
    changes |= {"switch.kind": "flush", "switch.recent": 4}
    it = get_preset("flex", changes)
    assert it.position == replace(PRESETS["flex"].position, alpha=0.3, beta=2)
    assert it.retention == SinkWindow(sink=6, window=21)
    assert it.noise.kind == "iid" and it.switch == SwitchPolicy(kind="flush", recent=4)
    assert PRESETS["flex"].retention.sink == 3
    assert get_preset(it, {"retention.sink": 1}).position == it.position
    assert get_preset(it) == it and get_preset("flex") == PRESETS["flex"]


def test_a_list_stands_for_a_tuple():
    assert get_preset("flex", {"position.table": [1, 0.5]}).position.table == (1, 0.5)


def test_fields_that_depend_on_each_other_change_together():
    assert get_preset("infinity-rope", {"retention.sink": 9, "retention.window": 12}).retention.sink == 9
    assert get_preset("flex", {"position.alpha": 3, "position.beta": 4}).position.thresholds == (3, 4)


def test_every_field_can_be_overridden():
    for part in POLICIES:
        policy = getattr(PRESETS["flex"], part)
        for field in fields(policy):
            value = getattr(policy, field.name)
            assert get_preset("flex", {f"{part}.{field.name}": value}) == PRESETS["flex"]


def test_every_method_runs_chunk_by_chunk():
    assert {it.loop for it in PRESETS.values()} == {LoopPolicy(kind="chunk")}
    with pytest.raises(ValueError, match="LoopPolicy.kind must be 'chunk', got 'rolling'"):
        LoopPolicy(kind="rolling")


def test_a_description_tells_presets_apart():
    described = PRESETS["flex"].describe()
    assert described["position.beta"] == 1.0 and described["loop.kind"] == "chunk"
    overridable = {f"{part}.{field.name}" for part in POLICIES for field in fields(getattr(PRESETS["flex"], part))}
    assert described.keys() == {"name", "loop.kind"} | overridable
    changed = PRESETS["flex"].override({"noise.stride": 8}).describe()
    assert {name for name in described if described[name] != changed[name]} == {"noise.stride"}


def test_overrides_without_effect_are_told():
    """In one warning, and only those that were said and differ; what a later override brings to use is no mistake."""
    idle = {"position.riflex_band": 5, "noise.window": 9, "retention.window": 30, "switch.keep_sink": True}
    with pytest.warns(UserWarning, match="^without effect in flex: position.riflex_band, noise.window$") as told:
        preset = get_preset("flex", idle)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PRESETS["flex"].override(idle) == preset
        assert get_preset(preset, {"position.mode": "riflex", "noise.kind": "freenoise"}).position.riflex_band == 5
        for name in PRESETS:
            get_preset(name, {"retention.window": 24, "position.train_len": 30})


def test_a_sink_that_moves_along_needs_a_sink():
    with pytest.warns(UserWarning, match="without effect in self-forcing: position.sink_gap"):
        get_preset("self-forcing", {"position.sink_gap": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_preset("self-forcing", {"position.sink_gap": 3, "retention.sink": 3})


USED = {  # what None stands for, in a preset with these overrides
    "longlive": {"switch.recent": 12, "position.train_len": 240, "position.alpha": None, "position.cut_position": None},
    "longlive retention.window=18": {"switch.recent": 18},
    "longlive retention.window=18 switch.recent=7": {"switch.recent": 7},
    "longlive switch.kind=flush": {"switch.recent": 2},
    "longlive switch.kind=keep": {"switch.recent": None},
    "infinity-rope": {"switch.recent": 2, "position.cut_position": 45, "position.train_len": 21},
    "infinity-rope retention.window=9": {"switch.recent": 2, "position.cut_position": 45},
    "infinity-rope switch.kind=recache": {"switch.recent": 6},
    "infinity-rope retention.window=60": {"position.cut_position": 120},
    "infinity-rope retention.window=60 position.cut_position=45": {"position.cut_position": 45},
    "flex": {"position.alpha": 0.25, "position.beta": 1.0, "position.logit_temp": 0.0, "noise.window": None},
    "flex position.mode=yarn": {"position.alpha": 1.0, "position.beta": 32.0, "position.logit_temp": 0.1},
    "flex position.mode=hard": {"position.alpha": None, "position.beta": 1.0},
    "flex noise.kind=alternating": {"noise.weight": 0.7},
    "flex noise.kind=freenoise": {"noise.window": 21, "noise.stride": 3, "noise.weight": None},
    "flex noise.kind=freenoise position.train_len=240": {"noise.window": 240, "noise.stride": 4},
    "flex noise.kind=freenoise noise.window=10": {"noise.window": 10, "noise.stride": 2},
    "flex noise.kind=freenoise noise.stride=8": {"noise.window": 16, "noise.stride": 8},
    "flex noise.kind=freenoise noise.stride=30": {"noise.window": 30, "noise.stride": 30},
}


def read_preset(words):
    name, *given = words.split()
    pairs = (word.split("=") for word in given)
    return get_preset(name, {field: int(value) if value.isdigit() else value for field, value in pairs})


@pytest.mark.parametrize("words", USED)
def test_fields_that_follow_others(words):
    it = read_preset(words)
    assert it.resolve().resolve() == it.resolve()
    described = it.describe()
    assert {name: described[name] for name in USED[words]} == USED[words]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"memrope", "rolling-sink", "deep-forcing", "deep-sink"}))
def test_a_field_that_follows_keeps_following(name):
    """Overrides in two calls are those of one: nothing is settled before it is used."""
    step = get_preset(get_preset(name, {"retention.window": 18}), {"switch.kind": "recache"})
    assert step.resolve().switch.recent == 18
    assert get_preset(step, {"retention.window": 9}).resolve().switch.recent == 9


@pytest.mark.parametrize("name", NAMES)
def test_the_values_in_use_compute_what_the_preset_does(name):
    it = get_preset(name, {"noise.kind": "freenoise"})
    options = dict(query=[39, 40, 41], visible=[0, 38, 39, 40, 41], bands=22, heads=2, cut=it.position.index == "slot")
    given, used = (preset.position.phases(**options) for preset in (it, it.resolve()))
    for field in ("query", "key", "logit_scale"):
        assert np.array_equal(getattr(given, field), getattr(used, field))
    if it.position.horizon == 21:
        draws = [preset.noise.source(0, shape=(2,)).initial(range(90)) for preset in (it, it.resolve())]
        assert np.array_equal(*draws)


def test_a_model_tells_its_horizon_where_the_preset_does_not():
    assert get_preset("flex").for_horizon(240).resolve().position.train_len == 240
    assert get_preset("flex", {"position.train_len": 30}).for_horizon(240).position.train_len == 30
    assert get_preset("flex").resolve().position.train_len == 21


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("flexx", None, "no preset 'flexx': expected one of self-forcing, longlive, .*, flex; did you mean 'flex'"),
        (None, None, "no preset None: expected one of self-forcing"),
        (
            "flex",
            {"position.alhpa": 1.0},
            "no field 'position.alhpa': .*position.beta.*did you mean 'position.alpha'",
        ),
        ("flex", {"alpha": 1.0}, "no field 'alpha': expected one of position.mode, .*switch.keep_sink"),
        ("flex", {"position": 1.0}, "no field 'position': expected one of position.mode"),
        ("flex", {3: 1.0}, "no field 3: expected one of position.mode"),
        ("flex", {"position.alpha": "0.3"}, "PositionPolicy.alpha must be a finite number or None, got '0.3'"),
        ("flex", {"position.table": ["1"]}, r"PositionPolicy.table must be a tuple .* got \('1',\)"),
        ("flex", {"retention.sink": 3.0}, "SinkWindow.sink must be an int, got 3.0"),
        ("flex", {"retention.sink": True}, "SinkWindow.sink must be an int, got True"),
        ("flex", {"switch.keep_sink": 1}, "SwitchPolicy.keep_sink must be a bool, got 1"),
        ("flex", {"switch.kind": "recach"}, "SwitchPolicy.kind must be 'keep' .* got 'recach'; did you mean 'recache'"),
        (
            "rolling-sink",
            {"switch.kind": "flush"},
            "switch.kind must be 'keep' where retention.evicted is 'sweep', got 'flush'",
        ),
        (
            "deep-forcing",
            {"position.index": "slot"},
            "position.mode must be 'none', index 'absolute' and table None where .*, got 'none', 'slot' and None",
        ),
        (
            "flex",
            {"retention.evicted": "choose"},
            "position.mode must be 'none', .* got 'by_parts', 'absolute' and None",
        ),
        ("deep-forcing", {"switch.kind": "recache"}, "switch.kind must be 'keep' where retention.evicted is 'choose'"),
        ("memrope", {"switch.kind": "recache"}, "switch.kind must be 'keep' where retention.evicted is 'memory'"),
        ("deep-forcing", {"retention.sink": 0}, "evicted 'choose' needs a sink of at least 1 frame, got 0"),
        (
            "rolling-sink",
            {"position.index": "absolute", "position.sink_gap": 3},
            "position.sink_gap must be None where retention.evicted is 'sweep', got 3",
        ),
        ("deep-sink", {"position.sink_gap": -1}, "sink_gap must be >= 0, got -1"),
        ("flex", {"switch.recent": 0}, "recent must be at least 1 frame, got 0"),
        ("longlive", {"switch.recent": 13}, "recent must be at most the 12 frames of the window, got 13 for 'recache'"),
        ("longlive", {"position.train_len": 0}, "train_len must be at least 1 latent frame, got 0"),
        ("flex", {"retention.sink": 21}, "window must exceed the sink of 21 frames, got 21"),
    ],
)
def test_rejects(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        get_preset(name, overrides)


def test_presets_hold_policies_and_stay_as_they_are():
    with pytest.raises(TypeError, match="Preset.retention must be a RetentionPolicy, got PositionPolicy"):
        replace(PRESETS["flex"], retention=PositionPolicy())
    with pytest.raises(TypeError, match="Preset.noise must be a NoisePolicy, got PositionPolicy"):
        replace(PRESETS["flex"], noise=PositionPolicy())
    with pytest.raises(FrozenInstanceError):
        PRESETS["flex"].name = "other"
