"""Presets with windows that fill after a few chunks of three frames, so that frames leave them."""

from flexkern.policies import Preset, get_preset

OVERRIDES = {
    "infinity-rope": {},
    "memrope": {"retention.window": 9},
    "deep-forcing": {"retention.sink": 3, "retention.window": 9, "retention.budget": 8},
    "deep-sink": {"retention.sink": 3, "retention.window": 9},
    "rolling-sink": {"retention.sink": 6, "retention.window": 9},
}


def with_small_window(name: str) -> Preset:
    """The preset of that name, whose window is full after two or three chunks."""
    return get_preset(name, OVERRIDES.get(name, {"retention.window": 6}))
