"""Which attention kernel a call launches, and with which tile: decided before the launch, from what is known then.

``select`` is the decision, a pure function of the GPU's architecture, Triton's version, head dim and dtype. Nothing
else matters: both kernels take any number of tokens and frames, a bias, a log-sum-exp, and angles by head. ``selected``
asks the device for the first two, once.

    path        GPU       dtype                    head dim            Triton         tile
    hopper      sm_90     bfloat16, float16        64, 128             3.6 to 3.9     its own
    portable    sm_80 on  those and float32        16, 32, 64, 128     3.4 on         kept.py, else tiles.py

On an NVIDIA H200 the Hopper kernel took 0.555 to 0.639 of the portable kernel's time (path="hopper" set by hand, commit
fd667e99b2, 2026-11-26; the portable kernel with an older tile). That this module selects it has not run on a GPU yet.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .. import HOPPER, HOPPER_LAST, require_triton, triton_version
from ..common import INTERPRETED
from ..gpus import arch_of, dtype_name, unfit_for_hopper
from .hopper_variants import SELECTED
from .kept import find_kept
from .tiles import FLOAT32, INTERPRETER, MEASURED, Config, frame_attention_config, unfit

PathName = Literal["portable", "hopper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A kernel for a call, and why it is that one."""

    path: PathName
    config: Config | None
    """the portable kernel's tile"""
    variant: str | None
    """the Hopper kernel's loop"""
    reason: str

    def __str__(self) -> str:
        what = f"tile {self.config}" if self.path == "portable" else f"loop {self.variant!r}"
        return f"the {'Hopper' if self.path == 'hopper' else self.path} attention kernel, {what} ({self.reason})"


def unfit_for_attention(*, arch: int, triton: tuple[int, int], head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the Hopper kernel does not take a call; None where it does. arch: of gpus.py, 0 for the interpreter."""
    if why := unfit_for_hopper(arch=arch, triton=triton, dtype=dtype):
        return why
    return None if head_dim in (64, 128) else f"the Hopper kernel takes head dims 64 and 128, got {head_dim}"


def select(
    *, arch: int, triton: tuple[int, int], head_dim: int, dtype: torch.dtype, kept: Config | None = None
) -> Selection:
    """The kernel and tile for a call that asks for none.

    Args:
        arch: Architecture of gpus.py: 80, 89, 90, 100 or 120; 0 for the interpreter.
        triton: Major and minor version.
        head_dim: D.
        dtype: Of query and pages.
        kept: A tile of the portable kernel that was found faster on this GPU.

    Raises:
        NotImplementedError: No kernel takes that head dim or dtype.
    """
    if why := unfit(head_dim, dtype, interpreted=arch == 0):
        raise NotImplementedError(why)
    why = unfit_for_attention(arch=arch, triton=triton, head_dim=head_dim, dtype=dtype)
    if why is None:
        about = f"compute capability 9.0, Triton {triton[0]}.{triton[1]}, {dtype_name(dtype)}, head dim {head_dim}"
        return Selection(path="hopper", config=None, variant=SELECTED, reason=about)
    config = kept or frame_attention_config(arch, head_dim, dtype)
    if config in (INTERPRETER, FLOAT32):
        return Selection(path="portable", config=config, variant=None, reason=why)
    tuned = "found by flexkern warmup --tune" if kept else MEASURED.get(arch, "measured on no GPU")
    return Selection(path="portable", config=config, variant=None, reason=f"{why}; its tile was {tuned}")


@cache
def selected(device: torch.device, head_dim: int, dtype: torch.dtype) -> Selection:
    """What a call with tensors on that device launches. The device is asked once.

    Raises:
        NotImplementedError: No kernel takes that GPU, head dim or dtype.
    """
    arch, kept = _ask(device, head_dim, dtype)
    return select(arch=arch, triton=triton_version(), head_dim=head_dim, dtype=dtype, kept=kept)


@cache
def portable_tile(device: torch.device, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile that the portable kernel takes on that device, whether or not it is selected there."""
    arch, kept = _ask(device, head_dim, dtype)
    return kept or frame_attention_config(arch, head_dim, dtype)


def choose_tile(query: Tensor, config: Config | None, path: PathName | None) -> Config | None:
    """The portable kernel's tile for a call; None where the Hopper kernel takes it.

    Args:
        query: [B, F, S, H, D].
        config: The tile that the call asks for, if it does.
        path: The kernel that it asks for, if it does.

    Raises:
        ValueError: No kernel has that name, the Hopper kernel cannot run there, or a tile is asked of it.
        ImportError: It is asked for, and Triton is too old.
        NotImplementedError: No kernel takes that GPU, head dim or dtype.
    """
    device, dim, dtype = query.device, query.shape[-1], query.dtype
    if path not in (None, "portable", "hopper"):
        raise ValueError(f"path must be 'portable' or 'hopper', got {path!r}")
    if path == "hopper":
        if config is not None:
            raise ValueError(f"a tile is for path 'portable', got {config} for path 'hopper'")
        require_triton(HOPPER, by="path 'hopper' needs")
        arch, _ = _ask(device, dim, dtype)
        # asked for by name, it may be tried on a Triton that nobody has tried it on
        if why := unfit_for_attention(arch=arch, triton=HOPPER_LAST, head_dim=dim, dtype=dtype):
            raise ValueError(f"path 'hopper' cannot run: {why}")
        return None
    if config is not None:
        return config
    return portable_tile(device, dim, dtype) if path == "portable" else selected(device, dim, dtype).config


def forget() -> None:
    """Ask anew: for a tile that was just kept, or another device under the same name."""
    selected.cache_clear()
    portable_tile.cache_clear()


def _ask(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[int, Config | None]:
    """Architecture of the device, 0 for the interpreter, and the tile that was kept for it."""
    arch = 0 if INTERPRETED.value else arch_of(device)
    if arch == 0 or device.type != "cuda":
        return arch, None
    kept = find_kept(torch.cuda.get_device_name(device), head_dim, dtype)
    return arch, kept.config if kept else None
