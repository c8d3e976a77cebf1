"""Which backend runs where none is named: ``auto``, the default of every door.

It takes ``triton`` on a CUDA GPU that can run it with the model's heads and dtype, and ``sdpa`` elsewhere. All of that
is known before anything runs, so that auto never ends in a compiler's error. A backend that is named is never replaced.
"""

import logging
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from flexkern.backends import Backend, get_backend, runs_in_interpreter, why_not

AUTO = "auto"
ABOUT = "triton on a CUDA GPU that can run it with the model's heads and dtype, else sdpa"
LOG = logging.getLogger("flexkern")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend that runs, and why it is that one."""

    name: str
    """a key of ``flexkern.backends.BACKENDS``"""
    why: str

    def __str__(self) -> str:
        return f"backend {self.name}: {self.why}"


def choose_backend(
    asked: str = AUTO, device: torch.device | str = "cpu", *, head_dim: int, dtype: torch.dtype
) -> Choice:
    """The backend to run on a device, for a model.

    Args:
        asked: "auto", or a key of ``flexkern.backends.BACKENDS``, which is then the choice.
        device: Where its tensors will be.
        head_dim: Channels of a head.
        dtype: Of queries, keys and values.

    Raises:
        ValueError: The backend that was asked for cannot run there, or no backend has that name; says why.
    """
    device = torch.device(device)
    if asked != AUTO:
        get_backend(asked, device, head_dim=head_dim, dtype=dtype)
        kernel = f"; {_kernel(device, head_dim, dtype)}" if asked == "triton" else ""
        return Choice(name=asked, why=f"asked for by name{kernel}")
    if device.type != "cuda":
        return Choice(name="sdpa", why=f"auto, since device '{device}' is not a CUDA GPU")
    why = why_not("triton", device, head_dim=head_dim, dtype=dtype)
    if why is None and runs_in_interpreter():
        why = "TRITON_INTERPRET is set, and its interpreter is slow"
    if why is None:
        try:
            if (why := lacking_compiler()) is None:
                return Choice(name="triton", why=f"auto; {_kernel(device, head_dim, dtype)}")
        except Exception as error:  # whatever a broken installation raises
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Choice(name="sdpa", why=f"auto, since triton cannot be taken: {why}")


def open_backend(
    asked: str | Choice = AUTO, device: torch.device | str = "cpu", *, head_dim: int, dtype: torch.dtype
) -> tuple[Backend, Choice]:
    """The backend that ``choose_backend`` names, and its choice, which is told to the logger ``flexkern`` once.

    Args and Raises: those of ``choose_backend``; ``asked`` may be what that returned.
    """
    choice = asked if isinstance(asked, Choice) else choose_backend(asked, device, head_dim=head_dim, dtype=dtype)
    _tell(str(choice))
    return get_backend(choice.name, device, head_dim=head_dim, dtype=dtype), choice


def lacking_compiler() -> str | None:
    """What is missing to build Triton's launcher, a C extension, at the first launch; None where nothing is.

    Where somebody's cache has it built already, ``triton`` runs all the same, asked for by name.
    """
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    if not (knobs.build.cc or shutil.which("gcc") or shutil.which("clang")):
        return "it builds its launcher with a C compiler, and there is neither gcc nor clang, nor one that CC names"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]  # as Triton does
    header = Path(include, "Python.h")
    return None if header.is_file() else f"it builds its launcher as an extension of Python, and there is no {header}"


def validate_backend(asked: str, device: torch.device | str | None = None) -> None:
    """Raises ValueError for a backend that cannot run there, before the model is known."""
    if asked != AUTO:
        get_backend(asked, device)


@cache
def _tell(sentence: str) -> None:
    LOG.info(sentence)


def _kernel(device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """Which attention kernel the backend ``triton`` launches there, and why."""
    from flexkern.kernels.attention.select import selected

    return str(selected(device, head_dim, dtype))
