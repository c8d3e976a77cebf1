"""``flexkern inspect``: what a weight file or folder is, and whether anything of it is missing."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flexkern.cli.errors import refusing

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.model.wan import WanConfig

Lines = Iterator[tuple[str, str]]
TOKENS = 1560  # of a latent frame at 480x832
CHANNELS = 16  # of Wan 2.1's latents
NEEDED = {
    "VAE": "Wan2.1_VAE.pth or vae/; without it only --latents FILE",
    "text encoder": "models_t5_umt5-xxl-enc-bf16.pth or text_encoder/; without it only --embeddings FILE",
}


@dataclass(kw_only=True)
class Inspect:
    """Print what a checkpoint is: container, size, EMA, dtype, what is missing, and which --model fits.

    Reads headers only, but for pickles of the old torch format. Exit status 1 where something is missing or unknown.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """weight file, folder of Wan or diffusers, or a research repository"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError):
            from flexkern.model.find import holdings

            found = holdings(self.path)
            known = [(kind, place) for kind, place in found if kind is not None]
        if not known:
            there = "its tensors have other names, or it cannot be read" if self.path.is_file() else "no weights in it"
            print(f"{self.path}\n  {'is':12} nothing that flexkern knows: {there}")
            for name, text in unknown_lines(self.path):
                print(f"  {name:12} {text}")
            return 1
        fine = True
        for number, (kind, place) in enumerate(known):
            print(f"{place}" if number == 0 else f"\n{place}")
            for name, text in report(kind, place):
                fine = fine and not (name == "complete" and text.startswith("no:"))
                print(f"  {name:12} {text}")
        kinds = {kind for kind, _ in known}
        if "transformer" in kinds and self.path.is_dir():
            for kind in (kind for kind in NEEDED if kind not in kinds):
                print(f"\n{self.path}\n  {'lacks':12} {kind}: {NEEDED[kind]}")
        return 0 if fine else 1


def report(kind: str, place: Path) -> Lines:
    """Name and text of each finding; what is wrong with the file is one as well."""
    said = False
    try:
        for line in KINDS[kind](place):
            said = True
            yield line
        return
    except NotImplementedError as error:
        kind, wrong = f"{kind}, not supported", f"no: {error}"
    except (ValueError, FileNotFoundError) as error:
        wrong = f"no: {error}"
    except (OSError, ImportError) as error:  # a file larger than memory, or an extra that is not installed
        wrong = f"not checked: {error}"
    if not said:
        yield "is", kind
    yield "complete", " ".join(wrong.split())


def transformer_lines(place: Path) -> Lines:
    from flexkern.model.families import guess_family
    from flexkern.model.weights import read_checkpoint

    found = read_checkpoint(place, headers=True)
    yield "is", f"transformer of Wan 2.1, text to video, {size_class(found.config)}"
    others = f"; there are {', '.join(found.groups[1:])} as well" if found.groups[1:] else ""
    yield "container", f"{found.container}{others}"
    if found.wrappers:
        yield "prefix", " ".join(found.wrappers)
    averaged = found.groups[0] == "generator_ema"
    yield "EMA", ("yes, it is taken" if averaged else "no") + averaged * (len(found.groups) > 1) * "; not with --no-ema"
    yield from data_lines(found.state)
    yield "complete", complete(place)
    if found.config is not None and found.config.in_dim != CHANNELS:
        yield "use", f"flexkern render --model {place}  # {found.config.in_dim} channels: if it is of the demo's form"
        return
    if found.config is not None:
        megabytes = 2 * 2 * found.config.num_layers * found.config.dim * TOKENS / 1e6
        yield "cache", f"{megabytes:,.1f} MB per cached frame of 480x832 in bfloat16"
    if place.is_dir() and guess_family(place.name) is None:
        yield "note", "Wan's own weights look the same, but are not distilled: they need 50 steps"
    yield "use", f"flexkern render --weights {place} --model {fitting(place, found.container)}"


def complete(place: Path) -> str:
    from flexkern.model.weights import check_transformer

    try:
        check_transformer(place)
    except ValueError as error:
        return f"no: {str(error).rpartition('does not fit the model: ')[2]}"
    return "yes"


def size_class(config: "WanConfig | None") -> str:
    """1.3B, 14B or other, with the sizes."""
    from flexkern.model.wan import CONFIGS

    if config is None:
        return "of unknown size"
    sizes = lambda of: (of.dim, of.ffn_dim, of.num_heads, of.num_layers)
    name = next((name for name in ("1.3B", "14B") if sizes(CONFIGS[name]) == sizes(config)), "other")
    dim, ffn_dim, heads, layers = sizes(config)
    return f"{name}: dim {dim}, feed-forward {ffn_dim}, {heads} heads, {layers} layers"


def fitting(place: Path, container: str) -> str:
    """The --model that the name of the file or its folder tells; keys do not show how a model was distilled."""
    from flexkern.model.families import FAMILIES, guess_family

    path = place.resolve()
    told = guess_family(path.name) or guess_family(path.parent.name)
    others = [name for name in FAMILIES if name != "wan-diffusers"]
    return told or ("wan-diffusers" if "diffusers" in container else " | ".join(others))


def lora_lines(place: Path) -> Lines:
    from flexkern.model.weights import read_lora

    updates = read_lora(place)
    ranks = Counter(down.shape[0] for _, down, _ in updates.values())
    alphas = sorted({round(scale * down.shape[0], 4) for _, down, scale in updates.values()})
    inputs = {down.shape[1] for _, down, _ in updates.values()}
    size = next((name for name, dim in (("1.3B", 1536), ("14B", 5120)) if dim in inputs), "another size")
    yield "is", f"LoRA of a Wan transformer, for {size}"
    yield "rank", counted(ranks)
    yield "alpha", ", ".join(f"{alpha:g}" for alpha in alphas) + ", which is the rank where the file does not say it"
    modules = Counter(target.split(".", 2)[2].removesuffix(".weight") for target in updates if target.count(".") > 2)
    yield "targets", f"{len(updates)}: " + ", ".join(f"{name} in {count} blocks" for name, count in modules.items())
    yield from data_lines({f"{name} {i}": pair[i] for name, pair in updates.items() for i in (0, 1)})
    yield "complete", "yes; whether it fits a transformer is checked where both are given"
    yield "use", f"flexkern render --weights ... --lora {place}"


def vae_lines(place: Path) -> Lines:
    from flexkern.model.vae import load_vae

    state = tensors_of(place)
    original = any(name.startswith("decoder.upsamples.") for name in state)
    yield "is", f"VAE of Wan, {'Wan' if original else 'diffusers'} keys"
    yield from data_lines(state)
    vae = load_vae(place, dtype=next(iter(state.values())).dtype)  # of the stored dtype: it stays mapped
    yield "latents", f"{vae.channels} channels, strides {vae.temporal} in time, {vae.spatial} in space"
    yield "complete", "yes"
    yield "use", f"flexkern render ... --vae {place}"


def tiny_lines(place: Path) -> Lines:
    from flexkern.model.vae import load_tiny_decoder

    state = tensors_of(place)
    yield "is", "tiny decoder (TAEHV): a preview of what the VAE shows; encodes nothing here"
    yield from data_lines(state)
    load_tiny_decoder(place, dtype=next(iter(state.values())).dtype)
    yield "complete", "yes"
    yield "use", f"flexkern render ... --vae {place}"


def text_lines(place: Path) -> Lines:
    import torch

    from flexkern.model.text import load_text_encoder

    state = tensors_of(place)
    original = any(name.startswith("token_embedding.") for name in state)
    yield "is", f"text encoder UMT5, {'Wan' if original else 'transformers'} keys"
    yield from data_lines(state)
    dtype = next(iter(state.values())).dtype
    if dtype not in (torch.bfloat16, torch.float32):
        yield "complete", f"not checked: it would have to be converted from {dtype} first"
    else:
        load_text_encoder(place, dtype=dtype)
        yield "complete", "yes, the tokenizer as well"
    yield "use", f"flexkern render ... --text-encoder {place}"


def embeddings_lines(place: Path) -> Lines:
    from flexkern.model.files import some_of
    from flexkern.model.text import SavedEmbeddings

    saved = SavedEmbeddings(place)
    yield "is", "saved embeddings of prompts"
    yield "prompts", some_of(map(repr, saved.prompts))
    yield from data_lines(tensors_of(place))
    yield "complete", "yes"
    yield "use", f"flexkern render ... --embeddings {place}"


def unknown_lines(path: Path) -> Lines:
    if path.is_file():
        try:
            state = tensors_of(path)
        except ValueError as error:
            yield "complete", f"no: {error}"
            return
        yield from data_lines(state)
        yield "names", ", ".join(list(state)[:8])


def tensors_of(place: Path) -> "dict[str, Tensor]":
    """All tensors at a place, of whatever group."""
    from flexkern.model.files import read_files
    from flexkern.model.find import shards

    content, _ = read_files(shards(place), headers=True)
    groups = [value for value in content.values() if isinstance(value, Mapping)]
    return {name: t for group in (content, *groups) for name, t in group.items() if hasattr(t, "numel")}


def data_lines(state: "Mapping[str, Tensor]") -> Lines:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    yield "tensors", f"{len(state):,}, {sum(tensor.numel() for tensor in state.values()):,} parameters"
    room = f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.0f} kB"
    yield "data", f"{counted(dtypes)}, {room}"


def counted(things: Counter) -> str:
    """The things, with their numbers where there are several."""
    return ", ".join(str(thing) if len(things) == 1 else f"{thing} ({n} times)" for thing, n in things.most_common())


KINDS: dict[str, Callable[[Path], Lines]] = {
    "transformer": transformer_lines,
    "LoRA": lora_lines,
    "VAE": vae_lines,
    "tiny VAE": tiny_lines,
    "text encoder": text_lines,
    "embeddings": embeddings_lines,
}
