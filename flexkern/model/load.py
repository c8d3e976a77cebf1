"""What the text encoder and the VAE share: their weight files read, and put into a module."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkern.model.files import Module, finished, read_files, read_json, select_group, validate_fit
from flexkern.model.merge import validate_finite
from flexkern.model.names import RAW_GROUPS, clean_name
from flexkern.model.quantized import dequantized, refuse_quantized, split_scales


def need(name: str, purpose: str) -> Any:
    """An optional package. Raises ImportError that says what to install, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f'{purpose} needs {name}: pip install "flexkern[model]"') from error


def read_part(files: list[Path], *, headers: bool = False) -> dict[str, Tensor]:
    """The tensors of the files under bare names, mapped where they can be; float8 with scales beside it as it is.

    Raises:
        ValueError: A file is no plain state dict.
        NotImplementedError: It is quantised in another way than float8.
    """
    content, _ = read_files(files, headers=headers)
    held = select_group(content, RAW_GROUPS, files[0], flat=True)[1]
    state: dict[str, Tensor] = {}
    for key, tensor in held.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{files[0]}: {key} is {type(tensor).__name__}; expected tensors alone")
        name = clean_name(key)
        if name in state:
            raise ValueError(f"{files[0]} holds {name} twice, the second time as {key}")
        state[name] = tensor
    refuse_quantized(state, files[0])
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
    weights, _ = split_scales(state, where)
    return _hollow(make, weights, where, ties or {})


def _hollow(make: Callable[[], Module], weights: Mapping[str, Tensor], where: str, ties: Mapping[str, str]) -> Module:
    with torch.device("meta"):
        module = make()
    expected = {key: tensor for key, tensor in module.state_dict().items() if key not in ties}
    validate_fit(weights, expected, where)
    return module


def fill(
    make: Callable[[], Module], state: dict[str, Tensor], where: str, *, dtype: torch.dtype,
    device: str | torch.device, ties: Mapping[str, str] | None = None,
) -> Module:  # fmt: skip
    """The module with every tensor of the state, in eval mode, without gradients. Empties ``state``.

    Numerics: float8 times its scale is computed in float32; each tensor is rounded once, to dtype.
    Bytes: the module alone; what needs no conversion stays mapped to its file, and the system may drop its pages.
    Args and Raises: as in ``fitting``; ValueError as well where a tensor is not finite, in the file or in dtype.
    """
    weights, scales = split_scales(state, where)
    state.clear()
    module, placed = _hollow(make, weights, where, ties or {}), dict[str, Tensor]()
    for key in list(weights):
        exact = weights.pop(key)
        exact = dequantized(exact, scales[key], device) if key in scales else exact
        placed[key] = exact.to(device, dtype)
        validate_finite(key, placed[key], exact, where)
    module.load_state_dict(placed | {name: placed[of] for name, of in (ties or {}).items()}, assign=True)
    return finished(module, where)
