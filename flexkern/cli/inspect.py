"""``flexkern inspect``: what a weight file or folder is, whether anything of it is missing, and how to render it."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flexkern.cli.errors import FLAGS, refusing

if TYPE_CHECKING:
    from torch import Tensor

    from flexkern.model.wan import WanConfig

Lines = Iterator[tuple[str, str]]
LACKS = "lacks a transformer: "
PROMPT = "a cat walks on grass"
NEEDED = {
    "VAE": "Wan2.1_VAE.pth or vae/; without it only --latents FILE",
    "text encoder": "models_t5_umt5-xxl-enc-bf16.pth or text_encoder/; without it only --embeddings FILE",
}


@dataclass(kw_only=True)
class Inspect:
    """Print what a checkpoint is: container, size, EMA, dtype, what is missing, and how to render it.

    Only headers are read, except from pickles in torch's old format. The exit status is 1 if something is missing or
    unknown. The line "use" runs when it is copied, or says what is lacking.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """weight file, folder of Wan or diffusers, or a research repository"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON: a list of the parts, each with its path and the names and texts that are printed otherwise"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError):
            from flexkern.model.intact import require_there

            require_there(self.path, "weights")
            from flexkern.model.find import holdings

            found = [held for held in holdings(self.path) if held.kind or held.why]
        told = [(held.path, dict(report(held.kind, held.path))) for held in found if held.kind]
        told += [(held.path, dict(unreadable(held.why))) for held in found if not held.kind]
        kinds = {held.kind for held in found}
        if transformers := [held.path for held in found if held.kind == "transformer"]:
            told = [*with_transformer(transformers[0], told)]
        if "transformer" in kinds and self.path.is_dir():
            told += [(self.path, {"lacks": f"{part}: {NEEDED[part]}"}) for part in NEEDED if part not in kinds]
        if not found:
            told = [(self.path, dict(unknown_lines(self.path)))]
        if self.json:
            print(json.dumps([{"path": str(path), **lines} for path, lines in told], indent=1))
        else:
            parts = (
                f"{path}\n" + "\n".join(f"  {name:12} {text}" for name, text in lines.items()) for path, lines in told
            )
            print("\n\n".join(parts))
        return 0 if found and not any(lines.get("complete", "").startswith("no:") for _, lines in told) else 1


def with_transformer(
    transformer: Path, told: Sequence[tuple[Path, dict[str, str]]]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The parts of a folder, where what is beside its transformer says how the two are used together."""
    from flexkern.model.find import find_parts

    found = find_parts(transformer)
    taken = [part.resolve() for part in (found.vae, found.text_encoder) if part]
    for path, lines in told:
        use = lines.get("use", "")
        if use.startswith(LACKS):
            itself = "the transformer's command finds it"
            lines = lines | {"use": itself if path.resolve() in taken else use.removeprefix(LACKS)}
        yield path, lines


def unreadable(why: str) -> Lines:
    yield "is", "nothing that flexkern can read"
    yield "complete", f"no: {one_line(why)}"


def report(kind: str, path: Path) -> Lines:
    """Name and text of each finding; what is wrong with the file is one as well."""
    said = False
    try:
        for line in KINDS[kind](path):
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
    yield "complete", one_line(wrong)


def transformer_lines(path: Path) -> Lines:
    from flexkern.model.families import CHANNELS, FAMILIES, PATCH, family_of
    from flexkern.model.weights import read_state_dict

    found = read_state_dict(path, headers=True)
    yield "is", f"transformer of Wan 2.1, text to video, {size_class(found.config)}"
    others = f"; there are {', '.join(found.groups[1:])} as well" if found.groups[1:] else ""
    yield "container", f"{found.container}{others}"
    if found.wrappers:
        yield "prefix", " ".join(found.wrappers)
    other = "; not with --no-ema" if found.averaged and len(found.groups) > 1 else ""
    yield "EMA", f"yes, it is taken{other}" if found.averaged else "no"
    yield from data_lines(found.tensors)
    wrong = what_is_wrong(path)
    yield "complete", f"no: {wrong}" if wrong else "yes"
    if found.config is not None and found.config.in_dim != CHANNELS:
        yield "use", use_as_demo(path, found.config.in_dim)
        return
    if found.config is not None:
        height, width = FAMILIES["self-forcing"].size
        tokens = height * width // PATCH**2
        megabytes = 2 * 2 * found.config.num_layers * found.config.dim * tokens / 1e6
        yield "cache", f"{megabytes:,.1f} MB per cached frame of 480x832 in bfloat16"
    if path.is_dir() and family_of(path) is None:
        yield "note", "Wan's own weights look the same, but are not distilled: they need 50 steps"
    yield "use", "it cannot be rendered: it is not complete" if wrong else use(path, found.container)


def what_is_wrong(path: Path) -> str | None:
    """Which keys of a transformer are missing, unexpected or wrongly shaped; None where it is complete."""
    from flexkern.model.weights import validate_transformer

    try:
        validate_transformer(path)
    except ValueError as error:
        return str(error).rpartition("does not fit the model: ")[2]
    return None


def use(path: Path, container: str) -> str:
    """The command that renders a complete transformer, which ``check`` let pass, or what that command lacks."""
    from flexkern.pipeline import Checkpoint, MissingPart, check

    model, others = chosen_model(path, container)
    command = f"flexkern render --weights {copyable(path)} --prompt {shlex.quote(PROMPT)} --model {model}"
    checkpoint, lacks = Checkpoint(weights=path, family=model), list[str]()
    while True:
        prompts = () if "text encoder" in lacks else (PROMPT,)
        try:
            check(checkpoint, prompts=prompts, pixels="VAE" not in lacks)
            break
        except MissingPart as error:
            lacks.append(error.part)
        except (ValueError, OSError, NotImplementedError, ImportError) as error:
            return f"it cannot be rendered as it is: {one_line(str(error))}"
    if lacks:
        ways = "; ".join(f"lacks a {part}: {FLAGS[part]}" for part in lacks)
        return f"{ways}; with them: {command}{others}"
    return f"{command}{others}"


def use_as_demo(path: Path, channels: int) -> str:
    """The command that renders a model of the demo's form, or what the model is not."""
    from flexkern import demo

    try:
        demo.validate_weights(path)
    except (ValueError, OSError) as error:
        return f"it cannot be rendered: its latents have {channels} channels, and {one_line(str(error))}"
    return f"flexkern render --model {copyable(path)}"


def chosen_model(path: Path, container: str) -> tuple[str, str]:
    """The --model that the name of the file or its folder tells, and a comment on others that it may be.

    Keys do not show how a model was distilled.
    """
    from flexkern.model.families import FAMILIES, family_of

    if told := family_of(path):
        return told, ""
    if "diffusers" in container:
        return "wan-diffusers", ""
    first, *others = (name for name in FAMILIES if name != "wan-diffusers")
    return first, f"  # or {', '.join(others)}: no name says how it was distilled"


def size_class(config: "WanConfig | None") -> str:
    """1.3B, 14B or other, with the sizes."""
    from flexkern.model.wan import CONFIGS

    if config is None:
        return "of unknown size"
    dim, ffn_dim, heads, layers = sizes = sizes_of(config)
    name = next((name for name in ("1.3B", "14B") if sizes_of(CONFIGS[name]) == sizes), "other")
    return f"{name}: dim {dim}, feed-forward {ffn_dim}, {heads} heads, {layers} layers"


def sizes_of(config: "WanConfig") -> tuple[int, int, int, int]:
    return config.dim, config.ffn_dim, config.num_heads, config.num_layers


def lora_lines(path: Path) -> Lines:
    from flexkern.model.files import some_of
    from flexkern.model.lora import read_lora
    from flexkern.model.names import is_known

    updates = read_lora(path)
    every = [change for changes in updates.values() for change in changes]
    ranks = [change.down.shape[0] for change in every if change.down is not None]
    alphas = sorted({round(change.scale * change.down.shape[0], 4) for change in every if change.down is not None})
    sizes = {size for change in every for size in (change.shape() or [])}
    size = next((name for name, dim in (("14B", 5120), ("1.3B", 1536)) if dim in sizes), "another size")
    yield "is", f"LoRA of a Wan transformer, for {size}"
    if ranks:
        yield "rank", counted(Counter(ranks))
        listed = ", ".join(f"{alpha:g}" for alpha in alphas)
        yield "alpha", f"{listed}, which is the rank where the file does not say it"
    if len(ranks) < len(every):
        yield "differences", f"{len(every) - len(ranks)} of whole tensors, without a rank"
    modules = Counter(target.split(".", 2)[2].removesuffix(".weight") for target in updates if target.count(".") > 2)
    yield "targets", f"{len(updates)}: " + ", ".join(f"{name} in {count} blocks" for name, count in modules.items())
    yield from data_lines(tensors_of(path))
    if unknown := [target for target in updates if not is_known(target)]:
        yield "complete", f"no: a transformer of Wan 2.1 has no {some_of(unknown)}"
        return
    yield "complete", "yes; whether it fits a transformer is checked where both are given"
    yield "use", beside_weights("--lora", path)


def vae_lines(path: Path) -> Lines:
    from flexkern.model.checkpoint import validate_latents
    from flexkern.model.families import FAMILIES
    from flexkern.model.vae import validate_vae

    state = tensors_of(path)
    original = any(name.startswith("decoder.upsamples.") for name in state)
    yield "is", f"VAE of Wan, {'Wan' if original else 'diffusers'} keys"
    yield from data_lines(state)
    form = validate_vae(path)
    validate_latents(path, form, FAMILIES["self-forcing"])
    yield "latents", f"{form.channels} channels, strides {form.temporal} in time, {form.spatial} in space"
    yield "complete", "yes"
    yield "use", beside_weights("--vae", path)


def tiny_lines(path: Path) -> Lines:
    from flexkern.model.checkpoint import validate_latents
    from flexkern.model.families import FAMILIES
    from flexkern.model.tiny_decoder import validate_tiny_decoder

    state = tensors_of(path)
    yield "is", "tiny decoder (TAEHV): a preview of what the VAE shows; encodes nothing here"
    yield from data_lines(state)
    validate_latents(path, validate_tiny_decoder(path), FAMILIES["self-forcing"])
    yield "complete", "yes"
    yield "use", beside_weights("--vae", path)


def text_lines(path: Path) -> Lines:
    from flexkern.model.text import validate_text_encoder

    state = tensors_of(path)
    original = any(name.startswith("token_embedding.") for name in state)
    yield "is", f"text encoder UMT5, {'Wan' if original else 'transformers'} keys"
    yield from data_lines(state)
    validate_text_encoder(path)
    yield "complete", "yes, the tokenizer as well"
    yield "use", beside_weights("--text-encoder", path)


def embeddings_lines(path: Path) -> Lines:
    from flexkern.model.embeddings import SavedEmbeddings
    from flexkern.model.files import some_of

    saved = SavedEmbeddings(path)
    yield "is", "saved embeddings of prompts"
    yield "prompts", some_of(map(repr, saved.prompts))
    yield from data_lines(tensors_of(path))
    yield "complete", "yes"
    yield "use", beside_weights("--embeddings", path)


def latents_lines(path: Path) -> Lines:
    from flexkern.render.choices import DEMO
    from flexkern.render.decoding import inspect_latents

    held = inspect_latents(path)
    height, width = held.size
    of = f" by {held.model}" if held.model else ""
    yield "is", f"latents of a video{of}, {held.frames} frames of {held.channels} channels, {height} high, {width} wide"
    if held.pictures is not None:
        yield "pictures", f"{held.pictures} ordered, {held.fps} a second"
    if title := held.tags.get("title"):
        yield "prompt", one_line(title)
    yield from data_lines(tensors_of(path))
    yield "complete", "yes"
    command = f"flexkern decode {copyable(path)}"
    yield (
        "use",
        command if held.model == DEMO else f"lacks a VAE: {command} --vae PATH (Wan2.1_VAE.pth or a vae folder)",
    )


def unknown_lines(path: Path) -> Lines:
    there = "its tensors have other names" if path.is_file() else "no weights in it"
    yield "is", f"nothing that flexkern knows: {there}"
    if path.is_file():
        try:
            state = tensors_of(path)
        except (ValueError, OSError, NotImplementedError) as error:
            yield "complete", f"no: {one_line(str(error))}"
            return
        yield from data_lines(state)
        yield "names", ", ".join(list(state)[:8])


def tensors_of(path: Path) -> "dict[str, Tensor]":
    """All tensors of a file or folder, of whatever group."""
    from flexkern.model.files import read_files
    from flexkern.model.find import shards

    content, _ = read_files(shards(path), headers=True)
    groups = [value for value in content.values() if isinstance(value, Mapping)]
    return {name: t for group in (content, *groups) for name, t in group.items() if hasattr(t, "numel")}


def data_lines(state: "Mapping[str, Tensor]") -> Lines:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    yield "tensors", f"{len(state):,}, {sum(tensor.numel() for tensor in state.values()):,} parameters"
    room = f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.0f} kB"
    yield "data", f"{counted(dtypes)}, {room}"


def counted(things: Counter[Any]) -> str:
    """The things, with their numbers where there are several."""
    return ", ".join(str(thing) if len(things) == 1 else f"{thing} ({n} times)" for thing, n in things.most_common())


def beside_weights(flag: str, path: Path) -> str:
    return f"{LACKS}add {flag} {copyable(path)} to the command that renders the transformer"


def copyable(path: Path) -> str:
    """A path as one word of a shell's command, which no command takes for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def one_line(text: str) -> str:
    return " ".join(text.split())


KINDS: dict[str, Callable[[Path], Lines]] = {
    "transformer": transformer_lines,
    "LoRA": lora_lines,
    "VAE": vae_lines,
    "tiny VAE": tiny_lines,
    "text encoder": text_lines,
    "embeddings": embeddings_lines,
    "latents": latents_lines,
}
