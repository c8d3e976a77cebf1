"""The research repositories' configuration files, as what they mean here.

    num_frame_per_block      chunk, and the first chunk      local_attn_size     retention.window; -1: the preset's
    independent_first_frame  first chunk of 1 frame          sink_size           retention.sink
    denoising_step_list      steps of the schedule           global_sink         switch.keep_sink
    warp_denoising_step      warp of the schedule            timestep_shift      shift of the schedule
    context_noise            context timestep of the schedule

``model_kwargs`` may hold them as well, and then wins. What a file does not name stays the family's and the preset's.
Source: configs/ of Self-Forcing, LongLive, CausVid and Rolling Forcing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILY = {  # key: field of Family or Schedule
    "num_frame_per_block": "chunk",
    "denoising_step_list": "steps",
    "warp_denoising_step": "warp",
    "timestep_shift": "shift",
    "context_noise": "context_timestep",
}
POLICY = {"local_attn_size": "retention.window", "sink_size": "retention.sink", "global_sink": "switch.keep_sink"}
FORMS = {  # key: what it must be
    "num_frame_per_block": (int, "a whole number"),
    "local_attn_size": (int, "a whole number"),
    "sink_size": (int, "a whole number"),
    "denoising_step_list": (list, "a list of numbers"),
    "warp_denoising_step": (bool, "true or false"),
    "independent_first_frame": (bool, "true or false"),
    "global_sink": (bool, "true or false"),
    "timestep_shift": (int | float, "a number"),
    "context_noise": (int | float, "a number"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Research:
    """What a configuration changes. family: fields of ``Family`` and ``Schedule``. policies: dotted names of a preset.

    ignored: keys of the file that say nothing here.
    """

    family: Mapping[str, Any]
    policies: Mapping[str, Any]
    ignored: tuple[str, ...]


def read_research(path: str | Path) -> Research:
    """The configuration of a YAML file. Raises FileNotFoundError, or ValueError that names the file and the key."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    nested = content.pop("model_kwargs", None) or {}
    said = content | (nested if isinstance(nested, dict) else {})
    for key in FORMS.keys() & said.keys():
        kind, words = FORMS[key]
        if not isinstance(said[key], kind) or (isinstance(said[key], bool) and kind is not bool):
            raise ValueError(f"{path}: {key} must be {words}, got {said[key]!r}")
    family = {ours: said[key] for key, ours in FAMILY.items() if key in said}
    if "steps" in family:
        if not all(isinstance(step, int | float) for step in family["steps"]):
            raise ValueError(f"{path}: denoising_step_list must be a list of numbers, got {family['steps']!r}")
        family["steps"] = tuple(family["steps"])
    if said.get("independent_first_frame"):
        family["first_chunk"] = 1
    policies = {ours: said[key] for key, ours in POLICY.items() if key in said}
    if policies.get("retention.window") == -1:  # all frames of the training length, which the preset knows
        del policies["retention.window"]
    return Research(family=family, policies=policies, ignored=tuple(sorted(map(str, said.keys() - FORMS.keys()))))


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are skipped. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text: expected one prompt a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt: expected one a line")
    return prompts
