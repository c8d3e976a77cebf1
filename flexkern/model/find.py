"""Which file is what: transformer, VAE, text encoder and LoRA of a model, recognised by the names of their tensors.

    find_parts("Wan2.1-T2V-1.3B")         a folder of Wan, a folder of diffusers, or a research repository
    find_parts("self_forcing_dmd.pt")     one file, and what lies beside it

Nothing is read but headers: safetensors and torch's zip format are mapped.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from flexkern.model.files import read_files, some_of
from flexkern.model.intact import looks_like_weights, require_there, validate_folder, validate_form
from flexkern.model.names import EMA_GROUPS, FLAT_PREFIX, RAW_GROUPS, clean_lora_name

Kind = Literal["LoRA", "transformer", "text encoder", "VAE", "tiny VAE", "embeddings", "latents"]
_HALVES = r"lora_(A|B|down|up)(\.([\w-]+\.)?weight)?|lora\.(down|up)\.weight"
_VARIANTS = "hada_w1_a|lokr_w1(_a)?|oft_\\w+"  # of LoRA, which are refused by name
SIGNS: dict[Kind, str] = {  # what only the tensors of that kind are called, wrappers removed
    "LoRA": rf".*\.({_HALVES}|diff(_b|_m)?|{_VARIANTS})|{FLAT_PREFIX}.*",
    "transformer": r"patch_embedding\.weight|(blocks\.\d+\.(self_attn|attn1)\..*)",
    "text encoder": r"(token_embedding|shared)\.weight|encoder\.(embed_tokens|block\.\d+)\..*|blocks\.\d+\.attn\..*",
    "VAE": r"decoder\.(conv1|conv_in)\.weight",
    "tiny VAE": r"decoder\.\d+\.(weight|conv\.0\.weight)",
    "embeddings": r"\d+",  # by number of the prompt
    "latents": r"latents",  # of a render
}
SHARD = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?(\.\w+)?\.safetensors"  # a file that stands for its folder
HEADS = {*EMA_GROUPS, *RAW_GROUPS, "critic"}  # may stand in front of a name, as the group it is in
UNMAPPED = 2**30  # bytes; a pickle of the old format can only be looked into by reading all of it
WAN = ("wan_models/*", "checkpoints/Wan2.1*")  # where the research repositories keep the folder of Wan
FOLDERS = ("", "checkpoints", "models", "longlive_models/models", "checkpoints/Reward-Forcing*", *WAN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Paths of a model's parts, None for what was not found."""

    transformer: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    loras: tuple[Path, ...] = ()
    """those that lie beside the transformer; none is used unless it is named"""
    unread: tuple[str, ...] = ()
    """why files with the names of weights are none, one sentence each"""


class Holding(NamedTuple):
    """One part, or a file that should be one."""

    kind: Kind | None
    path: Path
    why: str = ""
    """why it cannot be read, where it cannot"""


def kind_of(names: Iterable[str]) -> Kind | None:
    """What tensors of these names make up: a key of ``SIGNS``, None where no sign is known."""
    plain = [_bare(name) for name in names]
    return next((kind for kind, sign in SIGNS.items() if any(re.fullmatch(sign, name) for name in plain)), None)


def _bare(name: str) -> str:
    head, _, rest = (cleaned := clean_lora_name(name)).partition(".")
    return clean_lora_name(rest) if head in HEADS and rest else cleaned


def tensor_names(content: Mapping[Any, Any]) -> Iterator[str]:
    """Names of the tensors of a file, of all its groups."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from tensor_names(value)
        elif isinstance(value, Tensor):
            yield str(name)


def identify(file: Path) -> Holding:
    """What a weight file is: without a kind where its names are unknown, or it cannot be read."""
    if not file.exists():
        return Holding(None, file, f"{file} is a link to a file that is not there")
    try:
        if validate_form(file) == "pickle" and file.stat().st_size > UNMAPPED:
            return Holding(None, file)
        return Holding(kind_of(tensor_names(read_files([file], headers=True)[0])), file)
    except (ValueError, OSError, NotImplementedError) as error:
        return Holding(None, file, str(error))


def find_parts(path: str | Path, *, prefer: Sequence[str] = ()) -> Found:
    """The parts of the model at a path.

    Args:
        path: A weight file, or a folder of Wan, of diffusers or of a research repository.
        prefer: Names of files to take where a folder holds several transformers, the best first.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The path is something else, or holds no transformer or several.
    """
    path = Path(path)
    require_there(path, "checkpoint")
    if path.is_file():
        if (kind := identify(path).kind) not in (None, "transformer"):
            raise ValueError(f"{path} {is_a(kind)}; expected a transformer")
        above = list(path.absolute().parents)[:3]  # a repository keeps its checkpoints up to two folders deep
        transformer, around = path, [path.parent, *(wan for folder in above for wan in _folders(folder, WAN))]
    else:
        validate_folder(path)
        around = _folders(path, FOLDERS)
        transformer = _choose(path, [*_holdings(around)], prefer)
        around += [path.parent] * (path.name == "transformer")
    found: dict[Kind | None, list[Path]] = {kind: [] for kind in (*SIGNS, None)}
    held = [*_holdings(around)]
    for known in held:
        found[known.kind].append(known.path)
    return Found(
        transformer=transformer,
        vae=next(iter(found["VAE"] + found["tiny VAE"]), None),
        text_encoder=next(iter(found["text encoder"]), None),
        loras=tuple(found["LoRA"]),
        unread=tuple(known.why for known in held if known.why and known.path != transformer),
    )


def find_part(path: str | Path, kinds: Sequence[Kind]) -> tuple[Kind, Path]:
    """The kind and the path of one part, looked for in a file or folder.

    Args:
        path: A weight file, or a folder that holds the part.
        kinds: Those that will do.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Says what is there instead.
    """
    path = Path(path)
    expected = " or ".join(kinds)
    require_there(path, kinds[0])
    found = holdings(path)
    for held in found:
        if held.kind is not None and held.kind in kinds:
            return held.kind, held.path
    if unread := [held.why for held in found if held.why]:
        raise ValueError(unread[0])
    others = [f"{held.path.name} ({held.kind or 'unknown'})" for held in found]
    raise ValueError(f"{path} is not a {expected}: there is {some_of(others)}")


def is_a(kind: Kind) -> str:
    """What a file of that kind is, as the end of a sentence."""
    return f"holds {kind}" if kind in ("embeddings", "latents") else f"is a {kind}"


def holdings(path: str | Path) -> list[Holding]:
    """Everything known in a folder and the weight files that cannot be read, or the one file.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    path = Path(path)
    require_there(path, "weights")
    if path.is_file():
        return [identify(path)]
    validate_folder(path)
    return [*_holdings(_folders(path, FOLDERS))]


def shards(path: Path) -> list[Path]:
    """The weight files of a path that ``holdings`` gives."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if re.fullmatch(SHARD, file.name))


def _folders(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Folders to look into; ``""`` is the folder itself."""
    found = [[folder] if not pattern else sorted(folder.glob(pattern)) for pattern in patterns]
    return [path for paths in found for path in paths if path.is_dir()]


def _holdings(folders: Iterable[Path]) -> Iterator[Holding]:
    """Everything known in the folders and what cannot be read; a folder of shards, or of diffusers, counts as one."""
    of_diffusers: dict[Kind, str] = {"transformer": "transformer", "VAE": "vae", "text encoder": "text_encoder"}
    for folder in dict.fromkeys(folders):
        for kind, name in of_diffusers.items():
            if (folder / name).is_dir():
                yield Holding(kind, folder if kind == "transformer" else folder / name)
        whole: set[Kind] = set()
        for file in sorted(folder.iterdir()):
            if not looks_like_weights(file) or (file.exists() and not file.is_file()):
                continue  # whoever opens a pipe waits for somebody to write
            held = identify(file)
            if held.kind and re.fullmatch(SHARD, file.name):
                whole.add(held.kind)
            elif held.kind or held.why:
                yield held
        yield from (Holding(kind, folder) for kind in sorted(whole))


def _choose(path: Path, held: Sequence[Holding], prefer: Sequence[str]) -> Path:
    """The transformer among what a folder holds."""
    found = [known.path for known in held if known.kind == "transformer"]
    preferred = [item for name in prefer for item in found if item.name == name]
    if preferred:
        return preferred[0]
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted(item.name for item in path.iterdir())
        unread = [known.why for known in held if known.why]
        raise ValueError(f"no transformer in {path}; {unread[0] if unread else f'there is {some_of(there)}'}")
    raise ValueError(f"several transformers in {path}: {', '.join(map(str, found))}; name one of them")
