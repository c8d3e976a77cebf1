"""Options of ``flexkern render`` that show and override the policies of a preset."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from flexkern.checks import field_docs
from flexkern.cli.argv import spellings
from flexkern.policies import Preset, get_preset, idle_fields
from flexkern.policies.presets import POLICIES
from flexkern.render.choices import DEMO, base_preset, chosen_model, flag
from flexkern.render.research import Research, read_research

ABOUT = {  # what stands above the options of a policy
    "position": "Where in time every frame sits. The model counts time in bands, each of which turns at a speed of its "
    "own. r_j: turns of band j in train_len frames. s: how many times longer than training the video is. g, g_j: the "
    "share of band j that stays as trained; the rest is slowed by s. T: number of bands. flexkern presets NAME says in "
    "words what a preset does.",
    "retention": "Which frames stay visible, counted in latent frames: four pictures each.",
    "noise": "What a frame is denoised from. eps_t: noise of frame t alone. eta: noise that all frames share. rho, w, "
    "a: how much of it is shared. F: frames of a chunk.",
    "switch": "What a new prompt does to the frames that are remembered.",
}


def policy_arguments(policy: Any, about: str) -> type:
    """A dataclass with the fields of a policy, its values as defaults, that tyro makes options of.

    about: what stands above them. Values are checked where the preset is made, so that what is wrong is told in one
    line.
    """
    hints, docs = get_type_hints(type(policy)), field_docs(type(policy))
    typed = {name: Annotated[hint, tyro.conf.arg(help=docs.get(name))] for name, hint in hints.items()}
    entries = [(f.name, typed[f.name], field(default=getattr(policy, f.name))) for f in fields(policy)]
    made = make_dataclass(type(policy).__name__, entries, kw_only=True)
    made.__doc__ = about
    return made


def with_policies(command: type, argv: Sequence[str]) -> type:
    """The command with the policies of the preset that argv names, as options that override it.

    Raises ValueError for an unknown preset or a configuration that cannot be used, FileNotFoundError for none.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?")
    scan.add_argument("--model", nargs="?", default=DEMO)
    scan.add_argument("--config-path", "--config_path", nargs="?")
    folders = "--checkpoint-folder", "--checkpoint_folder"
    scan.add_argument("--weights", "--checkpoint-path", "--checkpoint_path", *folders, nargs="?")
    found, _ = scan.parse_known_args(argv)
    research = read_research(found.config_path) if found.config_path else None
    weights = found.weights or (research.flags.get("weights") if research else None)
    preset = base_preset(found.preset, chosen_model(found.model or DEMO, found.config_path, weights), research)
    made = {name: policy_arguments(getattr(preset, name), ABOUT[name]) for name in POLICIES}
    entries = [(name, arguments, field(default_factory=arguments)) for name, arguments in made.items()]
    extended = make_dataclass(command.__name__, entries, bases=(command,), kw_only=True)
    extended.__doc__ = command.__doc__
    extended.named = named_fields(extended, argv)  # type: ignore[attr-defined]
    return extended


def named_fields(command: type, argv: Sequence[str]) -> frozenset[str]:
    """The fields of a command that argv gives, those of policies with a dot."""
    known = spellings(command) | {"--lora": "--lora", "--lora-scale": "--lora-scale"}
    options = (known.get(word.partition("=")[0].replace("_", "-")) for word in argv)
    return frozenset(option.removeprefix("--").replace("-", "_") for option in options if option)


def chosen_overrides(
    given: Any, base: Preset, research: Research | None, job: Mapping[str, object] | None = None
) -> dict[str, object]:
    """What the configuration, the job and the options say of the preset, by dotted name.

    given: the command with its policies. base: the preset with what the configuration says of it. job: the overrides
    of a job, where there is one.
    """
    overrides = dict(research.policies if research else {})
    if job is not None:
        told = {name: getattr(getattr(given, name.partition(".")[0]), name.partition(".")[2])
                for name in sorted(given.named) if "." in name}  # fmt: skip
        return overrides | dict(job) | told
    for name in POLICIES:
        told, default = getattr(given, name), getattr(base, name)
        changed = [f.name for f in fields(default) if getattr(told, f.name) != getattr(default, f.name)]
        overrides |= {f"{name}.{one}": getattr(told, one) for one in changed}
    return overrides


def without_effect(preset: Preset, overrides: Mapping[str, object], research: Research | None) -> str | None:
    """A note on what was said of a preset that changes no video, None where everything does.

    Args:
        preset: The method, with these overrides.
        overrides: As ``chosen_overrides`` gives them.
        research: Whose keys are told as they stand in the file.
    """
    plain = get_preset(preset.name)
    named = []
    for name in idle_fields(preset):
        policy, _, field_name = name.partition(".")
        if name not in overrides or overrides[name] == getattr(getattr(plain, policy), field_name):
            continue
        from_file = research is not None and name in research.policies and research.policies[name] == overrides[name]
        named.append(research.key(name) if research is not None and from_file else flag(name))
    return f"without effect in {preset.name}: {', '.join(named)}; see flexkern presets {preset.name}" if named else None
