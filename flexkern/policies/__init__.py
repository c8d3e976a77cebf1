"""Policies: pure functions that decide positions, retention and noise, and presets that combine them. NumPy only."""

from .noise import NoisePolicy, NoiseSource
from .position import Phases, PositionPolicy
from .presets import PRESETS, LoopPolicy, Preset, get_preset, idle_fields, position_of
from .retention import Blend, ChosenTokens, Kept, RetentionPolicy, SinkWindow
from .switch import SwitchPolicy

__all__ = [
    "PRESETS",
    "Blend",
    "ChosenTokens",
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
    "position_of",
]
