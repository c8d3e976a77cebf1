"""``flexkern render``: flags become a checkpoint and orders.

Checks go from cheap to dear, and torch is loaded in between, so that most mistakes are told at once.
"""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flexkern.checks import did_you_mean
from flexkern.cli.errors import note, refuse, refusing, translated
from flexkern.cli.policies import DEMO, base_preset, chosen_model, chosen_overrides, is_family
from flexkern.cli.research import Research, read_prompts, read_research
from flexkern.policies import Preset, get_preset

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.checkpoint import Checkpoint
    from flexkern.model.families import Family
    from flexkern.render import Order, PromptSwitch

PROMPT = "a red disc and a blue square on dark green, fast"
SECONDS = 10.0
EXCLUSIVE = (
    ("seconds", "frames"), ("seconds", "num_output_frames"), ("frames", "num_output_frames"), ("prompt", "prompts"),
    ("prompt", "data_path"), ("prompts", "data_path"), ("latents", "data_path"), ("ema", "no_ema"),
)  # fmt: skip
NOT_FOR_DEMO = (
    "vae", "text_encoder", "tokenizer", "embeddings", "lora", "ema", "no_ema", "dtype", "size", "image", "chunk",
    "first_chunk", "num_output_frames", "latents",
)  # fmt: skip


def option(metavar: str, *aliases: str) -> Any:
    """An option that may be left out; its help says what then holds."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases or None, help_behavior_hint="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """What flags say of one video: what it shows, in order of time, where it goes, and the seed of its noise."""

    script: "tuple[PromptSwitch, ...]"
    target: Path
    seed: int


@dataclass(kw_only=True)
class Render:
    """Render a video of any length; pictures reach the file as they are made, and Ctrl-C leaves a playable one."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = DEMO
    """demo, a file of its form, or for --weights: self-forcing, longlive, causvid, rolling-forcing, wan-diffusers"""
    weights: Annotated[Path | None, option("PATH", "--checkpoint-path")] = None
    """weight file or folder, in any published layout; a VAE and a text encoder beside the weights are found"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a diffusers vae folder, or a tiny decoder (taew2_1); default: the one beside the weights"""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of UMT5; default: the one beside the weights"""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """folder of the tokenizer; default: the one beside the text encoder"""
    embeddings: Annotated[Path | None, option("FILE")] = None
    """file of the prompts' embeddings, used instead of a text encoder; written if it does not exist yet"""
    lora: Annotated[Path | None, option("PATH")] = None
    """LoRA to add to the transformer, a file or a folder"""
    lora_scale: float = 1.0
    """factor on the LoRA's own scale, which is alpha / rank"""
    ema: Annotated[bool, tyro.conf.arg(aliases=["--use-ema"]), tyro.conf.FlagCreatePairsOff] = False
    """require the averaged (EMA) weights; without this they are used if the checkpoint has any"""
    no_ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """use the raw weights even if the checkpoint has averaged ones"""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, option("NAME")] = None
    """dtype of the transformer's weights: bfloat16, float16 or float32; default: bfloat16"""
    size: Annotated[str | None, option("HEIGHTxWIDTH")] = None
    """size of the pictures in pixels; default: as the checkpoint was trained"""
    image: Annotated[Path | None, option("FILE")] = None
    """picture to begin with, scaled and cropped; only for checkpoints whose first chunk is one latent frame"""
    chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames denoised together; default: as the checkpoint was trained"""
    first_chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames in the first chunk; default: as in the others"""
    config_path: Annotated[Path | None, option("FILE")] = None
    """YAML configuration of a research repository, which sets chunk, steps, shift, window and sink"""
    prompt: Annotated[str | None, option("TEXT")] = None
    """what the video shows; default, for the demo only: "a red disc and a blue square on dark green, fast" """
    prompts: Annotated[Path | None, option("FILE")] = None
    """YAML file of prompts over time: [{at: seconds, prompt: text, cut: true or false}], or {seconds: prompt}"""
    data_path: Annotated[Path | None, option("FILE")] = None
    """text file of prompts, one a line; each becomes a video in --output-folder"""
    seconds: Annotated[float | None, option("FLOAT")] = None
    """length of the video in seconds; default: 10"""
    frames: Annotated[int | None, option("INT")] = None
    """length of the video in pictures"""
    num_output_frames: Annotated[int | None, option("INT")] = None
    """length of the video in latent frames: the first gives one picture, each later one four"""
    preset: Annotated[str | None, option("NAME")] = None
    """method of horizon extension, see `flexkern presets`; default: flex, or the one that --model brings"""
    seed: int = 0
    """seed of the noise; equal seeds give equal videos. Prompt i of --data-path, from 0, gets seed + i"""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("video.mp4")
    """file to write, H.264 in MP4; an existing file is replaced"""
    output_folder: Annotated[Path | None, option("FOLDER")] = None
    """folder to write to, created if needed; the videos of --data-path are called 0000.mp4 and so on"""
    latents: Annotated[Path | None, option("FILE")] = None
    """write latents to this safetensors file instead of a video; needs no VAE"""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME")] = "sdpa"
    """implementation of attention, one of those that `flexkern doctor` lists"""
    device: Annotated[str | None, option("NAME")] = None
    """cpu, cuda or cuda:N; default: the first GPU, or the CPU if there is none"""
    threads: Annotated[int | None, option("INT")] = None
    """number of CPU threads that torch uses; default: torch's own choice"""
    progress: bool = True
    """show the chunk, pictures per second and the time left"""

    def run(self) -> int:
        bad = ValueError, OSError, NotImplementedError
        with refusing(*bad):
            self.model = chosen_model(self.model, self.config_path, self.weights)
            orders, engine, family = self.begin()
            from flexkern.finite import NotFiniteError
            from flexkern.render import prepare, stoppable

            job = prepare(orders[0], engine, family)
        for number, order in enumerate(orders):
            if number:
                with refusing(*bad):
                    job = prepare(order, engine, family)
            try:
                with stoppable() as signals:
                    finished = job.run(progress=self.progress)
            except (OSError, NotFiniteError) as error:  # a full disk, weights that overflow
                refuse(f"{error}; {job.kept}", status=1)
            made = job.writer.pictures
            if not finished:
                note(f"interrupted: {job.kept}")
                return 128 + (signals[0] if signals else signal.SIGINT)
            length = f"{order.pictures} pictures, {order.pictures / family.fps:.1f} s"
            print(f"{order.target}: {length if self.latents is None else f'{family.frames(made)} latent frames'}")
            del job  # one cache at a time
        return 0

    def begin(self) -> "tuple[tuple[Order, ...], Engine, Family]":
        """What to make, and what makes it. Raises what ``run`` refuses."""
        self.validate_numbers()
        research = None if self.config_path is None else read_research(self.config_path)
        base = base_preset(self.preset, self.model, research)
        overrides = chosen_overrides(self, base, research)
        videos = tuple(self.chosen_videos(get_preset(base.name, overrides)))
        weights = self.chosen_weights()

        import torch

        from flexkern.pipeline import validate_device
        from flexkern.render import Order, validate_encoder

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        validate_device(device, "--device")
        if self.threads:
            torch.set_num_threads(self.threads)
        if research and research.ignored:
            note(f"{self.config_path}: not used here: {', '.join(research.ignored)}")
        family = self.chosen_family(research)
        orders = tuple(
            Order(
                script=video.script,
                pictures=self.chosen_pictures(family),
                target=video.target,
                preset=base.name,
                overrides=overrides,
                seed=video.seed,
                writes="video" if self.latents is None else "latents",
                image=self.image,
            )
            for video in videos
        )
        if self.latents is None:
            validate_encoder(*reversed(family.picture_size), family.fps)
        if is_family(self.model):
            engine = self.open_checkpoint(orders, family, device)
        else:
            engine = open_demo(weights, self.backend, device)
        if self.output_folder is not None:
            self.output_folder.mkdir(parents=True, exist_ok=True)
        return orders, engine, family

    def open_checkpoint(self, orders: "Sequence[Order]", family: "Family", device: str) -> "Engine":
        """The engine of the checkpoint that the flags name, checked for these orders before weights are read."""
        from flexkern.engine import Engine
        from flexkern.pipeline import MissingPart, check

        checkpoint = self.chosen_checkpoint(family)
        prompts = tuple(dict.fromkeys(prompt for order in orders for prompt in order.prompts))
        try:
            parts = check(
                checkpoint,
                prompts=prompts,
                preset=orders[0].method,
                frames=family.frames(orders[0].pictures),
                image=self.image,
                pixels=self.latents is None,
                backend=self.backend,
                device=device,
            )
        except MissingPart as error:
            raise ValueError(translated(error.part, error.why)) from None
        for line in (str(parts), *parts.notes):
            note(line)
        engine = Engine.from_parts(parts)
        if parts.saves_embeddings:
            note(f"{parts.embeddings}: embeddings of {len(prompts)} prompts")
        return engine

    def validate_numbers(self) -> None:
        """Raises ValueError for a number that is out of range, or flags that exclude each other."""
        for one, other in EXCLUSIVE:
            if getattr(self, one) not in (None, False) and getattr(self, other) not in (None, False):
                raise ValueError(f"give {flag(one)} or {flag(other)}, not both")
        if self.seconds is not None and not (0 < self.seconds < math.inf):
            raise ValueError(f"--seconds must be more than 0, got {self.seconds:g}")
        for name in ("frames", "threads", "num_output_frames", "chunk", "first_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {self.seed}")

    def chosen_videos(self, preset: Preset) -> Iterator[Video]:
        """What to show and where to. Raises where a file cannot be read or written, or a cut cannot be followed."""
        from flexkern.render import PromptSwitch, read_script, validate_cuts, validate_latents_target, validate_target

        folder = self.output_folder
        if folder is not None:
            validate_folder(folder)
        if self.data_path is not None:
            if folder is None:
                raise ValueError("--data-path makes several videos: give --output-folder as well")
            for i, prompt in enumerate(read_prompts(self.data_path)):
                only = (PromptSwitch(at=0, prompt=prompt),)
                yield Video(script=only, target=folder / f"{i:04}.mp4", seed=self.seed + i)
            return
        target = self.latents or (self.out if folder is None else folder / self.out.name)
        if self.latents is not None:
            validate_latents_target(target)
        elif folder is None or folder.exists():
            validate_target(target)
        if self.prompts is not None:
            script = read_script(self.prompts)
            validate_cuts(preset, script)
        elif self.prompt is None and is_family(self.model):
            raise ValueError(f"--model {self.model} needs --prompt TEXT, --prompts FILE or --data-path FILE")
        else:
            script = (PromptSwitch(at=0, prompt=PROMPT if self.prompt is None else self.prompt),)
        yield Video(script=script, target=target, seed=self.seed)

    def chosen_weights(self) -> Path | None:
        """The file that --model or --weights names, None for the one that comes with flexkern."""
        if self.model == DEMO or is_family(self.model):
            return self.weights
        if self.weights is not None:
            raise ValueError("give --model FILE or --weights FILE, not both")
        if not Path(self.model).exists():
            from flexkern.model.families import FAMILIES

            known = f"expected demo, {', '.join(FAMILIES)} or a safetensors file"
            raise FileNotFoundError(f"there is no model {self.model!r}: {known}{did_you_mean(self.model, FAMILIES)}")
        return Path(self.model)

    def chosen_family(self, research: Research | None) -> "Family":
        """The family of --model with what --config-path, --chunk, --first-chunk and --size change; or the demo's."""
        from flexkern import demo
        from flexkern.model.families import FAMILIES

        if not is_family(self.model):
            self.validate_for_demo()
            return demo.family()
        family = FAMILIES[self.model]
        given: dict[str, Any] = dict(research.family if research else {})
        given |= {name: value for name in ("chunk", "first_chunk") if (value := getattr(self, name)) is not None}
        if self.size is not None:
            height, cross, width = self.size.partition("x")
            if not (cross and height.isdigit() and width.isdigit()):
                raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 480x832, got {self.size!r}")
            given["size"] = family.latent_size(int(height), int(width))
        return family.override(**given)

    def chosen_pictures(self, family: "Family") -> int:
        """Length of the video in pictures."""
        from flexkern.engine import frames_for

        if self.num_output_frames is not None:
            family.validate_frames(self.num_output_frames)
            return family.pictures(self.num_output_frames)
        return self.frames or frames_for(SECONDS if self.seconds is None else self.seconds, family.fps)

    def chosen_checkpoint(self, family: "Family") -> "Checkpoint":
        """The checkpoint that the flags name."""
        from flexkern.pipeline import Checkpoint

        if self.weights is None:
            raise ValueError(f"--model {self.model} needs --weights PATH, a file or a folder")
        return Checkpoint(
            weights=self.weights,
            family=family,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            embeddings=self.embeddings,
            lora=self.lora,
            lora_scale=self.lora_scale,
            ema=True if self.ema else False if self.no_ema else None,
            dtype=self.dtype or "bfloat16",
        )

    def validate_for_demo(self) -> None:
        """Raises ValueError where a flag was given that the demo has no use for."""
        from flexkern.model.families import FAMILIES

        given = [name for name in NOT_FOR_DEMO if getattr(self, name) not in (None, False)]
        if given:
            known = f"name what --weights are with --model {' | '.join(FAMILIES)}"
            raise ValueError(f"{flag(given[0])} is for checkpoints: {known}")


def open_demo(weights: Path | None, backend: str, device: str) -> "Engine":
    """The engine of the demo, or of weights of its form. Raises ValueError for another form."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    try:
        demo.validate_weights(weights or demo.WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}; for a checkpoint give --model {' | '.join(FAMILIES)}") from None
    return demo.load_engine(weights or demo.WEIGHTS, backend=backend, device=device)


def validate_folder(folder: Path) -> None:
    """Raises ValueError or PermissionError where no file can be written to the folder, which may be made first."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        where = "is not a folder" if there == folder else f"cannot be made in {there.name}"
        raise ValueError(f"--output-folder {folder} {where}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"no permission to write {there}")


def flag(name: str) -> str:
    """A field of ``Render`` as one types it."""
    return f"--{name.replace('_', '-')}"
