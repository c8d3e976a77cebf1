"""What the text encoder and the VAE share: their weight files found in a model folder, read, and put into a module."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from flexkern.model.weights import check_fit, read_files, read_json, select_group, some_of


def need(name: str, purpose: str) -> ModuleType:
    """An optional package. Raises ImportError that says what to install, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f'{purpose} needs {name}: pip install "flexkern[model]"') from error


def find_part(path: Path, folder: str, patterns: Iterable[str]) -> list[Path]:
    """The weight files of a part of a model: the file itself, or those in its folder that match the first pattern.

    folder: name of the part's folder in the diffusers layout. An index beside shards must find all of them.
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


def read_part(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of the files, mapped where they can be. Raises ValueError for what is no plain state dict."""
    content, _ = read_files(files)
    state = dict(select_group(content, ("state_dict",), files[0], flat=True)[1])
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{files[0]}: {key} is {type(tensor).__name__}; expected tensors alone")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{files[0]}: {key} is {tensor.dtype}; expected floating point, not quantised weights")
    return state


def declared(files: list[Path]) -> dict:
    """What the config.json beside the files says; ``{}`` where there is none."""
    return read_json(files[0].with_name("config.json"))


def fill(
    make: Callable[[], nn.Module], state: dict[str, Tensor], where: str, *, dtype: torch.dtype,
    device: str | torch.device, ties: Mapping[str, str] | None = None,
) -> nn.Module:  # fmt: skip
    """The module with every tensor of the state, in eval mode, without gradients. Empties ``state``.

    ties: names of the module's state dict that hold the same tensor as another name.
    Bytes: the module alone; what needs no conversion stays mapped to its file, and the system may drop its pages.
    Raises: ValueError that lists the missing, unexpected and wrongly shaped keys.
    """
    ties = ties or {}
    with torch.device("meta"):
        module = make()
    check_fit(state, {key: tensor for key, tensor in module.state_dict().items() if key not in ties}, where)
    placed = {key: state.pop(key).to(device, dtype) for key in list(state)}
    module.load_state_dict(placed | {name: placed[of] for name, of in ties.items()}, assign=True)
    hollow = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if hollow:
        raise RuntimeError(f"{where} left tensors of the module without data: {some_of(hollow)}")
    return module.eval().requires_grad_(False)
