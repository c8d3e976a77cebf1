"""What ``flexkern render`` makes videos with: the demo, or a checkpoint of Wan 2.1.

Of a checkpoint everything is checked from headers first; then text, VAE and transformer are loaded, in this order.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexkern.backends import get_backend
from flexkern.engine import Chunk, Engine, Session, frames_for
from flexkern.model.families import FAMILIES, PICTURES_PER_FRAME, STRIDE, Family
from flexkern.model.find import find_part, find_parts
from flexkern.model.text import SavedEmbeddings, load_text_encoder, save_embeddings
from flexkern.model.vae import load_tiny_decoder, load_vae
from flexkern.model.wan import WanConfig
from flexkern.model.weights import check_transformer, load_transformer
from flexkern.plan import band_split
from flexkern.policies import Preset

if TYPE_CHECKING:
    from flexkern.cli.render import Render

CHANNELS = 16  # of a latent of Wan 2.1
SECONDS = 10.0
NOT_FOR_DEMO = (
    "vae", "text_encoder", "tokenizer", "embeddings", "lora", "ema", "no_ema", "dtype", "size", "image", "chunk",
    "first_chunk", "num_output_frames", "latents",
)  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_VAE = (
    "pixels need a VAE and none was found beside the weights: give --vae PATH (Wan2.1_VAE.pth or a vae folder), or "
    "--latents FILE to write latents instead"
)
NO_TEXT = (
    "a prompt needs a text encoder and none was found beside the weights: give --text-encoder PATH "
    "(models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder), or --embeddings FILE with saved embeddings"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What videos of so many pictures are made with.

    size: height and width of a picture. per_frame: pictures of a latent frame, but for the first, which gives one.
    start: latents [1, 1, C, h, w] of an image.
    """

    engine: Engine
    pictures: int
    fps: int
    size: tuple[int, int]
    first_chunk: int
    per_frame: int = 1
    start: Tensor | None = None

    def open(self, prompt: str, preset: Preset, seed: int) -> Session:
        """A session for one video."""
        frames = frames_for(self.pictures, 1, self.per_frame)
        return self.engine.session(prompt, preset=preset, seed=seed, frames=frames, first_chunk=self.first_chunk)

    def begin(self, session: Session) -> Chunk | None:
        """What the session begins with, in its cache and in its decoder's, where there is an image."""
        return None if self.start is None else session.prefill(self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be loaded, found and checked; tiny: the VAE is a tiny decoder."""

    family: Family
    transformer: Path
    vae: Path | None
    tiny: bool
    embeddings: Path | None
    text_encoder: Path | None


def demo_source(render: "Render", weights: Path | None, device: str) -> Source:
    """The demo, or weights of its form. Raises ValueError for another form, and for options it has no use for."""
    from flexkern.demo import FPS, WEIGHTS, ZOOM, load_engine, world

    refuse_for_demo(render)
    check_form(weights or WEIGHTS, world)
    pictures = render.frames or frames_for(SECONDS if render.seconds is None else render.seconds, FPS)
    engine = load_engine(weights or WEIGHTS, backend=render.backend, device=device)
    side = world.SIZE * ZOOM
    return Source(engine=engine, pictures=pictures, fps=FPS, size=(side, side), first_chunk=engine.chunk)


def checkpoint_source(
    render: "Render", changes: dict[str, Any], preset: Preset, prompts: Sequence[str], device: str
) -> Source:  # fmt: skip
    """The checkpoint that the options name. changes: to its family. Raises what is wrong, before data is read."""
    family = chosen_family(render, changes)
    pictures = render.frames or frames_for(SECONDS if render.seconds is None else render.seconds, family.fps)
    if render.num_output_frames is not None:
        family.check_frames(render.num_output_frames)
        pictures = 1 + (render.num_output_frames - 1) * PICTURES_PER_FRAME
    plan = check(render, family, preset, prompts, device, frames_for(pictures, 1, PICTURES_PER_FRAME))
    return load(render, plan, prompts, device, pictures)


def refuse_for_demo(render: "Render") -> None:
    """Raises ValueError where an option was given that the demo has no use for."""
    given = [name for name in NOT_FOR_DEMO if getattr(render, name) not in (None, False)]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{flag} is for checkpoints: name what --weights are with --model {' | '.join(FAMILIES)}")


def check_form(weights: Path, world: Any) -> None:
    """Raises FileNotFoundError or ValueError where the file's header is not that of a model of the demo's form."""
    from safetensors import SafetensorError, safe_open

    if not weights.exists():
        raise FileNotFoundError(f"there are no weights at {weights}")
    needed = {"in_dim": 3, "out_dim": 3, "text_len": world.TEXT_LEN, "text_dim": world.TEXT_DIM}
    form = f"pixels in, pixels out, its text encoder, all said in the metadata entry flexkern_config ({needed})"
    other = f"{weights} is not of the demo's form: {form}; for a checkpoint give --model {' | '.join(FAMILIES)}"
    if weights.suffix != ".safetensors":
        raise ValueError(other)
    try:
        with safe_open(weights, framework="numpy") as file:
            config = json.loads((file.metadata() or {}).get("flexkern_config", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}") from None
    if any(config.get(name) != value for name, value in needed.items()):
        raise ValueError(other)


class KnownPrompts:
    """A text encoder for prompts that were encoded before."""

    def __init__(self, prompts: Sequence[str], embedded: Tensor):
        self.embedded = dict(zip(prompts, embedded, strict=True))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.embedded[prompt] for prompt in prompts])


def chosen_family(render: "Render", changes: dict[str, Any]) -> Family:
    """The family of --model with what --config_path, --chunk, --first-chunk and --size change. Raises ValueError."""
    family = FAMILIES[render.model]
    given = {"chunk": render.chunk, "first_chunk": render.first_chunk}
    family = family.override(**changes | {name: value for name, value in given.items() if value is not None})
    if render.size is None:
        return family
    height, cross, width = render.size.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 480x832, got {render.size!r}")
    return family.override(size=family.latent_size(int(height), int(width)))


def check(
    render: "Render", family: Family, preset: Preset, prompts: Sequence[str], device: str, frames: int
) -> Plan:  # fmt: skip
    """What to load. Raises, before data is read, what is wrong with the files, the options or the preset."""
    if render.weights is None:
        raise ValueError(f"--model {render.model} needs --weights PATH, a file or a folder")
    get_backend(render.backend, device)
    parts = find_parts(render.weights, prefer=family.files)
    kind, vae = _find_vae(render, parts.vae)
    if render.image is not None:
        family.check_image()
        _check_image(render.image, kind)
    embeddings, encoder = _find_text(render, parts.text_encoder)
    found = check_transformer(parts.transformer, ema=_ema(render), lora=render.lora)
    _check_config(found.config, parts.transformer, preset, family, frames)
    if embeddings is not None and encoder is None:
        _check_embeddings(embeddings, prompts, found.config)
    used = {"transformer": f"{parts.transformer} ({found.container})", "VAE": vae, "text encoder": encoder}
    used |= {"embeddings": None if encoder else embeddings, "LoRA": render.lora}
    note(f"{family.name}: {', '.join(f'{name} {place}' for name, place in used.items() if place)}")
    if family.size != (trained := FAMILIES[render.model].size):
        note(f"{family.name} was trained with pictures of {trained[0] * STRIDE}x{trained[1] * STRIDE}")
    if render.lora is None and parts.loras:
        note(f"{', '.join(map(str, parts.loras))} is a LoRA; it is used with --lora PATH only")
    return Plan(
        family=family, transformer=parts.transformer, vae=vae, tiny=kind == "tiny VAE",
        embeddings=embeddings, text_encoder=encoder,
    )  # fmt: skip


def load(render: "Render", plan: Plan, prompts: Sequence[str], device: str, pictures: int) -> Source:
    """Everything, in an order that never holds the text encoder beside the transformer."""
    family, dtype = plan.family, DTYPES[render.dtype or "bfloat16"]
    known = KnownPrompts(prompts, _encode(render, plan, prompts, device))
    precise = torch.float32 if device == "cpu" else dtype  # bfloat16 convolutions are slow on CPUs
    vae = decoder = start = None
    if plan.tiny:
        decoder = load_tiny_decoder(plan.vae, device=device, dtype=precise)
    elif plan.vae is not None:
        vae = load_vae(plan.vae, device=device, dtype=precise)
        decoder = vae.decoder
        _check_vae(vae, plan.vae)
    if render.image is not None:
        start = vae.encode(_read_image(render.image, family.size))
    model = load_transformer(
        plan.transformer, ema=_ema(render), lora=render.lora, lora_scale=render.lora_scale, dtype=dtype, device=device
    )
    engine = Engine(
        model, schedule=family.schedule, backend=render.backend, chunk=family.chunk, size=family.size,
        text_encoder=known, encoder=vae.encode if vae else None, decoder=None if render.latents else decoder,
    )  # fmt: skip
    size = family.size[0] * STRIDE, family.size[1] * STRIDE
    return Source(
        engine=engine, pictures=pictures, fps=family.fps, size=size, first_chunk=family.first_chunk,
        per_frame=PICTURES_PER_FRAME, start=start,
    )  # fmt: skip


def note(text: str) -> None:
    print(f"flexkern: {text}", file=sys.stderr)


def _ema(render: "Render") -> bool | None:
    return True if render.ema else False if render.no_ema else None


def _find_vae(render: "Render", beside: Path | None) -> tuple[str | None, Path | None]:
    if render.latents is not None and render.image is None:
        return None, None
    if render.vae is None and beside is None:
        raise ValueError(NO_VAE)
    return find_part(render.vae or beside, ("VAE", "tiny VAE"))


def _find_text(render: "Render", beside: Path | None) -> tuple[Path | None, Path | None]:
    """Saved embeddings, and the text encoder where they are to be made."""
    if render.embeddings is not None and render.embeddings.exists():
        return render.embeddings, None
    if render.embeddings is not None and not render.embeddings.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {render.embeddings.parent} to write embeddings to")
    if render.text_encoder is None and beside is None:
        absent = f"there are no embeddings at {render.embeddings}; " if render.embeddings else ""
        raise ValueError(absent + NO_TEXT)
    return render.embeddings, find_part(render.text_encoder or beside, ("text encoder",))[1]


def _check_config(config: WanConfig, path: Path, preset: Preset, family: Family, frames: int) -> None:
    if config.in_dim != CHANNELS or config.out_dim != CHANNELS:
        got = f"{config.in_dim} in, {config.out_dim} out"
        raise ValueError(f"{path} has latents of {got} channels; expected {CHANNELS}, as Wan 2.1 has")
    sizes = {"bands": band_split(config.head_dim)[0], "heads": config.num_heads}
    preset.validate(chunk=max(family.chunk, family.first_chunk), **sizes, target=frames)


def _check_embeddings(path: Path, prompts: Sequence[str], config: WanConfig) -> None:
    width = SavedEmbeddings(path)(prompts).shape[-1]
    if width != config.text_dim:
        raise ValueError(f"{path} holds embeddings of {width} channels; the transformer takes {config.text_dim}")


def _check_vae(vae: Any, path: Path) -> None:
    got = vae.channels, vae.spatial, vae.temporal
    if got != (CHANNELS, STRIDE, PICTURES_PER_FRAME):
        expected = f"{CHANNELS} channels and strides {STRIDE} in space, {PICTURES_PER_FRAME} in time"
        raise ValueError(f"{path} has {got[0]} channels and strides {got[1]} and {got[2]}; expected {expected}")


def _check_image(path: Path, kind: str | None) -> None:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    if kind != "VAE":
        raise ValueError("--image needs Wan's VAE to encode it; a tiny decoder only decodes")


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """uint8 [1, 1, height, width, 3], scaled to cover the video's size and cut to it around the centre."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        fitted = ImageOps.fit(upright, (size[1] * STRIDE, size[0] * STRIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted))[None, None]


def _encode(render: "Render", plan: Plan, prompts: Sequence[str], device: str) -> Tensor:
    if plan.text_encoder is None:
        return SavedEmbeddings(plan.embeddings)(prompts)
    encoder = load_text_encoder(plan.text_encoder, tokenizer=render.tokenizer, device=device)
    if plan.embeddings is None:
        return encoder(prompts).cpu()
    save_embeddings(plan.embeddings, encoder, prompts)
    note(f"{plan.embeddings}: embeddings of {len(prompts)} prompts")
    return SavedEmbeddings(plan.embeddings)(prompts)
