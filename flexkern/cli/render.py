"""``flexkern render``: a video from the command line. Checks go from cheap to dear, and torch is loaded in between."""

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from flexkern.cli.errors import refusing
from flexkern.policies import Preset
from flexkern.policies import preset as named_preset
from flexkern.policies.presets import POLICIES

PROMPT = "a red disc and a blue square on dark green, fast"
SECONDS = 10.0


def option(metavar: str) -> Any:
    """An option that may be left out; its help says what then holds."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def policy_help(policy: type) -> dict[str, str]:
    """What a policy's docstring says of each field: ``name: text`` or ``one, two: text``, to the next such name."""
    names = "|".join(f.name for f in fields(policy))
    text = textwrap.dedent(f"{' ' * 4}{policy.__doc__}")
    found = re.split(rf"(?:^|(?<=\. ))((?:{names})(?:, (?:{names}))*): ", text, flags=re.MULTILINE)
    tidy = lambda told: " ".join(told.replace("``", "").split()).removesuffix(".")
    pairs = zip(found[1::2], found[2::2], strict=True)
    return {name: tidy(told) for group, told in pairs for name in group.split(", ")}


def policy_arguments(policy: Any) -> type:
    """A dataclass with the fields of a policy, its values as defaults, that tyro makes options of."""
    hints, told = get_type_hints(type(policy)), policy_help(type(policy))
    typed = lambda name: Annotated[hints[name], tyro.conf.arg(help=told.get(name))]
    entries = [(f.name, typed(f.name), field(default=getattr(policy, f.name))) for f in fields(policy)]
    return make_dataclass(type(policy).__name__, entries, kw_only=True)


@dataclass(kw_only=True)
class Render:
    """Render a video of any length; pictures reach the file as they are made, and Ctrl-C leaves a playable one."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "demo"
    """demo, which comes with flexkern, or a safetensors file of the same form"""
    weights: Annotated[Path | None, option("FILE")] = None
    """the same as --model FILE"""
    prompt: Annotated[str | None, option("TEXT")] = None
    """what to show; the demo knows prompts like its default, "a red disc and a blue square on dark green, fast" """
    prompts: Annotated[Path | None, option("FILE")] = None
    """YAML file of prompts by time: a list of {at: seconds, prompt: text, cut: true or false}, or {seconds: prompt}"""
    seconds: Annotated[float | None, option("FLOAT")] = None
    """length of the video, 10 where --frames is not given either"""
    frames: Annotated[int | None, option("INT")] = None
    """length of the video in pictures"""
    preset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "flex"
    """the method, one of those that `flexkern presets` lists; options with a dot show its values, and override them"""
    seed: int = 0
    """of the noise; the same seed gives the same video"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("video.mp4")
    """the video, H.264 in MP4; an existing one is replaced"""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME")] = "sdpa"
    """of attention, one of those that `flexkern doctor` lists"""
    device: Annotated[str | None, option("NAME")] = None
    """cpu, cuda or cuda:N; the first GPU where there is one"""
    threads: Annotated[int | None, option("INT")] = None
    """CPU threads of torch; as many as torch thinks fit"""
    progress: bool = True
    """show chunk, pictures per second and time left"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError):
            session, switches, pictures, writer = self.prepare()
        from flexkern.render import render

        with refusing(OSError, status=1), writer:  # a full disk
            finished = render(session, writer, pictures=pictures, switches=switches, progress=self.progress)
        if finished:
            print(f"{self.out}: {pictures} pictures, {pictures / writer.fps:.1f} s")
            return 0
        kept = f"{self.out} holds the first {writer.pictures}" if writer.pictures else "nothing was written"
        print(f"flexkern: interrupted: {kept} of {pictures} pictures", file=sys.stderr)
        return 130

    def prepare(self) -> tuple:
        """Session, later prompts, number of pictures and the open file. Raises what ``run`` refuses."""
        self.check_numbers()
        preset = self.chosen_preset()
        from flexkern.render import VideoWriter, check_switches, check_target, read_schedule

        check_target(self.out)
        schedule = read_schedule(self.prompts) if self.prompts else ()
        weights = self.chosen_weights()

        import torch

        from flexkern.demo import FPS, WEIGHTS, ZOOM, load_engine, world
        from flexkern.engine import frames_for

        check_form(weights or WEIGHTS, world)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device, torch)
        if self.threads:
            torch.set_num_threads(self.threads)
        pictures = self.frames or frames_for(SECONDS if self.seconds is None else self.seconds, FPS)
        engine = load_engine(weights or WEIGHTS, backend=self.backend, device=device)
        first = schedule[0].prompt if schedule else PROMPT if self.prompt is None else self.prompt
        session = engine.session(first, preset=preset, seed=self.seed, frames=pictures)
        check_switches(session, schedule[1:])
        side = world.SIZE * ZOOM
        return session, schedule[1:], pictures, VideoWriter(self.out, side, side, FPS)

    def check_numbers(self) -> None:
        for one, other in (("seconds", "frames"), ("prompt", "prompts")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"give --{one} or --{other}, not both")
        if self.seconds is not None and not (0 < self.seconds < math.inf):
            raise ValueError(f"--seconds must be more than 0, got {self.seconds:g}")
        for name in ("frames", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")

    def chosen_preset(self) -> Preset:
        base, changes = named_preset(self.preset), {}
        for part in POLICIES:
            given, default = getattr(self, part), getattr(base, part)
            names = [f.name for f in fields(default) if getattr(given, f.name) != getattr(default, f.name)]
            changes |= {f"{part}.{name}": getattr(given, name) for name in names}
        return named_preset(base, changes)

    def chosen_weights(self) -> Path | None:
        """The file that --model or --weights names, None for the one that comes with flexkern."""
        if self.model == "demo":
            return self.weights
        if self.weights is not None:
            raise ValueError("give --model FILE or --weights FILE, not both")
        if not Path(self.model).exists():
            raise FileNotFoundError(f"there is no model {self.model!r}: expected demo or a safetensors file")
        return Path(self.model)


def check_form(weights: Path, world: Any) -> None:
    """Raises FileNotFoundError or ValueError where the file's header is not that of a model of the demo's form."""
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        raise FileNotFoundError(f"there are no weights at {weights}")
    try:
        with safe_open(weights, framework="numpy") as file:
            config = json.loads((file.metadata() or {}).get("flexkern_config", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}") from None
    needed = {"in_dim": 3, "out_dim": 3, "text_len": world.TEXT_LEN, "text_dim": world.TEXT_DIM}
    if any(config.get(name) != value for name, value in needed.items()):
        form = f"pixels in, pixels out, its text encoder, all said in the metadata entry flexkern_config ({needed})"
        raise ValueError(f"{weights} is not of the demo's form, the only one this command renders: {form}")


def check_device(name: str, torch: Any) -> None:
    """Raises ValueError where there is no such device."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(f"there is no device {name!r}: torch {torch.__version__} sees {count} CUDA GPUs")


def render_command(argv: Sequence[str]) -> type[Render]:
    """``Render`` with the policies of the preset that argv names, as options that override it.

    Raises ValueError for an unknown preset.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?", default=Render.preset)
    preset = named_preset(scan.parse_known_args(argv)[0].preset or Render.preset)
    parts = {part: policy_arguments(getattr(preset, part)) for part in POLICIES}
    entries = [(part, arguments, field(default_factory=arguments)) for part, arguments in parts.items()]
    command = make_dataclass("Render", entries, bases=(Render,), kw_only=True)
    command.__doc__ = Render.__doc__
    return command
