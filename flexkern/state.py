"""What every ``state()`` returns and every ``restore()`` takes: tensors on the CPU and plain values, by dotted names.

Tensors are copies that fit a safetensors file; all else fits JSON: numbers, strings, None, and lists of them.
"""

import json
from collections.abc import Mapping
from typing import Any

from flexkern.checks import shown

State = dict[str, Any]


def nest(name: str, state: Mapping[str, Any]) -> State:
    """The entries of a state under ``name.``, for the state that contains it."""
    return {f"{name}.{key}": value for key, value in state.items()}


def within(name: str, state: Mapping[str, Any]) -> State:
    """The entries that ``nest`` put under ``name.``. Raises TypeError for what is no state."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a state is a mapping, as state() returns it, got {shown(state)}")
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}


def require_same(what: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first entry that differs, unless a state was made by the same ``what``."""
    for name, value in expected.items():
        if name not in got or got[name] != value:
            found = repr(got[name]) if name in got else "nothing"
            raise ValueError(f"the state is of another {what}: {name} must be {value!r}, got {found}")
    if unknown := sorted(got.keys() - expected.keys()):
        raise ValueError(f"the state is of another {what}: {unknown[0]} is not known here")


def plain(values: Mapping[str, Any]) -> State:
    """The values as JSON gives them back: lists for tuples, numbers of Python for those of NumPy."""
    found: State = json.loads(json.dumps(dict(values), default=lambda number: number.item()))
    return found


def stateful(thing: Any, name: str) -> Any:
    """A session's noise or decoder. Raises TypeError where it cannot be saved."""
    if not (hasattr(thing, "state") and hasattr(thing, "restore")):
        raise TypeError(f"the {name} of a session that is saved needs state() and restore(): {type(thing).__name__}")
    return thing
