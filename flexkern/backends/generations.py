"""Which FlashAttention is installed, and which of them a GPU runs: 4, 3 or 2. Looks without importing any.

The three are packages of their own, whose ``flash_attn_func`` agree in the first three arguments and in the names
``softmax_scale`` and ``causal``; the fourth argument by position is another one in each. All take [B, tokens, H, D].

Source: the signatures in flash_attn_4 4.0.0b15 and 4.0.0b36 (flash_attn/cute/interface.py), flash-attention's
hopper/flash_attn_interface.py, and flash_attn 2.8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One FlashAttention.

    Attributes:
        number: 4, 3 or 2.
        distribution: What pip calls it.
        module: That holds ``flash_attn_func``.
    """

    number: int
    distribution: str
    module: str

    def is_installed(self) -> bool:
        """Whether its files are there. Version 4 is a folder in the package of version 2, which may be missing."""
        package, _, within = self.module.partition(".")
        spec = find_spec(package)
        if spec is None:
            return False
        if within:
            return PathFinder.find_spec(self.module, spec.submodule_search_locations) is not None
        return spec.origin is not None  # a folder without __init__.py is what version 4 alone leaves

    def most(self, capability: tuple[int, int]) -> int:
        """The widest head that it takes on a GPU of that compute capability."""
        return 128 if self.number == 4 and capability[0] != 9 else 256

    def __str__(self) -> str:
        try:
            return f"FlashAttention-{self.number} ({self.distribution} {version(self.distribution)})"
        except PackageNotFoundError:
            return f"FlashAttention-{self.number} ({self.distribution})"


GENERATIONS = {
    4: Generation(number=4, distribution="flash-attn-4", module="flash_attn.cute"),
    3: Generation(number=3, distribution="flash_attn_3", module="flash_attn_interface"),
    2: Generation(number=2, distribution="flash-attn", module="flash_attn"),
}
# by the major compute capability, the one to prefer first: 4 is written for Hopper and Blackwell, 3 for Hopper alone
PREFERRED = {8: (2, 4), 9: (4, 3, 2), 10: (4, 2), 11: (4, 2), 12: (4, 2)}


def installed() -> list[Generation]:
    """Those whose files are there, newest first."""
    return [generation for generation in GENERATIONS.values() if generation.is_installed()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The FlashAttention that runs.

    Attributes:
        generation: Which.
        attend: Its ``flash_attn_func``.
        broken: What is installed, preferred, and cannot be imported, each with its error.
    """

    generation: Generation
    attend: Callable[..., Any]
    broken: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([str(self.generation), *(f"cannot import {fault}" for fault in self.broken)])


@cache
def choose(capability: tuple[int, int]) -> Chosen:
    """The best of what is installed that a GPU of that compute capability runs.

    Raises:
        ImportError: None is; the message says what is there and why it does not run.
    """
    faults, there = [], installed()
    order = [GENERATIONS[number] for number in PREFERRED.get(capability[0], ())]
    for generation in [generation for generation in order if generation in there]:
        try:
            attend = import_module(generation.module).flash_attn_func
        except Exception as error:  # a package built for another torch or CUDA may raise anything
            faults.append(f"{generation}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        return Chosen(generation=generation, attend=attend, broken=tuple(faults))
    wanted = " or ".join(f"FlashAttention-{generation.number}" for generation in order) or "no FlashAttention"
    found = "; ".join(faults or map(str, there)) or "none"
    gpu = ".".join(map(str, capability))
    raise ImportError(f"a GPU of compute capability {gpu} runs {wanted}, and there is {found}")


def choose_for(device: torch.device | str | None = None) -> Chosen:
    """``choose`` for a CUDA device; the current one if None."""
    return choose(torch.cuda.get_device_capability(device))
