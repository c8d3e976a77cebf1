"""``flexkern render``: a video from the command line. Checks go from cheap to dear, and torch is loaded in between."""

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from flexkern.checks import did_you_mean
from flexkern.cli.errors import refusing
from flexkern.cli.research import Research, read_prompts, read_research
from flexkern.policies import Preset, get_preset
from flexkern.policies.presets import POLICIES

if TYPE_CHECKING:
    from flexkern.cli.sources import Source
    from flexkern.render import PromptSwitch

PROMPT = "a red disc and a blue square on dark green, fast"
PRESET = "flex"
EXCLUSIVE = (
    ("seconds", "frames"), ("seconds", "num_output_frames"), ("frames", "num_output_frames"), ("prompt", "prompts"),
    ("prompt", "data_path"), ("prompts", "data_path"), ("latents", "data_path"), ("ema", "no_ema"),
)  # fmt: skip


def option(metavar: str, *aliases: str) -> Any:
    """An option that may be left out; its help says what then holds."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases or None, help_behavior_hint="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One video: what it shows, in order of time, where it goes, and the seed of its noise."""

    prompts: "tuple[PromptSwitch, ...]"
    target: Path
    seed: int


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
    """demo, which comes with flexkern, or a safetensors file of the same form; for --weights of others how they were
    trained: self-forcing, longlive, causvid, rolling-forcing or wan-diffusers"""
    weights: Annotated[Path | None, option("PATH", "--checkpoint-path")] = None
    """weight file or folder, whatever its layout; VAE and text encoder in the folder, or beside the file, are found"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a folder of diffusers' AutoencoderKLWan, or a tiny decoder (taew2_1)"""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """models_t5_umt5-xxl-enc-bf16.pth, or a folder of transformers' UMT5EncoderModel"""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """folder of the tokenizer, where it is not beside the text encoder"""
    embeddings: Annotated[Path | None, option("FILE")] = None
    """the prompts' embeddings, in place of a text encoder; where the file is not there yet, the encoder's are saved"""
    lora: Annotated[Path | None, option("PATH")] = None
    """LoRA of the transformer, file or folder"""
    lora_scale: float = 1.0
    """times alpha / rank of the LoRA"""
    ema: Annotated[bool, tyro.conf.arg(aliases=["--use-ema"]), tyro.conf.FlagCreatePairsOff] = False
    """insist on the averaged weights, which are taken where there are any"""
    no_ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """take the raw weights"""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, option("NAME")] = None
    """of the transformer; bfloat16"""
    size: Annotated[str | None, option("HEIGHTxWIDTH")] = None
    """of a picture, in pixels; what the checkpoint was trained with"""
    image: Annotated[Path | None, option("FILE")] = None
    """the first picture, for checkpoints whose first chunk is one frame; scaled and cut to the size"""
    chunk: Annotated[int | None, option("INT")] = None
    """latent frames denoised together; what the checkpoint was trained with"""
    first_chunk: Annotated[int | None, option("INT")] = None
    """latent frames of the first chunk, where it differs"""
    config_path: Annotated[Path | None, option("FILE")] = None
    """YAML of a research repository: chunk, steps, shift, window and sink come from there"""
    prompt: Annotated[str | None, option("TEXT")] = None
    """what to show; the demo knows prompts like its default, "a red disc and a blue square on dark green, fast" """
    prompts: Annotated[Path | None, option("FILE")] = None
    """YAML file of prompts by time: a list of {at: seconds, prompt: text, cut: true or false}, or {seconds: prompt}"""
    data_path: Annotated[Path | None, option("FILE")] = None
    """text file of prompts, one a line: a video each, in --output_folder"""
    seconds: Annotated[float | None, option("FLOAT")] = None
    """length of the video, 10 where nothing else says it"""
    frames: Annotated[int | None, option("INT")] = None
    """length of the video in pictures"""
    num_output_frames: Annotated[int | None, option("INT")] = None
    """length of the video in latent frames: the first gives one picture, each later one four"""
    preset: Annotated[str | None, option("NAME")] = None
    """the method, one of those that `flexkern presets` lists: flex, or for longlive and rolling-forcing their own;
    options with a dot show its values, and override them"""
    seed: int = 0
    """of the noise; the same seed gives the same video. Prompt number i of --data_path, from 0, gets seed + i"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("video.mp4")
    """the video, H.264 in MP4; an existing one is replaced"""
    output_folder: Annotated[Path | None, option("FOLDER")] = None
    """where --data_path puts its videos, 0000.mp4 and so on; made where it is not there"""
    latents: Annotated[Path | None, option("FILE")] = None
    """write latents to a safetensors file instead of a video; needs no VAE"""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME")] = "sdpa"
    """of attention, one of those that `flexkern doctor` lists"""
    device: Annotated[str | None, option("NAME")] = None
    """cpu, cuda or cuda:N; the first GPU where there is one"""
    threads: Annotated[int | None, option("INT")] = None
    """CPU threads of torch; as many as torch thinks fit"""
    progress: bool = True
    """show chunk, pictures per second and time left"""

    def run(self) -> int:
        bad = ValueError, OSError, NotImplementedError
        with refusing(*bad):
            self.model = effective_model(self.model, self.config_path, self.weights)
            videos, preset, source = self.prepare()
            opened = self.open(videos[0], preset, source)
        from flexkern.render import render

        for number, video in enumerate(videos):
            if number:
                with refusing(*bad):
                    opened = self.open(video, preset, source)
            session, start, writer = opened
            options = {"pictures": source.pictures, "switches": video.prompts[1:], "progress": self.progress}
            with refusing(OSError, status=1), writer:  # a full disk
                finished = render(session, writer, start=start, **options)
            if not finished:
                kept = f"{video.target} holds the first {writer.pictures}" if writer.pictures else "nothing was written"
                print(f"flexkern: interrupted: {kept} of {source.pictures} pictures", file=sys.stderr)
                return 130
            length = f"{source.pictures} pictures, {source.pictures / source.fps:.1f} s"
            print(f"{video.target}: {f'{writer.frames} latent frames' if self.latents else length}")
            session = opened = None  # one cache at a time
        return 0

    def prepare(self) -> tuple:
        """The videos to make, the preset, and what makes them. Raises what ``run`` refuses."""
        self.check_numbers()
        research = None if self.config_path is None else read_research(self.config_path)
        preset = self.chosen_preset(research)
        videos = self.chosen_videos(preset)
        weights = self.chosen_weights()

        import torch

        from flexkern.cli.sources import checkpoint_source, demo_source, note

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device, torch)
        if self.threads:
            torch.set_num_threads(self.threads)
        if research and research.ignored:
            note(f"{self.config_path}: not used here: {', '.join(research.ignored)}")
        if is_family(self.model):
            prompts = tuple(dict.fromkeys(switch.prompt for video in videos for switch in video.prompts))
            source = checkpoint_source(self, research.family if research else {}, preset, prompts, device)
        else:
            source = demo_source(self, weights, device)
        if self.output_folder is not None:
            self.output_folder.mkdir(parents=True, exist_ok=True)
        return videos, preset, source

    def open(self, video: Video, preset: Preset, source: "Source") -> tuple:
        """Session, what it begins with, and the open file of a video."""
        from flexkern.render import LatentsFile, VideoWriter, check_switches

        first, *later = video.prompts
        session = source.open(first.prompt, preset, video.seed)
        check_switches(session, later)
        start = source.begin(session)
        if self.latents is not None:
            about = {"prompt": first.prompt, "seed": str(video.seed), "preset": preset.name, "model": self.model}
            writer = LatentsFile(video.target, fps=source.fps, per_frame=source.per_frame, about=about)
        else:
            writer = VideoWriter(video.target, source.size[1], source.size[0], source.fps)
        return session, start, writer

    def check_numbers(self) -> None:
        for one, other in EXCLUSIVE:
            if getattr(self, one) not in (None, False) and getattr(self, other) not in (None, False):
                raise ValueError(f"give --{one.replace('_', '-')} or --{other.replace('_', '-')}, not both")
        if self.seconds is not None and not (0 < self.seconds < math.inf):
            raise ValueError(f"--seconds must be more than 0, got {self.seconds:g}")
        for name in ("frames", "threads", "num_output_frames", "chunk", "first_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {self.seed}")

    def chosen_preset(self, research: Research | None) -> Preset:
        base, changes = base_preset(self.preset, self.model, research), {}
        for part in POLICIES:
            given, default = getattr(self, part), getattr(base, part)
            names = [f.name for f in fields(default) if getattr(given, f.name) != getattr(default, f.name)]
            changes |= {f"{part}.{name}": getattr(given, name) for name in names}
        return get_preset(base, changes)

    def chosen_videos(self, preset: Preset) -> tuple[Video, ...]:
        """What to show and where to. Raises where a file cannot be read or written, or a cut cannot be followed."""
        from flexkern.render import PromptSwitch, check_cuts, check_latents_target, check_target, read_schedule

        folder = self.output_folder
        if folder is not None:
            check_folder(folder)
        if self.data_path is not None:
            if folder is None:
                raise ValueError("--data-path makes several videos: give --output-folder as well")
            prompts = [(PromptSwitch(at=0, prompt=prompt),) for prompt in read_prompts(self.data_path)]
            numbered = enumerate(prompts)
            return tuple(Video(prompts=p, target=folder / f"{i:04}.mp4", seed=self.seed + i) for i, p in numbered)
        target = self.latents or (self.out if folder is None else folder / self.out.name)
        if self.latents is not None:
            check_latents_target(target)
        elif folder is None or folder.exists():
            check_target(target)
        if self.prompts is not None:
            schedule = read_schedule(self.prompts)
            check_cuts(preset, schedule)
        elif self.prompt is None and is_family(self.model):
            raise ValueError(f"--model {self.model} needs --prompt TEXT, --prompts FILE or --data-path FILE")
        else:
            schedule = (PromptSwitch(at=0, prompt=PROMPT if self.prompt is None else self.prompt),)
        return (Video(prompts=schedule, target=target, seed=self.seed),)

    def chosen_weights(self) -> Path | None:
        """The file that --model or --weights names, None for the one that comes with flexkern."""
        if self.model == "demo" or is_family(self.model):
            return self.weights
        if self.weights is not None:
            raise ValueError("give --model FILE or --weights FILE, not both")
        if not Path(self.model).exists():
            from flexkern.model.families import FAMILIES

            known = f"expected demo, {', '.join(FAMILIES)} or a safetensors file"
            raise FileNotFoundError(f"there is no model {self.model!r}: {known}{did_you_mean(self.model, FAMILIES)}")
        return Path(self.model)


def check_device(name: str, torch: Any) -> None:
    """Raises ValueError where there is no such device."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(f"there is no device {name!r}: torch {torch.__version__} sees {count} CUDA GPUs")


def check_folder(folder: Path) -> None:
    """Raises ValueError or PermissionError where no file can be written to the folder, which may be made first."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        where = "is not a folder" if there == folder else f"cannot be made in {there.name}"
        raise ValueError(f"--output-folder {folder} {where}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"no permission to write {there}")


def is_family(model: str) -> bool:
    if model == "demo":
        return False
    from flexkern.model.families import FAMILIES

    return model in FAMILIES


def effective_model(model: str, config: Path | None, weights: Path | None) -> str:
    """The model; where only a configuration of a research repository is given, the family that its name tells."""
    if model != "demo" or config is None:
        return model
    from flexkern.model.families import guess_family

    return guess_family(Path(config).name) or guess_family(Path(weights or "").name) or "self-forcing"


def base_preset(name: str | None, model: str, research: Research | None) -> Preset:
    """The preset of that name, else the model's, with what a configuration says of it."""
    if name is None and is_family(model):
        from flexkern.model.families import FAMILIES

        name = FAMILIES[model].preset
    return get_preset(name or PRESET, research.policies if research else None)


def render_command(argv: Sequence[str]) -> type[Render]:
    """``Render`` with the policies of the preset that argv names, as options that override it.

    Raises ValueError for an unknown preset or a configuration that cannot be used, FileNotFoundError for none.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?")
    scan.add_argument("--model", nargs="?", default=Render.model)
    scan.add_argument("--config-path", "--config_path", nargs="?")
    scan.add_argument("--weights", "--checkpoint-path", "--checkpoint_path", nargs="?")
    found, _ = scan.parse_known_args(argv)
    research = read_research(found.config_path) if found.config_path else None
    model = effective_model(found.model or Render.model, found.config_path, found.weights)
    preset = base_preset(found.preset, model, research)
    parts = {part: policy_arguments(getattr(preset, part)) for part in POLICIES}
    entries = [(part, arguments, field(default_factory=arguments)) for part, arguments in parts.items()]
    command = make_dataclass("Render", entries, bases=(Render,), kw_only=True)
    command.__doc__ = Render.__doc__
    return command
