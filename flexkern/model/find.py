"""Which file is what: transformer, VAE, text encoder and LoRA of a model, recognised by the names of their tensors.

    find_parts("Wan2.1-T2V-1.3B")         a folder of Wan, a folder of diffusers, or a research repository
    find_parts("self_forcing_dmd.pt")     one file, and what lies beside it

Nothing is read but headers: safetensors and torch's zip format are mapped.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexkern.model.files import PICKLES, read_files, some_of
from flexkern.model.weights import LORA_PREFIXES, PREFIXES, clean_name

Kind = Literal["LoRA", "transformer", "text encoder", "VAE", "tiny VAE", "embeddings"]
SIGNS: dict[Kind, str] = {  # what only the tensors of that kind are called, wrappers removed
    "LoRA": r".*\.lora_(A|B|down|up)\.(default\.)?weight",
    "transformer": r"patch_embedding\.weight|(blocks\.\d+\.(self_attn|attn1)\..*)",
    "text encoder": r"(token_embedding|shared)\.weight|encoder\.(embed_tokens|block\.\d+)\..*|blocks\.\d+\.attn\..*",
    "VAE": r"decoder\.(conv1|conv_in)\.weight",
    "tiny VAE": r"decoder\.\d+\.(weight|conv\.0\.weight)",
    "embeddings": r"\d+",  # by number of the prompt
}
SHARD = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?(\.\w+)?\.safetensors"  # a file that stands for its folder
UNMAPPED = 2**30  # bytes; a pickle of the old format can only be looked into by reading all of it
WAN = "wan_models/*"  # where the research repositories keep the folder of Wan
FOLDERS = ("", "checkpoints", "models", "longlive_models/models", WAN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Paths of a model's parts, None for what was not found."""

    transformer: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    loras: tuple[Path, ...] = ()
    """those that lie beside the transformer; none is used unless it is named"""


def kind_of(names: Iterable[str]) -> Kind | None:
    """What tensors of these names make up: a key of ``SIGNS``, None where no sign is known."""
    plain = [clean_name(clean_name(name, LORA_PREFIXES), PREFIXES) for name in names]
    return next((kind for kind, sign in SIGNS.items() if any(re.fullmatch(sign, name) for name in plain)), None)


def tensor_names(content: Mapping[Any, Any]) -> Iterator[str]:
    """Names of the tensors of a file, of all its groups."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from map(str, value)
        else:
            yield str(name)


def identify(file: Path) -> Kind | None:
    """What a weight file is, None for what is not known or cannot be read."""
    if file.suffix not in (".safetensors", *PICKLES):
        return None
    if file.suffix in PICKLES and file.stat().st_size > UNMAPPED and not zipfile.is_zipfile(file):
        return None
    try:
        return kind_of(tensor_names(read_files([file], headers=True)[0]))
    except (ValueError, OSError):
        return None


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
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_file():
        if (kind := identify(path)) not in (None, "transformer"):
            raise ValueError(f"{path} is a {kind}; expected a transformer")
        above = list(path.absolute().parents)[:3]  # a repository keeps its checkpoints up to two folders deep
        transformer, around = path, [path.parent, *(wan for folder in above for wan in _folders(folder, [WAN]))]
    else:
        around = _folders(path, FOLDERS)
        transformer = _choose(path, [item for kind, item in _holdings(around) if kind == "transformer"], prefer)
        around += [path.parent] * (path.name == "transformer")
    found: dict[Kind, list[Path]] = {kind: [] for kind in SIGNS}
    for known, item in _holdings(around):
        found[known].append(item)
    return Found(
        transformer=transformer,
        vae=next(iter(found["VAE"] + found["tiny VAE"]), None),
        text_encoder=next(iter(found["text encoder"]), None),
        loras=tuple(found["LoRA"]),
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
    if not path.exists():
        raise FileNotFoundError(f"there is no {kinds[0]} at {path}")
    found = holdings(path)
    for kind, item in found:
        if kind is not None and kind in kinds:
            return kind, item
    others = [f"{item.name} ({kind or 'unknown'})" for kind, item in found]
    raise ValueError(f"{path} is not a {expected}: there is {some_of(others)}")


def holdings(path: str | Path) -> list[tuple[Kind | None, Path]]:
    """Kind and path of everything known in a folder, or of the one file. Raises FileNotFoundError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    return [(identify(path), path)] if path.is_file() else [*_holdings(_folders(path, FOLDERS))]


def shards(path: Path) -> list[Path]:
    """The weight files of a path that ``holdings`` gives."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if re.fullmatch(SHARD, file.name))


def _folders(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Folders to look into; ``""`` is the folder itself."""
    found = [[folder] if not pattern else sorted(folder.glob(pattern)) for pattern in patterns]
    return [path for paths in found for path in paths if path.is_dir()]


def _holdings(folders: Iterable[Path]) -> Iterator[tuple[Kind, Path]]:
    """Kind and path of everything known in the folders; a folder of shards, or of diffusers, counts as one."""
    of_diffusers: dict[Kind, str] = {"transformer": "transformer", "VAE": "vae", "text encoder": "text_encoder"}
    for folder in dict.fromkeys(folders):
        for kind, name in of_diffusers.items():
            if (folder / name).is_dir():
                yield kind, folder if kind == "transformer" else folder / name
        whole: set[Kind] = set()
        for file in sorted(folder.iterdir()):
            found = identify(file) if file.is_file() else None
            if found and re.fullmatch(SHARD, file.name):
                whole.add(found)
            elif found:
                yield found, file
        yield from ((kind, folder) for kind in sorted(whole))


def _choose(path: Path, found: Sequence[Path], prefer: Sequence[str]) -> Path:
    preferred = [item for name in prefer for item in found if item.name == name]
    if preferred:
        return preferred[0]
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted(item.name for item in path.iterdir())
        raise ValueError(f"no transformer in {path}; there is {some_of(there)}")
    raise ValueError(f"several transformers in {path}: {', '.join(map(str, found))}; name one of them")
