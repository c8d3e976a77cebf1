"""What the text encoder and the VAE share: their weight files read, and put into a module."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from flexkern.model.files import check_fit, finished, read_files, read_json, select_group


def need(name: str, purpose: str) -> ModuleType:
    """An optional package. Raises ImportError that says what to install, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f'{purpose} needs {name}: pip install "flexkern[model]"') from error


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
    return finished(module, where)
