from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from flexkern.policies import PRESETS, LoopPolicy, NoisePolicy, PositionPolicy, SinkWindow, SwitchPolicy, get_preset

NAMES = ["self-forcing", "longlive", "longlive-infinite", "infinity-rope", "lol", "riflex", "pi", "ntk", "yarn", "flex"]
POLICIES = ("position", "retention", "noise", "switch")


def test_names():
    assert list(PRESETS) == NAMES
    assert all(PRESETS[name].name == name and PRESETS[name].doc and PRESETS[name].source for name in NAMES)


@pytest.mark.parametrize(
    "name, mode, index, train_len, sink, window, noise, switch",
    [
        ("self-forcing", "none", "absolute", 21, 0, 21, "iid", ("keep", 12)),
        ("longlive", "none", "absolute", 240, 3, 12, "iid", ("recache", 12)),
        ("longlive-infinite", "none", "slot", 240, 3, 12, "iid", ("recache", 12)),
        ("infinity-rope", "none", "slot", 21, 1, 6, "iid", ("flush", 2)),
        ("lol", "jitter", "absolute", 240, 3, 12, "iid", ("keep", 12)),
        ("riflex", "riflex", "absolute", 21, 0, 21, "iid", ("keep", 12)),
        ("pi", "pi", "absolute", 21, 3, 21, "iid", ("keep", 12)),
        ("ntk", "ntk", "absolute", 21, 3, 21, "iid", ("keep", 12)),
        ("yarn", "yarn", "absolute", 21, 3, 21, "iid", ("keep", 12)),
        ("flex", "by_parts", "absolute", 21, 3, 21, "ar1", ("keep", 12)),
    ],
)
def test_the_family(name, mode, index, train_len, sink, window, noise, switch):
    it = get_preset(name)
    assert (it.position.mode, it.position.index, it.position.train_len) == (mode, index, train_len)
    assert it.retention == SinkWindow(sink=sink, window=window)
    assert it.noise.kind == noise
    assert (it.switch.kind, it.switch.recent, it.switch.keep_sink) == (*switch, True)


def test_values_behind_the_names():
    assert PRESETS["flex"].noise == NoisePolicy(kind="ar1", rho=-0.7, scope="sequence", apply="initial")
    assert PRESETS["flex"].position.thresholds == (0.25, 1.0) and PRESETS["flex"].position.temperature == 0
    assert PRESETS["yarn"].position.thresholds == (1.0, 32.0) and PRESETS["yarn"].position.temperature == 0.1
    assert PRESETS["infinity-rope"].position.cut_position == 45
    assert PRESETS["lol"].position.jitter_sigma == 0.8


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_rivals_differ_from_flex_in_modulation_and_noise_only(name):
    flex, rival = PRESETS["flex"], PRESETS[name]
    assert replace(rival.position, mode="by_parts") == flex.position
    assert (rival.retention, rival.switch) == (flex.retention, flex.switch)


@pytest.mark.parametrize("name", NAMES)
def test_an_endless_session_needs_no_target(name):
    it = get_preset(name)
    result = it.position.phases(query=[999, 1000, 1001], visible=[0, 1, 998, 999, 1000, 1001], bands=22, heads=2)
    assert np.isfinite(result.key).all() and (result.logit_scale >= 1).all()
    assert it.noise.source(0, shape=(2, 2)).initial([999, 1000, 1001]).shape == (3, 2, 2)
    assert len(it.retention.keep(range(40), 3).indices) == it.retention.window - 3


def test_overrides():
    changes = {"position.alpha": 0.3, "position.beta": 2, "retention.sink": 6, "noise.kind": "iid", "switch.recent": 4}
    it = get_preset("flex", changes)
    assert it.position == replace(PRESETS["flex"].position, alpha=0.3, beta=2)
    assert it.retention == SinkWindow(sink=6, window=21)
    assert it.noise.kind == "iid" and it.switch == SwitchPolicy(recent=4)
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
    assert described["position.alpha"] is None and described["loop.kind"] == "chunk"
    overridable = {f"{part}.{field.name}" for part in POLICIES for field in fields(getattr(PRESETS["flex"], part))}
    assert described.keys() == {"name", "loop.kind"} | overridable
    changed = get_preset("flex", {"noise.stride": 8}).describe()
    assert {name for name in described if described[name] != changed[name]} == {"noise.stride"}


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
        ("flex", {"switch.recent": 0}, "recent must be at least 1 frame, got 0"),
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
