"""From a job to what makes it: the preset, the family, the checkpoint, and how long each video is.

Messages are in words of the options of ``flexkern render``; ``in_fields`` puts them into those of a job. Nothing here
loads weights, and what needs no torch loads none.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.checks import did_you_mean, require
from flexkern.model.intact import require_there
from flexkern.render.choices import DEMO, PROMPT, flag, is_family, plain, read_size
from flexkern.render.research import LENGTHS, Research
from flexkern.render.script import Pace, PromptSwitch, seconds_needed, spread, validate_shown
from flexkern.render.spec import JobSpec

if TYPE_CHECKING:
    from flexkern.model.checkpoint import Checkpoint
    from flexkern.model.families import Family
    from flexkern.model.vae import VaeBackend

SECONDS = 10.0  # of a video whose length is not given; of a prompt in a list of them
LAST = "its last prompt, at {:g} seconds, is shown as long as the one before it"
OTHER_LENGTH = "--seconds, --frames or --num-output-frames sets another length"
SAVED = (  # fields that a render is made of again, beside ema
    "model", "weights", "vae", "text_encoder", "tokenizer", "embeddings", "lora", "lora_scale", "dtype", "config_path",
    "size", "chunk", "first_chunk", "image", "latents", "backend", "threads",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one video shows: prompts with times, or prompts that follow each other, whose times are still to be set."""

    source: str
    """where that is said, for messages"""
    script: tuple[PromptSwitch, ...] = ()
    prompts: tuple[str, ...] = ()


def in_fields(said: str) -> str:
    """A message in words of options, in words of a job's fields."""
    for f in fields(JobSpec):
        said = re.sub(rf"{flag(f.name)}(?![\w-])", f.name, said)
    return said


def loras(spec: JobSpec) -> tuple[tuple[Path, float], ...]:
    """Every LoRA of a job with its factor."""
    return tuple(zip(spec.lora, spec.lora_scale or (1.0,) * len(spec.lora), strict=True))


def chosen_weights(spec: JobSpec) -> Path | None:
    """The file that model or weights name, None for the one that comes with flexkern.

    Raises:
        ValueError: Both do.
        FileNotFoundError: There is no such model.
    """
    if spec.model == DEMO or is_family(spec.model):
        return spec.weights
    if spec.weights is not None:
        raise ValueError("give --model FILE or --weights FILE, not both")
    if not Path(spec.model).exists():
        from flexkern.model.families import FAMILIES

        known = f"expected demo, {', '.join(FAMILIES)} or a safetensors file"
        raise FileNotFoundError(f"there is no model {spec.model!r}: {known}{did_you_mean(spec.model, FAMILIES)}")
    return Path(spec.model)


def validate_inputs(spec: JobSpec) -> None:
    """Raises FileNotFoundError where nothing is at a path that the job names; nothing is opened.

    Embeddings are left out: they may be written.
    """
    named = {"vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer", "image": "image"}
    for name, what in ({"weights": "checkpoint" if is_family(spec.model) else "weights"} | named).items():
        if (path := getattr(spec, name)) is not None:
            require_there(path, what)
    for path in spec.lora:
        require_there(path, "LoRA")


def chosen_family(spec: JobSpec, research: Research | None) -> "Family":
    """The family of a job's model, with what its configuration, its chunks and its size change; or the demo's."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    if not is_family(spec.model):
        return demo.family()
    family = FAMILIES[spec.model]
    given: dict[str, Any] = dict(research.family if research else {})
    first_steps = given.pop("first_steps", None)
    given |= {name: value for name in ("chunk", "first_chunk") if (value := getattr(spec, name)) is not None}
    if (size := read_size(spec.size)) is not None:
        given["size"] = family.latent_size(*size)
    family = family.override(**given)
    if first_steps is None:
        return family
    return replace(family, schedule=replace(family.schedule, first_steps=first_steps))


def chosen_checkpoint(spec: JobSpec, family: "Family", vae_backend: "VaeBackend" = "auto") -> "Checkpoint | None":
    """The checkpoint that a job names, None of the demo. Raises ValueError where it names no weights."""
    if not is_family(spec.model):
        return None
    from flexkern.model.checkpoint import Checkpoint

    if spec.weights is None:
        raise ValueError(f"--model {spec.model} needs --weights PATH, a file or a folder")
    return Checkpoint(
        weights=spec.weights,
        family=family,
        vae=spec.vae,
        vae_backend=vae_backend,
        text_encoder=spec.text_encoder,
        tokenizer=spec.tokenizer,
        embeddings=spec.embeddings,
        lora=loras(spec) or None,
        ema=spec.ema,
        dtype=spec.dtype or "bfloat16",
    )


def timed(
    shown: Shown, spec: JobSpec, family: "Family", research: Research | None
) -> tuple[tuple[PromptSwitch, ...], int, str | None]:
    """The script of a video, its length in pictures, and a note on the length where it follows the prompts.

    Raises ValueError for a length that is not whole chunks, and for a prompt that would never be shown.
    """
    from flexkern.engine import frames_for

    pace = Pace(chunk=family.chunk, first_chunk=family.first_chunk, per_frame=family.pictures_per_frame, fps=family.fps)
    pictures, told = given_pictures(spec, family), None
    switches = research.switches if research is not None and shown.prompts else None
    try:
        if shown.prompts:
            if pictures is None:
                pictures, told = pictures_for(shown.prompts, switches, pace)
            script = spread(shown.prompts, pictures, pace, switches)
        else:
            script = shown.script
            if pictures is None:
                needed = seconds_needed(script)
                pictures = frames_for(max(SECONDS, needed), family.fps)
                told = LAST.format(script[-1].at) if needed > SECONDS else None
        validate_shown(script, pictures, pace)
    except ValueError as error:
        raise ValueError(f"{shown.source}: {error}") from None
    length = f"{pictures / family.fps:g} seconds"
    return script, pictures, told and f"{shown.source}: {length}, so that {told}; {OTHER_LENGTH}"


def pictures_for(prompts: Sequence[str], switches: Sequence[int] | None, pace: Pace) -> tuple[int, str | None]:
    """The length of a video of several prompts where none is given, and why."""
    if switches is None:
        told = f"each of {len(prompts)} prompts is shown for {SECONDS:g} seconds" if len(prompts) > 1 else None
        return round(SECONDS * pace.fps) * len(prompts), told
    frames = 2 * switches[-1] - (0, *switches)[-2]
    return 1 + (frames - 1) * pace.per_frame, LAST.format((1 + (switches[-1] - 1) * pace.per_frame) / pace.fps)


def given_pictures(spec: JobSpec, family: "Family") -> int | None:
    """Length of the video in pictures, None where the job does not say it."""
    from flexkern.engine import frames_for

    if spec.num_output_frames is not None:
        family.validate_frames(spec.num_output_frames)
        return family.pictures(spec.num_output_frames)
    return spec.frames or (None if spec.seconds is None else frames_for(spec.seconds, family.fps))


def with_stand_ins(spec: JobSpec, research: Research) -> JobSpec:
    """The job with what its configuration says in place of fields that it leaves out; those of other videos are not.

    Raises:
        FileNotFoundError: A file that the configuration names is not there.
        ValueError: The job scales several LoRAs, and the configuration names one.
    """
    known = {f.name: f.default for f in fields(JobSpec)}
    given = lambda name: name == "seed" or (name in known and getattr(spec, name) != known[name])
    if spec.ema is not None:
        given_before = given
        given = lambda name: name in ("ema", "no_ema") or given_before(name)
    said: dict[str, Any] = {}
    for name, value in research.stand_ins(given).items():
        if name == "lora":
            require(len(spec.lora_scale) <= 1, f"--lora-scale: {research.path} names one LoRA")
            scale = (*spec.lora_scale, 1.0)[0] * research.lora_scale
            said |= {"lora": (value,), "lora_scale": (scale,)}
        elif name in ("ema", "no_ema"):
            said["ema"] = name == "ema"
        elif name in known:
            said[name] = value
    if any(getattr(spec, name) for name in LENGTHS):
        said = {name: value for name, value in said.items() if name not in LENGTHS}
    return replace(spec, **said)


def saved_options(spec: JobSpec) -> dict[str, Any]:
    """What a job says of what makes it, as the options that ``flexkern render --resume`` reads from a record."""
    saved = {name: plain(value) for name in SAVED if (value := getattr(spec, name)) not in (None, ())}
    return saved | ({} if spec.ema is None else {"ema" if spec.ema else "no_ema": True})


def sharing_key(spec: JobSpec) -> str:
    """Equal for jobs that one engine does for, as far as their fields tell."""
    said = {**saved_options(spec), "latents": spec.latents is not None, "device": spec.device}
    return json.dumps(said, sort_keys=True)


def shown_of(spec: JobSpec) -> Shown:
    """What the video shows. Raises ValueError where a checkpoint gets no prompt."""
    if spec.prompts:
        return Shown(source="prompts", script=spec.script, prompts=spec.texts)
    if spec.prompt is None and is_family(spec.model):
        raise ValueError(f"model {spec.model} needs prompt or prompts")
    prompt = PROMPT if spec.prompt is None else spec.prompt
    return Shown(source="prompt", script=(PromptSwitch(at=0, prompt=prompt),))


def given_of(spec: JobSpec) -> list[str]:
    """The fields that are said."""
    return [name for name in JobSpec.__slots__ if getattr(spec, name) not in (None, ())]


def inputs_of(spec: JobSpec) -> dict[str, Path]:
    """The files that are read, by their fields."""
    names = ("weights", "vae", "text_encoder", "embeddings", "image", "config_path")
    found = {name: path for name in names if (path := getattr(spec, name))}
    if Path(spec.model).is_file():
        found["model"] = Path(spec.model)
    return found | {f"lora ({path.name})": path for path in spec.lora}
