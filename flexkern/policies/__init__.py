"""Policies: pure functions that decide positions, retention and noise, and presets that combine them. NumPy only."""

from .noise import NoisePolicy, NoiseSource
from .position import Phases, PositionPolicy
from .presets import PRESETS, Preset, SwitchPolicy, get_preset
from .retention import SinkWindow

__all__ = [
    "PRESETS",
    "NoisePolicy",
    "NoiseSource",
    "Phases",
    "PositionPolicy",
    "Preset",
    "SinkWindow",
    "SwitchPolicy",
    "get_preset",
]
