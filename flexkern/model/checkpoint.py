"""A checkpoint of Wan 2.1: what one says of it, what is found of it on disk, and what is loaded.

    parts = validate_checkpoint(Checkpoint(weights="Self-Forcing"), prompts=["a cat walks on grass"])
    loaded = load_parts(parts)

The first raises what is wrong, from headers alone; the second reads the weights. ``flexkern.pipeline`` is the door to
both: it adds preset and length, and makes an engine of what was loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from flexkern.backends.choice import AUTO, Choice, choose_backend, validate_backend
from flexkern.checks import check_fields, require
from flexkern.model.decoder import ChunkDecoder, LatentForm
from flexkern.model.embeddings import KnownPrompts, SavedEmbeddings, embeddings_file, encoded_rows
from flexkern.model.families import CHANNELS, FAMILIES, Family, family_of, get_family
from flexkern.model.find import Found, find_part, find_parts
from flexkern.model.image import validate_image
from flexkern.model.lora import Lora, listed
from flexkern.model.schedule import Schedule
from flexkern.model.text import WanTextEncoder, load_text_encoder, validate_text_encoder
from flexkern.model.tiny_decoder import load_tiny_decoder, validate_tiny_decoder
from flexkern.model.vae import VaeBackend, WanVAE, load_vae, validate_vae
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.model.weights import load_transformer, validate_transformer

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
NAME_LORA = "name one as lora to use it"  # the end of a note, which the command line says in its own words
DEFAULT = "self-forcing"  # the family of a checkpoint whose name says none


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Which weights to open, and how to run them. Nothing is read before it is checked."""

    weights: str | Path
    """weight file or folder, in any published layout; VAE and text encoder in the folder, or beside the file, are
    found"""
    family: str | Family | None = None
    """how it was trained, one of ``FAMILIES``; None: the one that file or folder are named after, else self-forcing"""
    schedule: Schedule | None = None
    """noise levels; None: the family's"""
    chunk: int | None = None
    """latent frames denoised together; None: the family's"""
    first_chunk: int | None = None
    """latent frames of the first chunk; None: as many as ``chunk``, else the family's"""
    size: tuple[int, int] | None = None
    """height and width of a latent frame; None: the family's. ``Family.latent_size`` tells it from pixels"""
    vae: str | Path | None = None
    """Wan2.1_VAE.pth, a folder of diffusers' AutoencoderKLWan, or a tiny decoder (taew2_1)"""
    vae_backend: VaeBackend = "auto"
    """what decodes with the VAE's weights: flexkern, diffusers, or auto, which takes flexkern wherever it can"""
    text_encoder: str | Path | None = None
    """models_t5_umt5-xxl-enc-bf16.pth, or a folder of transformers' UMT5EncoderModel"""
    tokenizer: str | Path | None = None
    """folder of the tokenizer, where it is not beside the text encoder"""
    embeddings: str | Path | None = None
    """file of saved embeddings, in place of a text encoder; where it is not there yet, the encoder's are saved to it"""
    lora: str | Path | Sequence[str | Path | tuple[str | Path, float]] | None = None
    """LoRA of the transformer, file or folder, or several: a sequence of paths, or of pairs of a path and its scale"""
    lora_scale: float = 1.0
    """times the scale of each LoRA, which is times alpha / rank"""
    ema: bool | None = None
    """None takes the averaged weights where there are any, True insists on them, False takes the raw ones"""
    dtype: Dtype = "bfloat16"
    """of the transformer's weights"""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.family, str):
            get_family(self.family)
        self.chosen_family()
        if self.lora is not None and not isinstance(self.lora, str | Path):
            object.__setattr__(self, "lora", tuple(listed(self.lora)))

    @property
    def loras(self) -> tuple[Lora, ...]:
        """Path and scale of every LoRA, ``lora_scale`` included."""
        return listed(self.lora, self.lora_scale)

    def chosen_family(self) -> Family:
        """The family, with the schedule, chunk, first chunk and size that are named here."""
        named = self.family or self.guessed_family() or DEFAULT
        family = named if isinstance(named, Family) else get_family(named)
        family = family.override(chunk=self.chunk, first_chunk=self.first_chunk, size=self.size)
        return family if self.schedule is None else replace(family, schedule=self.schedule)

    def guessed_family(self) -> str | None:
        """The family that the weights' file or folder is named after."""
        return family_of(self.weights)


class MissingPart(ValueError):
    """A part that is needed was neither named nor found beside the weights."""

    def __init__(self, part: Literal["VAE", "text encoder"], why: str, advice: str):
        super().__init__(f"{why}: {advice}")
        self.part, self.why = part, why


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a checkpoint is made of: found and validated, not yet loaded. Made by ``check`` alone."""

    checkpoint: Checkpoint
    family: Family
    """with the checkpoint's own chunk, size and schedule"""
    transformer: Path
    container: str
    """in words: file type, group and naming of the keys"""
    config: WanConfig
    vae: Path | None
    """None where none is needed or found"""
    tiny: bool
    """whether the VAE is a tiny decoder"""
    decodes: bool
    """whether latents become pictures"""
    text_encoder: Path | None
    embeddings: Path | None
    """saved embeddings; with a text encoder the file that its embeddings are saved to"""
    prompts: tuple[str, ...]
    """those to encode before the transformer is loaded"""
    backend: Choice
    """what runs, and why it is that one"""
    device: str
    notes: tuple[str, ...]
    """what a user would want to know before it runs"""

    @property
    def saves_embeddings(self) -> bool:
        """Whether loading writes the file of embeddings."""
        return self.embeddings is not None and self.text_encoder is not None

    def __str__(self) -> str:
        """One line: the family, and which files are taken."""
        embeddings = None if self.saves_embeddings else self.embeddings
        used = {"transformer": f"{self.transformer} ({self.container})", "VAE": self.vae}
        loras = " + ".join(
            f"{lora.path} times {lora.scale:g}" if lora.scale != 1 else f"{lora.path}" for lora in self.checkpoint.loras
        )
        used |= {"text encoder": self.text_encoder, "embeddings": embeddings, "LoRA": loras}
        return f"{self.family.name}: {', '.join(f'{name} {path}' for name, path in used.items() if path)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The parts of a checkpoint in memory."""

    model: CausalWan
    text_encoder: WanTextEncoder | SavedEmbeddings | KnownPrompts | None
    vae: WanVAE | None
    """None where there is none, or a tiny decoder"""
    decoder: Callable[[], ChunkDecoder] | None
    """called for each session; None where latents stay latents"""


def validate_checkpoint(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] = (),
    image: str | Path | None = None,
    pixels: bool | None = None,
    text: bool | None = None,
    backend: str = AUTO,
    device: str = "cpu",
) -> Parts:
    """The parts of a checkpoint, all of which can be loaded and fit each other, told from headers.

    Args:
        checkpoint: What to open.
        prompts: Known beforehand: they are encoded before the transformer is loaded, and then the encoder goes.
            Without any the encoder, where there is one, stays.
        image: The first picture of a video, which needs a VAE that encodes.
        pixels: True needs a VAE, False leaves it out but for an image, None takes one where there is one.
        text: True needs a text encoder or saved embeddings, as prompts do; False leaves them out; None takes them
            where they are.
        backend: Of attention, "auto" or one of ``flexkern.backends.BACKENDS``.
        device: cpu, cuda or cuda:N.

    Raises:
        FileNotFoundError: A file is not there.
        MissingPart: A VAE or a text encoder is needed; a ValueError.
        ValueError: Anything else that does not fit.
        NotImplementedError: A kind of checkpoint that is not supported.
        ImportError: Names the extra that is not installed.
    """
    require(not isinstance(prompts, str), f"prompts must be a list of texts, got {prompts!r}")
    validate_device(device)
    validate_backend(backend, device)
    family = checkpoint.chosen_family()
    found = find_parts(checkpoint.weights, prefer=family.files)
    kind, vae = _find_vae(checkpoint, found, pixels, image is not None)
    if image is not None:
        family.validate_image()
        validate_image(image)
        require(kind == "VAE", "an image needs Wan's VAE to encode it; a tiny decoder only decodes")
    own = kind != "tiny VAE" or checkpoint.vae_backend == "auto"
    require(own, f"vae_backend {checkpoint.vae_backend!r} is for Wan's VAE, and {vae} is a tiny decoder")
    embeddings, encoder = _find_text(checkpoint, found, prompts, text)
    held, model = validate_transformer(found.transformer, ema=checkpoint.ema, lora=checkpoint.loras)
    model.grid(*family.size)
    chosen = choose_backend(backend, device, head_dim=model.config.head_dim, dtype=DTYPES[checkpoint.dtype])
    _validate_text(checkpoint, embeddings, encoder, prompts, model.config)
    if vae is not None:
        validate_channels(found.transformer, model.config)
        validate_latents(vae, validate_vae(vae) if kind == "VAE" else validate_tiny_decoder(vae), family)
    return Parts(
        checkpoint=checkpoint,
        family=family,
        transformer=found.transformer,
        container=held.container,
        config=model.config,
        vae=vae,
        tiny=kind == "tiny VAE",
        decodes=vae is not None and pixels is not False,
        text_encoder=encoder,
        embeddings=embeddings,
        prompts=tuple(dict.fromkeys(prompts)),
        backend=chosen,
        device=device,
        notes=tuple(_notes(checkpoint, family, found)),
    )


def load_parts(parts: Parts) -> Loaded:
    """Everything in memory, in an order that never holds the text encoder beside the transformer if prompts are known.

    Args:
        parts: What ``validate_checkpoint`` returned. The file of embeddings is written if ``parts.saves_embeddings``.

    Raises:
        OSError: A file is gone, or cannot be read or written.
    """
    checkpoint, device, dtype = parts.checkpoint, parts.device, DTYPES[parts.checkpoint.dtype]
    text_encoder = _load_text(parts)
    precise = torch.float32 if device == "cpu" else dtype  # bfloat16 convolutions are slow on CPUs
    vae: WanVAE | None = None
    decoder: Callable[[], ChunkDecoder] | None = None
    if parts.vae is not None and parts.tiny:
        decoder = load_tiny_decoder(parts.vae, device=device, dtype=precise)
    elif parts.vae is not None:
        vae = load_vae(parts.vae, device=device, dtype=precise, backend=checkpoint.vae_backend)
        decoder = vae.decoder
    model = load_transformer(
        parts.transformer,
        ema=checkpoint.ema,
        lora=checkpoint.loras,
        dtype=dtype,
        device=device,
    )
    return Loaded(model=model, text_encoder=text_encoder, vae=vae, decoder=decoder if parts.decodes else None)


def default_device() -> str:
    """The device of whoever names none to a command or a worker: the first GPU, where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def validate_device(name: str, called: str = "device") -> None:
    """Raises ValueError where torch sees no such device. called: the argument's name in the message."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"{called} must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(f"there is no device {name!r}: torch {torch.__version__} sees {count} CUDA GPUs")


def validate_channels(path: Path, config: WanConfig) -> None:
    """Raises ValueError for a transformer whose latents are not those of Wan 2.1."""
    if config.in_dim != CHANNELS or config.out_dim != CHANNELS:
        got = f"{config.in_dim} in, {config.out_dim} out"
        raise ValueError(f"{path} has latents of {got} channels; expected {CHANNELS}, as Wan 2.1 has")


def _find_vae(
    checkpoint: Checkpoint, found: Found, pixels: bool | None, encodes: bool
) -> tuple[str | None, Path | None]:
    """Kind and path of the VAE, None for none."""
    path = checkpoint.vae or found.vae
    if pixels is False and not encodes:
        return None, None
    if path is None and (pixels or encodes):
        why = f"pixels need a VAE and none was found beside the weights{_unread(found)}"
        named = "name one as vae (Wan2.1_VAE.pth or a vae folder), or take latents, with pixels=False"
        raise MissingPart("VAE", why, named)
    return (None, None) if path is None else find_part(path, ("VAE", "tiny VAE"))


def _unread(found: Found) -> str:
    """In brackets, which files beside the weights cannot be read, and why."""
    return f" ({'; '.join(found.unread[:3])})" if found.unread else ""


def _find_text(
    checkpoint: Checkpoint, found: Found, prompts: Sequence[str], text: bool | None
) -> tuple[Path | None, Path | None]:
    """Saved embeddings, and the text encoder where they are to be made."""
    given = None if checkpoint.embeddings is None else Path(checkpoint.embeddings)
    if text is False:
        require(
            not prompts and given is None,
            "prompts and embeddings are of no use where the checkpoint's text encoder is left out",
        )
        return None, None
    if given is not None and given.exists():
        return given, None
    if given is not None and not given.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {given.parent} to write embeddings to")
    absent = f"there are no embeddings at {given}; " if given else ""
    require(given is None or bool(prompts), f"{absent}to save them, give the prompts")
    encoder = checkpoint.text_encoder or found.text_encoder
    if encoder is None and (prompts or text):
        why = f"{absent}a prompt needs a text encoder and none was found beside the weights{_unread(found)}"
        named = "name one as text_encoder (models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder), or a file of "
        raise MissingPart("text encoder", why, f"{named}embeddings")
    return given, None if encoder is None else find_part(encoder, ("text encoder",))[1]


def _validate_text(
    checkpoint: Checkpoint, embeddings: Path | None, encoder: Path | None, prompts: Sequence[str], config: WanConfig
) -> None:
    """Raises ValueError where prompts are not known, or their embeddings do not fit the transformer."""
    if encoder is not None:
        path, verb, width = encoder, "makes", validate_text_encoder(encoder, tokenizer=checkpoint.tokenizer)
    elif embeddings is not None:
        path, verb, width = embeddings, "holds", SavedEmbeddings(embeddings).width(prompts)
    else:
        return
    if width != config.text_dim:
        raise ValueError(f"{path} {verb} embeddings of {width} channels; the transformer takes {config.text_dim}")


def validate_latents(path: Path, form: LatentForm, family: Family) -> None:
    """Raises ValueError for a VAE of other latents than the family's."""
    expected = LatentForm(CHANNELS, family.stride, family.pictures_per_frame)
    if form != expected:
        wanted = f"{expected.channels} channels and strides {expected.spatial} in space, {expected.temporal} in time"
        got = f"{form.channels} channels and strides {form.spatial} and {form.temporal}"
        raise ValueError(f"{path} has {got}; expected {wanted}")


def _notes(checkpoint: Checkpoint, family: Family, found: Found) -> list[str]:
    notes = []
    told = checkpoint.family is not None or checkpoint.guessed_family() is not None
    if not told and checkpoint.schedule is None:
        notes.append(f"{checkpoint.weights} does not say its family by its name; it is run as {DEFAULT}")
    trained = FAMILIES.get(family.name, family)
    if told and family.size != trained.size:
        height, width = trained.picture_size
        notes.append(f"{family.name} was trained with pictures of {height}x{width}")
    if not checkpoint.loras and found.loras:
        notes.append(f"{_are_loras([str(path) for path in found.loras])} not used; {NAME_LORA}")
    return notes


def _are_loras(names: Sequence[str]) -> str:
    """The beginning of a sentence on them."""
    if len(names) == 1:
        return f"{names[0]} is a LoRA and is"
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]} are LoRAs and are"


def _load_text(parts: Parts) -> WanTextEncoder | SavedEmbeddings | KnownPrompts | None:
    """What turns prompts into embeddings; a file of them is begun before the encoder is loaded, and grows with it."""
    if parts.text_encoder is None:
        return None if parts.embeddings is None else SavedEmbeddings(parts.embeddings)
    load = partial(load_text_encoder, parts.text_encoder, tokenizer=parts.checkpoint.tokenizer, device=parts.device)
    if not parts.prompts:
        return load()
    if parts.embeddings is None:
        return KnownPrompts.encoded(load(), parts.prompts)
    with embeddings_file(parts.embeddings, parts.prompts) as add:
        encoder = load()
        for prompt in parts.prompts:
            add(*encoded_rows(encoder, prompt))
    return SavedEmbeddings(parts.embeddings)
