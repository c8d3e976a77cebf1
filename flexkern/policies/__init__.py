"""Policies: pure functions that decide positions, retention and noise, and presets that combine them. NumPy only."""

from .effect import idle_fields
from .noise import NoisePolicy, NoiseSource
from .position import Phases, PositionPolicy
from .presets import PRESETS, LoopPolicy, Preset, SwitchPolicy, get_preset
from .retention import Blend, Kept, RetentionPolicy, SinkWindow

__all__ = [
    "PRESETS",
    "Blend",
    "Kept",
    "LoopPolicy",
    "NoisePolicy",
    "NoiseSource",
    "Phases",
    "PositionPolicy",
    "Preset",
    "RetentionPolicy",
    "SinkWindow",
    "SwitchPolicy",
    "get_preset",
    "idle_fields",
]
