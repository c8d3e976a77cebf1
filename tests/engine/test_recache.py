"""A change of prompt runs as many frames again as the window holds, in a model deep enough to show it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import upstream
from both_loops import SIZE, assert_equal_to, both, prompt_of
from safetensors.torch import load_file

from flexkern.engine import Engine
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.policies import get_preset

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def deep():
    model = CausalWan(replace(CONFIGS["tiny"], num_layers=4))
    model.load_state_dict(upstream.deepened(load_file(DATA / "tiny_wan.safetensors")))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("at", [2, 8], ids=["before the window is full", "after"])
@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("window", [9, 12, 18])
@pytest.mark.parametrize("name", ["longlive", "longlive-infinite"])
def test_a_recache_follows_the_window(deep, name, window, sink, at, keep_sink):
    """LongLive runs as many frames again as its window holds, min(local_attn_size, frames so far)."""
    overrides = {"retention.window": window, "retention.sink": sink, "switch.keep_sink": keep_sink}
    options = dict(window=window, sink=sink, slot=name == "longlive-infinite")
    switches = {at: (prompt_of(2), partial(upstream.recache, keep_sink=keep_sink))}
    assert_equal_to(both(deep, name, overrides, options, chunks=at + 3, switches=switches))


def test_a_recache_of_the_default_window_is_not_enough_for_another(deep):
    """Two layers hide what four show, as the published code did."""
    window = {"retention.window": 18, "switch.keep_sink": False}
    switches = {8: (prompt_of(2), partial(upstream.recache, keep_sink=False))}
    fixed = both(
        deep, "longlive", {**window, "switch.recent": 12}, dict(window=18, sink=3), chunks=10, switches=switches
    )
    assert (fixed[0] - fixed[1]).abs().max() > 1e-3


def test_a_window_for_all_frames_recaches_them_all(deep):
    """local_attn_size -1 of LongLive: its window holds the whole video."""
    switches = {n: (prompt_of(n), partial(upstream.recache, keep_sink=True)) for n in (3, 6)}
    assert_equal_to(
        both(deep, "longlive", {"retention.window": 24}, dict(window=24, sink=3), chunks=8, switches=switches)
    )


@pytest.mark.parametrize(
    "overrides, most",
    [({"retention.window": 9}, 9), ({}, 12), ({"retention.window": 18}, 18), ({"switch.recent": 4}, 4)],
    ids=str,
)
def test_a_session_remembers_what_a_recache_needs_and_no_more(deep, overrides, most):
    session = Engine(deep, size=SIZE).session(prompt_of(1), preset=get_preset("longlive", overrides))
    held = [session.step() and session._recent.shape[1] for _ in range(8)]
    assert held == [min(most, 3 * n) for n in range(1, 9)]
    assert session._recent.untyped_storage().nbytes() == session._recent.nbytes
