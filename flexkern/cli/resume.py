"""``flexkern render --resume``: the options a render was begun with, kept in its record and found again."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from flexkern.checks import require
from flexkern.cli.flags import Flags
from flexkern.policies.presets import POLICIES
from flexkern.render.choices import PATH, flag, plain

# options that may be given with --resume
BESIDE = ("resume", "resume_anyway", "threads", "gpus", "graphs", "progress", "metrics_port")


def saved_options(given: Flags) -> dict[str, Any]:
    """What was given, as JSON takes it; paths from the root, so that it holds wherever the next command is run."""
    return {f.name: plain(getattr(given, f.name)) for f in _ours(given) if _changed(given, f)}


def options_from(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options that ``saved_options`` gave, as fields. Raises ValueError where one is not known here."""
    known = {f.name for f in fields(Flags)}
    for name in saved:
        require(name in known, f"it was begun with {flag(name)}, which this version of flexkern does not know")
    return {name: _read(value) for name, value in saved.items()}


def validate_alone(given: Flags) -> None:
    """Raises ValueError where --resume is given with what the record says."""
    others = [f.name for f in _ours(given) if _changed(given, f) and f.name not in BESIDE]
    others += [
        name for name in POLICIES if hasattr(given, name) and getattr(given, name) != type(getattr(given, name))()
    ]
    if others:
        raise ValueError(f"--resume goes on with what was ordered: {flag(others[0])} cannot be given with it")


def _ours(given: Flags) -> list[Field[Any]]:
    return [f for f in fields(given) if f.name not in POLICIES]


def _changed(given: Flags, one: "Field[Any]") -> bool:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return bool(getattr(given, one.name) != default)


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return Path(value[PATH])
    return tuple(_read(each) for each in value) if isinstance(value, list) else value
