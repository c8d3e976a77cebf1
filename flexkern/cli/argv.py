"""The words of a command line before they are parsed: nothing that was typed may be dropped.

A parser keeps the last of an option that comes twice. Here it is refused, in every spelling: aliases, underscores,
``--flag=value``, and the two words of a pair (``--progress`` and ``--no-progress``). Options of other programs that
people bring along get a sentence.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_origin, get_type_hints

import tyro

from flexkern.checks import is_unicode

TEXT_ONLY = "videos are made from text, not from a video"
GUIDANCE = "the models that this runs are distilled, and take no guidance"
STEPS = "the steps are those of --model, or denoising_step_list in the file of --config-path"
ROLLOUTS = "a video goes on without rollouts: give its length with --seconds, --frames or --num-output-frames"
FRAMES = "--frames counts pictures, --num-output-frames latent frames"
SIZE = "give --size HEIGHTxWIDTH in place of --height and --width"
FOREIGN = {  # options of other programs: what to do here
    "--height": SIZE,
    "--width": SIZE,
    "--video-path": TEXT_ONLY,
    "--noise-scale": TEXT_ONLY,
    "--num-frames": FRAMES,
    "--frame-num": FRAMES,
    "--num-rollout": ROLLOUTS,
    "--num-overlap-frames": ROLLOUTS,
    "--step": STEPS,
    "--num-inference-steps": STEPS,
    "--sample-steps": STEPS,
    "--denoising-step-list": STEPS,
    "--sample-shift": "the shift is that of --model, or timestep_shift in the file of --config-path",
    "--sample-solver": "a few-step model needs no solver",
    "--guidance-scale": GUIDANCE,
    "--sample-guide-scale": GUIDANCE,
    "--cfg-scale": GUIDANCE,
    "--negative-prompt": GUIDANCE,
    "--base-seed": "give --seed",
    "--save-file": "give --out",
    "--output": "give --out FILE, or --output-folder FOLDER",
    "--ckpt-dir": "give --weights",
    "--checkpoint": "give --weights",
    "--task": "give --model",
    "--model-type": "give --model",
    "--local-attn-size": "give --retention.window",
    "--sink-size": "give --retention.sink",
    "--num-frame-per-block": "give --chunk",
}


def validate_words(command: type, words: Sequence[str]) -> None:
    """Raises ValueError for an option that comes twice and cannot, or one of another program.

    Args:
        command: A dataclass that tyro makes options of.
        words: What follows its name on the command line.
    """
    known, seen = spellings(command), dict[str, str]()
    for word in words:
        given = word.partition("=")[0]
        spelled = given.replace("_", "-")
        if spelled in FOREIGN and spelled not in known and "--config-path" in known:
            raise ValueError(f"{given}: {FOREIGN[spelled]}")
        if (option := known.get(spelled)) is None:
            continue
        if option in seen:
            also = f", as {seen[option]} and {given}" if seen[option] != given else ""
            raise ValueError(f"{option} is given twice{also}: give it once")
        seen[option] = given


def as_text(word: str, name: str = "--prompt") -> str:
    """A word as it was typed, whatever the locale makes of its bytes. Raises ValueError where they are not UTF-8."""
    if is_unicode(word):
        return word
    try:
        return os.fsencode(word).decode("utf-8")  # a locale of ASCII keeps the bytes that it does not know
    except UnicodeError:
        raise ValueError(f"{name} must be text in UTF-8, got {os.fsencode(word)!r}") from None


def with_values(command: type, words: Sequence[str]) -> list[str]:
    """The words, but that a value which begins with a dash stands behind its option's ``=``, as the parser wants it.

    Raises ValueError where what follows an option may be its value, or another option and the value be missing.

    Args:
        command: A dataclass that tyro makes options of.
        words: What follows its name on the command line.
    """
    options = {spelled: one for one in _options(command) for spelled in one.spelled}
    end = words.index("--") if "--" in words else len(words)
    made: list[str] = []
    for word in words[:end]:
        before = options.get(made[-1].replace("_", "-")) if made else None
        if before is None or not before.takes_one or word in ("-", "-h") or not word.startswith("-"):
            made.append(word)
        elif word.startswith("--") and not any(map(str.isspace, word)):
            raise ValueError(f"{made[-1]} lacks its value; if it is {word}, write {made[-1]}={shlex.quote(word)}")
        else:
            made[-1] += f"={word}"
    return [*made, *words[end:]]


def spellings(command: type) -> dict[str, str]:
    """Every way to write the options of a command that come once at most: spelling to option, both with hyphens."""
    return {spelled: one.name for one in _options(command) if not one.repeats for spelled in one.spelled}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """An option of a command, with hyphens."""

    name: str
    spelled: Sequence[str]
    """every way to write it"""
    takes_one: bool
    """whether exactly one word follows it"""
    repeats: bool
    """whether it may come twice"""


def _options(command: type, prefix: str = "--") -> Iterator[_Option]:
    hints = get_type_hints(command, include_extras=True)
    for field in fields(command):
        hint, name = hints[field.name], field.name.replace("_", "-")
        markers = getattr(hint, "__metadata__", ())
        bare = getattr(hint, "__origin__", hint) if markers else hint
        if is_dataclass(bare) and isinstance(bare, type):
            yield from _options(bare, f"{prefix}{name}.")
            continue
        if tyro.conf.Positional in markers:
            continue
        option, repeats = f"{prefix}{name}", tyro.conf.UseAppendAction in markers
        spelled = [option, *_aliases(markers)]
        if bare is bool and tyro.conf.FlagCreatePairsOff not in markers:
            spelled.append(f"{prefix}no-{name}")
        takes_one = bare is not bool and (repeats or get_origin(bare) not in (tuple, list))
        yield _Option(name=option, spelled=spelled, takes_one=takes_one, repeats=repeats)


def _aliases(markers: Sequence[Any]) -> list[str]:
    """The other names that markers of an annotation give."""
    return [alias.replace("_", "-") for marker in markers for alias in getattr(marker, "aliases", None) or ()]
