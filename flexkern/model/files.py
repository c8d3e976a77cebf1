"""Weight files of any part of a model: found in a folder, read without unpickling code, fitted into a module."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def find_files(path: Path, folder: str, patterns: Iterable[str]) -> list[Path]:
    """The weight files of a part of a model: the file itself, or those in its folder that match the first pattern.

    Args:
        path: The file or the folder.
        folder: Name of the part's folder in the diffusers layout.
        patterns: Names of the part's files, as ``glob`` takes them, the preferred one first.

    Raises:
        FileNotFoundError: Nothing fits, or a shard that the index beside them names is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.is_file():
        return [path]
    within = path / folder if (path / folder).is_dir() else path
    for pattern in patterns:
        index = within / f"{pattern.replace('*', '')}.index.json"  # as transformers and diffusers name it
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if absent := [name for name in names if not (within / name).is_file()]:
            raise FileNotFoundError(f"{index} names files that are not there, {some_of(absent)}")
        if files := [within / name for name in names] or sorted(within.glob(pattern)):
            return files
    found = sorted(file.name for file in within.iterdir())
    raise FileNotFoundError(f"no weights in {within}: looked for {', '.join(patterns)}; there is {some_of(found)}")


def read_files(files: list[Path], *, headers: bool = False) -> tuple[dict[Any, Any], dict[str, str]]:
    """Everything that the files hold at the top level, and the metadata of the safetensors among them.

    Args:
        files: Weight files whose names do not repeat.
        headers: Read tensors of safetensors without their data, on the device "meta".

    Raises:
        ValueError: A file cannot be read as tensors alone, or repeats keys of another one.
        OSError: A file cannot be mapped.
    """
    content: dict[Any, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        held, notes = _read_safetensors(file, headers) if safe else (_read_pickle(file), {})
        if twice := content.keys() & held.keys():
            raise ValueError(f"{file} repeats keys of another shard, {some_of(sorted(twice))}")
        content, metadata = content | held, metadata | notes
    return content, metadata


def _read_safetensors(file: Path, headers: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:  # torch maps a file only where all of it would fit into memory
        with safe_open(file, framework="numpy" if headers else "pt") as handle:
            read = (lambda key: _hollow(handle.get_slice(key))) if headers else handle.get_tensor
            return {key: read(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    except RuntimeError as error:
        raise OSError(f"{file} cannot be mapped: {error}") from error


def _hollow(slice_: Any) -> Tensor:
    """A tensor of the size and dtype of a slice of a safetensors file; of an unknown dtype as 8-bit integers."""
    return torch.empty(slice_.get_shape(), dtype=DTYPES.get(slice_.get_dtype(), torch.uint8), device="meta")


def _read_pickle(file: Path) -> dict[Any, Any]:
    if file.suffix not in PICKLES:
        raise ValueError(f"{file}: expected .safetensors, {', '.join(PICKLES)}, got {file.suffix!r}")
    try:  # only the zip format of torch.save can be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        found = re.search(r"(GLOBAL|Unsupported operand) \S+", str(error))
        reason = found[0] if found else re.split(r"\.\s|\n", str(error))[0] or "end of file"
        raise ValueError(f"{file} cannot be read as tensors alone ({reason}); save its state dict by itself") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    return dict(content)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ``{}`` where there is no file."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not hold a JSON object: {error}") from error


def select_group(
    content: Mapping[Any, Any], groups: Sequence[str], path: Path, *, flat: bool
) -> tuple[str, Mapping[Any, Any]]:
    """The first of the groups that is there, or, where that is allowed, the top level itself."""
    held = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
    if not held and any(isinstance(value, Tensor) for value in content.values()):
        held, content = ["flat"], {"flat": content}
    for name in (*groups, "flat") if flat else groups:
        if name in held and content[name]:
            return name, content[name]
    expected = " | ".join((*groups, "flat tensors") if flat else groups)
    raise ValueError(f"{path} does not hold {expected}; it holds {', '.join(held) or 'no tensors'}")


def some_of(names: Iterable[str]) -> str:
    """How many names there are and the first eight."""
    names = list(names)
    return f"{len(names)}{': ' if names else ''}{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def validate_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError that lists what is missing, unexpected or of another shape."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = {key: (list(state[key].shape), list(expected[key].shape)) for key in expected if key in state}
    wrong = [f"{key} {got} instead of {want}" for key, (got, want) in shapes.items() if got != want]
    if missing or unexpected or wrong:
        what = f"missing {some_of(missing)}; unexpected {some_of(unexpected)}; wrongly shaped {some_of(wrong)}"
        raise ValueError(f"{where} does not fit the model: {what}")


def finished(model: Module, where: str) -> Module:
    """The model in eval mode, without gradients. Raises RuntimeError where it still holds tensors without data."""
    hollow = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if hollow:
        raise RuntimeError(f"{where} left tensors without data: {some_of(hollow)}")
    return model.eval().requires_grad_(False)
