"""Tiles of ``frame_attention`` by architecture, head dim and dtype, each with its reason.

No entry has been timed on a GPU yet: what stands here was chosen by reading SASS (README.md).
"""

from dataclasses import dataclass
from functools import cache

import torch

from .hopper_variants import SELECTED, get_variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A launch of ``frame_attention``: query rows and keys of a tile, warps, pipeline stages.

    tma: read pages through tensor descriptors (sm_90 and newer). path: which kernel, "triton" or "hopper" (Gluon).
    variant: which loop of the Hopper kernel, by its name in hopper_variants.py; it has its own tile, warps and stages.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    path: str = "triton"
    variant: str = SELECTED

    def __post_init__(self):
        get_variant(self.variant)
        if self.variant != SELECTED and self.path != "hopper":
            raise ValueError(f"variant {self.variant!r} is one of path 'hopper', got path {self.path!r}")


# the interpreter pays by the operation, not by the element
INTERPRETER = Config(block_m=128, block_n=128, num_warps=4, num_stages=1)

# float32 multiplies without tensor cores: it exists to check logic, and larger tiles only spill
FLOAT32 = Config(block_m=32, block_n=32, num_warps=4, num_stages=1)

HALF = {
    # 164 KB of shared memory hold three stages of 64 keys; four warps spill inside the loop
    80: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
    # 99 KB: two stages
    89: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # the same; descriptors would save 7 of 495 instructions a step, but Triton 3.6 spills inside the loop with them
    120: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # 492 instructions for 128 keys, against 2 x 340 for 64; a third stage does not fit into 227 KB beside the query
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
    """How many programs run side by side; a handful in the interpreter, so that tests cut tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def frame_attention_config(arch: int, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile to launch. Head dims 64 and 128 share one: half the channels only make it lighter."""
    if arch == 0:
        return INTERPRETER
    return FLOAT32 if dtype.itemsize == 4 else HALF[arch]
