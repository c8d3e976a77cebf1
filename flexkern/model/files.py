"""Weight files of any part of a model: found in a folder, read without unpickling code, fitted into a module."""

import importlib
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexkern.model.intact import Nothing, require_there, validate_folder, validate_form

CONFIGURATIONS = (
    "argparse.",
    "pathlib.",
    "omegaconf.",
    "easydict.",
    "ml_collections.",
    "lightning",
    "pytorch_lightning",
)
SHARD_NUMBER = re.compile(r"(.+-)(\d+)-of-(\d+)(\..+)")  # as in model-00001-of-00003.safetensors
Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "I16": torch.int16}
DTYPES |= {"I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}


def find_files(path: Path, folder: str, patterns: Iterable[str]) -> list[Path]:
    """The weight files of a part of a model: the file itself, or those in its folder that match the first pattern.

    Args:
        path: The file or the folder.
        folder: Name of the part's folder in the diffusers layout.
        patterns: Names of the part's files, as ``glob`` takes them, the preferred one first.

    Raises:
        FileNotFoundError: Nothing fits, or a shard that the index beside them names is not there.
    """
    require_there(path, "weights")
    if path.is_file():
        _validate_alone(path)
        return [path]
    validate_folder(path)
    within = path / folder if (path / folder).is_dir() else path
    for pattern in patterns:
        index = within / f"{pattern.replace('*', '')}.index.json"  # as transformers and diffusers name it
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if absent := [name for name in names if not (within / name).is_file()]:
            raise FileNotFoundError(f"{index} names files that are not there, {some_of(absent)}")
        if files := [within / name for name in names] or sorted(within.glob(pattern)):
            _validate_shards(files)
            return files
    found = sorted(file.name for file in within.iterdir())
    raise FileNotFoundError(f"no weights in {within}: looked for {', '.join(patterns)}; there is {some_of(found)}")


def _validate_alone(file: Path) -> None:
    """Raises ValueError for one of several shards, which are read together."""
    if (named := SHARD_NUMBER.fullmatch(file.name)) and int(named[3]) > 1:
        raise ValueError(f"{file} is one of the {int(named[3])} shards of a model: give their folder, {file.parent}")


def _validate_shards(files: Sequence[Path]) -> None:
    """Raises FileNotFoundError where the names of shards, of which there is no index, tell that one is not there."""
    there = {file.name for file in files}
    for file in files:
        if named := SHARD_NUMBER.fullmatch(file.name):
            count, digits = int(named[3]), len(named[2])
            all_of = (f"{named[1]}{number:0{digits}}-of-{named[3]}{named[4]}" for number in range(1, count + 1))
            if len(there) < count and (absent := [name for name in islice(all_of, 100_000) if name not in there]):
                raise FileNotFoundError(
                    f"{file} is one of {count} shards, not all of which are there: {some_of(absent)}"
                )


def read_files(files: list[Path], *, headers: bool = False) -> tuple[dict[Any, Any], dict[str, str]]:
    """Everything that the files hold at the top level, and the metadata of the safetensors among them.

    Args:
        files: Weight files whose names do not repeat.
        headers: Read tensors of safetensors without their data, on the device "meta".

    Raises:
        ValueError: A file is something else, cut off, cannot be read as tensors alone, or repeats keys of another one.
        NotImplementedError: A format that is not read.
        OSError: A file cannot be mapped.
    """
    content: dict[Any, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        form = validate_form(file)
        safe = form == "safetensors"
        held, notes = _read_safetensors(file, headers) if safe else (_read_pickle(file, mapped=form == "zip"), {})
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


def read_tensor(file: Path, name: str) -> Tensor | None:
    """The tensor of that name of a safetensors file, whatever wrapper its name has; None where there is none."""
    with safe_open(file, framework="pt") as handle:
        found = [key for key in handle.keys() if f".{key}".endswith(f".{name}")]  # noqa: SIM118
        tensor: Tensor | None = handle.get_tensor(found[0]) if found else None
        return tensor


def _hollow(slice_: Any) -> Tensor:
    """A tensor of the size and dtype of a slice of a safetensors file; of an unknown dtype as 8-bit integers."""
    return torch.empty(slice_.get_shape(), dtype=DTYPES.get(slice_.get_dtype(), torch.uint8), device="meta")


def _read_pickle(file: Path, *, mapped: bool) -> dict[Any, Any]:
    """What torch.save wrote, read without running code of the file."""
    try:  # only the zip format can be mapped
        with torch.serialization.safe_globals(_harmless(file, mapped=mapped)), file.open("rb") as stream:
            named = mapped and file.suffix.lower() != ".safetensors"  # which torch takes at its word
            content = torch.load(file if named else stream, map_location="cpu", weights_only=True, mmap=named)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError) as error:
        found = re.search(r"(GLOBAL|Unsupported operand) \S+", str(error))
        reason = found[0] if found else re.split(r"\.\s|\n", str(error))[0] or "end of file"
        raise ValueError(f"{file} cannot be read as tensors alone ({reason}); save its state dict by itself") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    return dict(content)


def _harmless(file: Path, *, mapped: bool) -> list[Any]:
    """What may stand beside tensors: NumPy's numbers and arrays, and a run's configuration, which becomes nothing."""
    import numpy

    try:
        core = importlib.import_module("numpy._core.multiarray")
    except ModuleNotFoundError:
        core = importlib.import_module("numpy.core.multiarray")
    names = [(room, name) for room in ("core", "_core") for name in ("scalar", "_reconstruct")]
    makers = [_named(f"numpy.{room}.multiarray.{name}", getattr(core, name)) for room, name in names]
    kinds = {type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code != "O"}
    held = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mapped else []
    skipped = [_named(name, Nothing) for name in held if name.startswith(CONFIGURATIONS)]
    return [*makers, numpy.dtype, numpy.ndarray, *kinds, *skipped]


def _named(full: str, made_with: Callable[..., Any]) -> Any:
    """What is called, or made, under that full name; torch looks at the name alone."""
    module, _, name = full.rpartition(".")
    if isinstance(made_with, type):
        return type(name, (made_with,), {"__module__": module})
    call = lambda *arguments: made_with(*arguments)
    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ``{}`` where there is no file."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not hold a JSON object: {error}") from error


def select_group(
    content: Mapping[Any, Any], groups: Sequence[str], path: Path, *, flat: bool, heads: Iterable[str] = ()
) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
    """The first of the groups that is there, or, where that is allowed, the top level itself.

    Args:
        content: What a file holds at its top level.
        groups: Names of groups, the best first.
        path: For the message.
        flat: Whether tensors without a group will do.
        heads: Groups that may be the first word of flat names, as Lightning has them.

    Returns:
        Name and content of the group, and the names of the others.

    Raises:
        ValueError: Says which groups there are.
    """
    named = _groups_of(content, groups, set(heads))
    for name in (*groups, "flat") if flat else groups:
        if named.get(name):
            return name, named[name], tuple(other for other in named if other != name)
    known = [*groups[:3], *["..."] * (len(groups) > 3), *["flat tensors"] * flat]
    raise ValueError(f"{path} does not hold {' | '.join(known)}; it holds {', '.join(named) or 'no tensors'}")


def _groups_of(content: Mapping[Any, Any], groups: Sequence[str], heads: set[str]) -> dict[str, dict[str, Any]]:
    """The groups of tensors by name, "flat" for tensors without one; a group of groups is followed down."""
    named = {str(key): _texted(value) for key, value in content.items() if isinstance(value, Mapping)}
    if not named and any(isinstance(value, Tensor) for value in content.values()):
        named = {"flat": _texted(content)}
    for name, held in list(named.items()):
        inner = {key: _texted(value) for key, value in held.items() if isinstance(value, Mapping)}
        wanted = next((key for key in groups if inner.get(key)), None)
        if wanted is not None and not any(isinstance(value, Tensor) for value in held.values()):
            named[name] = held = inner[wanted]
        plain: dict[str, Any] = {}
        for key, value in held.items():
            head, _, rest = key.removeprefix("module.").partition(".")
            if rest and head in heads:
                named[head] = named.get(head, {})
                named[head][rest] = value
            else:
                plain[key] = value
        named[name] = plain
    return {name: held for name, held in named.items() if held or name in content}


def _texted(group: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in group.items()}


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
