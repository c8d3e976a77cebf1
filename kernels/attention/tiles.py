"""Tiles of ``frame_attention`` by architecture, head dim and dtype, each with its reason.

All entries were chosen by reading SASS. Only that of sm_90 has been timed, on one NVIDIA H200: seven other tiles were
faster there (README.md, table of tiles).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from .hopper_variants import SELECTED, get_variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How ``frame_attention`` is launched: query rows and keys of a tile, warps, pipeline stages.

    tma: read pages through tensor descriptors (sm_90 and newer). path: the portable kernel, or the Hopper one (Gluon).
    variant: which loop of the Hopper kernel, by its name in hopper_variants.py; it has its own tile, warps and stages.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    path: Literal["triton", "hopper"] = "triton"
    variant: str = SELECTED

    def __post_init__(self):
        get_variant(self.variant)
        if self.variant != SELECTED and self.path != "hopper":
            raise ValueError(f"variant {self.variant!r} is one of path 'hopper', got path {self.path!r}")


# the interpreter's time goes by operations, not by elements
INTERPRETER = Config(block_m=128, block_n=128, num_warps=4, num_stages=1)

# float32 multiplies without tensor cores: it exists to check logic, and larger tiles only spill
FLOAT32 = Config(block_m=32, block_n=32, num_warps=4, num_stages=1)

HALF = {
    # 164 KB of shared memory hold three stages of 64 keys; with four warps the loop spills
    80: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
    # 99 KB: two stages
    89: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # the same; descriptors would save 7 of 495 instructions a step, but Triton 3.6 spills inside the loop with them
    120: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # 492 instructions for 128 keys, against 2 x 340 for 64. On an H200 2.39 ms at R = 21; three stages, which fit, take
    # 2.04, and 64x64 with four warps, three stages and two programs an SM 1.85 (Triton 3.6.0, fd667e99b2, 2026-11-26)
    90: Config(block_m=128, block_n=128, num_warps=8, num_stages=2, tma=True),
    # 802 instructions for 128 keys, against 2 x 561 for 64
    100: Config(block_m=128, block_n=128, num_warps=8, num_stages=2, tma=True),
}


def arch_of(device: torch.device) -> int:
    """The table's architecture for a device: 80, 89, 90, 100 or 120; 0 for the interpreter on a CPU."""
    return 0 if device.type != "cuda" else _arch_of(device.index or 0)


@cache
def _arch_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 0):
        raise NotImplementedError(f"the kernels need compute capability 8.0 or newer, got {major}.{minor}")
    # 8.6 and 8.7 have the shared memory of 8.9; 11.0 is a 10.x under another number
    return {8: 80 if minor == 0 else 89, 9: 90, 10: 100, 11: 100}.get(major, 120)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; four in the interpreter, so that tests cut tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def frame_attention_config(arch: int, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile to launch. Head dims 64 and 128 share one, since half the channels only need fewer registers."""
    if arch == 0:
        return INTERPRETER
    return FLOAT32 if dtype.itemsize == 4 else HALF[arch]
