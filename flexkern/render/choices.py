"""Choices that need neither torch nor the packages of an extra: the model, its preset, its size.

What the command line and a worker share of them, in words of the options of ``flexkern render``.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexkern.checks import require
from flexkern.policies import Preset, get_preset
from flexkern.render.research import Research

DEMO = "demo"  # the model where none is named
PRESET = "flex"
PROMPT = "a red disc and a blue square on dark green, fast"  # of the demo, where none is given
NOT_FOR_DEMO = (
    "vae", "vae_backend", "text_encoder", "tokenizer", "embeddings", "lora", "lora_scale", "ema", "no_ema", "dtype",
    "size", "image", "chunk", "first_chunk", "num_output_frames", "latents", "config_path",
)  # fmt: skip
PATH = "path"


def flag(name: str) -> str:
    """A field of a job as one types it."""
    return f"--{name.replace('_', '-')}"


def is_family(model: str) -> bool:
    """Whether a model is named by a family of checkpoints."""
    if model == DEMO:
        return False
    from flexkern.model.families import FAMILIES

    return model in FAMILIES


def base_preset(name: str | None, model: str, research: Research | None) -> Preset:
    """The preset of that name, else the configuration's or the model's, with what a configuration says of it."""
    if name is None and research is not None:
        name = research.preset
    if name is None and is_family(model):
        from flexkern.model.families import FAMILIES

        name = FAMILIES[model].preset
    return get_preset(name or PRESET).override(research.policies if research else {})


def chosen_model(model: str, config: str | Path | None, weights: str | Path | None) -> str:
    """The model; where only a configuration of a research repository is given, the family that its name tells."""
    if model != DEMO or config is None:
        return model
    from flexkern.model.families import family_of, guess_family

    return guess_family(Path(config).name) or (family_of(weights) if weights else None) or "self-forcing"


def chosen_threads(model: str, usual: int) -> int:
    """CPU threads of torch where nobody names a number.

    One for the demo: its operations are too small to share. Beside two other processes on one core of two threads, one
    thread rendered 128 pictures in 26 to 30 s and two in 63 to 66 s; alone, a chunk of a room took 204 ms with one, 249
    with two (torch 2.13).

    Args:
        model: As ``--model`` has it.
        usual: What torch would take; it stands where OMP_NUM_THREADS says it.
    """
    return usual if is_family(model) or "OMP_NUM_THREADS" in os.environ else 1


def read_size(size: str | None) -> tuple[int, int] | None:
    """Height and width in pixels, None where none is given. Raises ValueError for another form."""
    if size is None:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*(\d+)\s*", size, re.ASCII)
    require(found is not None, f"--size must be HEIGHTxWIDTH in pixels, such as 480x832, got {size!r}")
    assert found is not None
    return int(found[1]), int(found[2])


def validate_for_demo(given: Iterable[str]) -> None:
    """Raises ValueError where something is given, by its name, that the demo has no use for."""
    from flexkern.model.families import FAMILIES

    if useless := [name for name in NOT_FOR_DEMO if name in set(given)]:
        known = f"name what --weights are with --model {' | '.join(FAMILIES)}"
        raise ValueError(f"{flag(useless[0])} is for checkpoints: {known}")


def plain(value: Any) -> Any:
    """An option as JSON takes it; paths from the root, so that it holds wherever the next command is run."""
    if isinstance(value, Path):
        return {PATH: str(value.absolute())}
    return [plain(each) for each in value] if isinstance(value, tuple) else value
