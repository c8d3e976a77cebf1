"""The JSON Schema of job files, made from the dataclasses that read them.

Source: JSON Schema, draft 2020-12.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flexkern.checks import field_docs
from flexkern.policies import get_preset
from flexkern.policies.presets import POLICIES
from flexkern.render.encoding import Encoding
from flexkern.render.script import PromptSwitch
from flexkern.render.spec import EXCLUSIVE, JobSpec

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string", NoneType: "null"}
TIME = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}],
    "description": "seconds, or a time such as 1:30, 60s or 1m30s",
}
TEXT = {"type": "string", "minLength": 1}


def job_schema() -> dict[str, Any]:
    """The schema of a job file: one job, or a list of them. Each document of a YAML file is one such value."""
    job = {
        "type": "object",
        "description": _sentence(JobSpec),
        "properties": _properties(JobSpec),
        "additionalProperties": False,
        "allOf": [{"not": {"required": list(pair)}} for pair in EXCLUSIVE],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flexkern job file",
        "anyOf": [{"$ref": "#/$defs/job"}, {"type": "array", "items": {"$ref": "#/$defs/job"}, "minItems": 1}],
        "$defs": {"job": job},
    }


def _properties(cls: Any) -> dict[str, Any]:
    """The schema of each field of a dataclass."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    found = {}
    for one in fields(cls):
        special = WRITTEN.get((cls, one.name))
        schema = special() if special else _type(hints[one.name]) | dict(one.metadata)
        if one.name in docs:
            schema["description"] = docs[one.name]
        if one.default is not MISSING and isinstance(one.default, str | int | float | bool):
            schema["default"] = one.default
        found[one.name] = schema
    return found


def _type(hint: Any) -> dict[str, Any]:
    """The schema of what an annotation allows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [_type(arg) for arg in args]
        simple = [kind["type"] for kind in kinds if set(kind) == {"type"}]
        return {"type": simple} if len(simple) == len(kinds) else {"anyOf": kinds}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        items = _type(args[0]) if len(set(args) - {...}) == 1 else {}
        schema: dict[str, Any] = {"type": "array", "items": items}
        return schema if args[1:] == (...,) else schema | {"minItems": len(args), "maxItems": len(args)}
    if hint is Encoding:
        return {"type": "object", "properties": _properties(Encoding), "additionalProperties": False}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object"}
    return {"type": TYPES[hint]}


def _overrides() -> dict[str, Any]:
    """The fields of a preset's policies by dotted name."""
    preset = get_preset("flex")
    named = {name: _properties(type(getattr(preset, name))) for name in POLICIES}
    plain = {
        f"{policy}.{name}": {key: value for key, value in schema.items() if key != "default"}
        for policy, properties in named.items()
        for name, schema in properties.items()
    }
    return {"type": "object", "properties": plain, "additionalProperties": False}


def _prompts() -> dict[str, Any]:
    cut = _properties(PromptSwitch)["cut"]
    entry = {"type": "object", "properties": {"at": TIME, "prompt": TEXT, "cut": cut}, "required": ["at", "prompt"]}
    forms = [
        {"type": "array", "items": entry | {"additionalProperties": False}, "minItems": 1},
        {"type": "array", "items": TEXT, "minItems": 1},
        {"type": "object", "additionalProperties": TEXT, "minProperties": 1},
    ]
    return {"anyOf": forms}


def _seconds() -> dict[str, Any]:
    return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": ["string", "null"]}]}


def _fps() -> dict[str, Any]:
    (rate,) = (one for one in fields(Encoding) if one.name == "fps")
    return {"anyOf": [{"type": "number", **rate.metadata}, {"type": ["string", "null"]}]}


def _one_or_several(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item}]}


# fields that may be written in another form than they are kept in
WRITTEN: dict[tuple[type, str], Callable[[], dict[str, Any]]] = {
    (JobSpec, "overrides"): _overrides,
    (JobSpec, "prompts"): _prompts,
    (JobSpec, "seconds"): _seconds,
    (JobSpec, "lora"): lambda: _one_or_several(TEXT),
    (JobSpec, "lora_scale"): lambda: _one_or_several({"type": "number"}),
    (Encoding, "fps"): _fps,
}


def _sentence(cls: type) -> str:
    return (cls.__doc__ or "").split("\n\n")[0].replace("``", "")
