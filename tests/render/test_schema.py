"""The published JSON Schema of job files: it is the dataclasses', and it takes what they take."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from flexkern.policies import SinkWindow
from flexkern.render import JobSpec, job_schema
from flexkern.render.spec import SpecError
from flexkern.render.yaml_forms import Loader

DOCS = Path(__file__).parents[2] / "flexkern" / "docs"
SCHEMA = job_schema()


def test_the_published_schema_is_that_of_the_dataclasses():
    """After a change: flexkern schema > flexkern/docs/job.schema.json"""
    assert json.loads((DOCS / "job.schema.json").read_text()) == SCHEMA


def test_every_field_is_there_and_explained():
    job = SCHEMA["$defs"]["job"]["properties"]
    assert job.keys() == {f.name for f in fields(JobSpec)}
    assert all(one["description"] for one in job.values())
    assert {f"retention.{f.name}" for f in fields(SinkWindow)} <= job["overrides"]["properties"].keys()


GOOD = [
    {"prompt": "a", "seconds": "1:30", "out": "-"},
    {"prompts": {"0": "a", "60s": "b"}, "frames": 3},
    {"prompts": ["a", "b"], "lora": "x", "lora_scale": [0.5], "dtype": "float16", "ema": None},
    {"prompts": [{"at": 0, "prompt": "a"}, {"at": "1m", "prompt": "b", "cut": True}]},
    {"overrides": {"retention.sink": 3, "position.scale": "auto"}, "preset": "flex", "encoding": {"fps": 24}},
    {"lora": ["a", "b"], "device": None, "seed": 2**64 - 1},
]
BAD = [
    {"sed": 1}, {"seed": -1}, {"seed": 2**64}, {"frames": 0}, {"frames": 1.5}, {"seconds": 0}, {"dtype": "int8"},
    {"prompt": "a", "prompts": ["b"]}, {"seconds": 1, "frames": 1}, {"out": "a.mp4", "latents": "a.safetensors"},
    {"prompts": [{"at": 0}]}, {"encoding": {"crf": 52}}, {"encoding": {"format": "gif"}}, {"encoding": {"x": 1}},
    {"overrides": {"retention.sink": "many"}, "preset": "flex"}, {"overrides": {"snik": 1}, "preset": "flex"},
]  # fmt: skip


@pytest.mark.parametrize("job", GOOD, ids=json.dumps)
def test_what_the_schema_takes_is_read(job):
    JobSpec.from_dict(job)
    validate(job)


@pytest.mark.parametrize("job", BAD, ids=json.dumps)
def test_what_the_schema_refuses_is_refused(job):
    with pytest.raises(SpecError):
        JobSpec.from_dict(job)
    with pytest.raises(AssertionError):
        validate(job)


def test_the_examples_fit_the_schema():
    for path in DOCS.glob("examples/jobs*.yaml"):
        validate(json.loads(json.dumps(yaml.load(path.read_text(), Loader))))


def test_the_page_shows_the_example():
    example = (DOCS / "examples" / "jobs.yaml").read_text()
    shown = (DOCS / "jobs.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    assert shown == example[example.index("- &scene") :]


def validate(job: object) -> None:
    """Assert that a job fits the schema: by jsonschema where it is installed, else by the parts of it that we use."""
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError:
        assert fits(job, SCHEMA), job
        return
    Draft202012Validator.check_schema(SCHEMA)
    errors = list(Draft202012Validator(SCHEMA).iter_errors(job))
    assert not errors, errors
    assert fits(job, SCHEMA), "the short validator disagrees"


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}


def fits(value: object, schema: dict) -> bool:
    """Whether a value fits a schema of the keywords that ours has; another keyword is a KeyError."""
    return all(CHECKS[word](value, said, schema) for word, said in schema.items() if word not in ABOUT)


def is_kind(value: object, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if kind == "number" else isinstance(value, KINDS[kind])


number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
ABOUT = ("$schema", "title", "description", "default", "$defs")
CHECKS = {
    "$ref": lambda value, said, _: fits(value, SCHEMA["$defs"][said.rpartition("/")[2]]),
    "type": lambda value, said, _: any(is_kind(value, kind) for kind in ([said] if isinstance(said, str) else said)),
    "enum": lambda value, said, _: value in said,
    "anyOf": lambda value, said, _: any(fits(value, one) for one in said),
    "allOf": lambda value, said, _: all(fits(value, one) for one in said),
    "not": lambda value, said, _: not fits(value, said),
    "required": lambda value, said, _: not isinstance(value, dict) or set(said) <= value.keys(),
    "properties": lambda value, said, _: all(fits(value[name], said[name]) for name in said if name in dict_of(value)),
    "additionalProperties": lambda value, said, schema: all(
        said and fits(one, said) for name, one in dict_of(value).items() if name not in schema.get("properties", {})
    ),
    "items": lambda value, said, _: not isinstance(value, list) or all(fits(one, said) for one in value),
    "minItems": lambda value, said, _: not isinstance(value, list) or len(value) >= said,
    "maxItems": lambda value, said, _: not isinstance(value, list) or len(value) <= said,
    "minLength": lambda value, said, _: not isinstance(value, str) or len(value) >= said,
    "minProperties": lambda value, said, _: not isinstance(value, dict) or len(value) >= said,
    "minimum": lambda value, said, _: not number(value) or value >= said,
    "maximum": lambda value, said, _: not number(value) or value <= said,
    "exclusiveMinimum": lambda value, said, _: not number(value) or value > said,
}


def dict_of(value: object) -> dict:
    return value if isinstance(value, dict) else {}
