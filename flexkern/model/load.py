"""What the text encoder and the VAE share: their weight files read, and put into a module."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkern.model.files import Module, finished, read_files, read_json, select_group, validate_fit


def need(name: str, purpose: str) -> Any:
    """An optional package. Raises ImportError that says what to install, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f'{purpose} needs {name}: pip install "flexkern[model]"') from error


def read_part(files: list[Path], *, headers: bool = False) -> dict[str, Tensor]:
    """The tensors of the files, mapped where they can be. Raises ValueError for what is no plain state dict."""
    content, _ = read_files(files, headers=headers)
    state = dict(select_group(content, ("state_dict",), files[0], flat=True)[1])
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{files[0]}: {key} is {type(tensor).__name__}; expected tensors alone")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{files[0]}: {key} is {tensor.dtype}; expected floating point, not quantised weights")
    return state


def declared(files: list[Path]) -> dict[str, Any]:
    """What the config.json beside the files says; ``{}`` where there is none."""
    return read_json(files[0].with_name("config.json"))


def fitting(
    make: Callable[[], Module], state: Mapping[str, Tensor], where: str, *, ties: Mapping[str, str] | None = None
) -> Module:
    """The module without data, on the device "meta", that the state fits.

    Args:
        make: Builds the module.
        state: Its tensors by name; only their shapes are looked at.
        where: Names the files in the error.
        ties: Names of the module's state dict that hold the same tensor as another name.

    Raises:
        ValueError: Lists the missing, unexpected and wrongly shaped keys.
    """
    with torch.device("meta"):
        module = make()
    expected = {key: tensor for key, tensor in module.state_dict().items() if key not in (ties or {})}
    validate_fit(state, expected, where)
    return module


def fill(
    make: Callable[[], Module], state: dict[str, Tensor], where: str, *, dtype: torch.dtype,
    device: str | torch.device, ties: Mapping[str, str] | None = None,
) -> Module:  # fmt: skip
    """The module with every tensor of the state, in eval mode, without gradients. Empties ``state``.

    Bytes: the module alone; what needs no conversion stays mapped to its file, and the system may drop its pages.
    Args and Raises: as in ``fitting``.
    """
    module = fitting(make, state, where, ties=ties)
    placed = {key: state.pop(key).to(device, dtype) for key in list(state)}
    module.load_state_dict(placed | {name: placed[of] for name, of in (ties or {}).items()}, assign=True)
    return finished(module, where)
