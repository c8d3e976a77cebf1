"""Tiles of the portable attention kernel by architecture, head dim and dtype, each with its reason and its measurement.

A reason that comes from SASS alone has been wrong before: on an NVIDIA H200 the tile that was chosen so took 1.3 times
the time of the best. So what no GPU has measured says so here and in ``flexkern doctor``, and an owner of such a GPU
finds a better tile with ``flexkern warmup --tune`` (tune.py), which is then kept beside Triton's cache (kept.py).
Which kernel is launched, and with which of these tiles, is decided in select.py.
"""

from dataclasses import dataclass

import torch

from ..gpus import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the portable kernel is launched: query rows and keys of a tile, warps, pipeline stages.

    tma: read pages through tensor descriptors (sm_90 and newer). per_sm: programs that share a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    per_sm: int = 1

    def __str__(self) -> str:
        read = "tma" if self.tma else "pointers"
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages} {read} x{self.per_sm}"


# the interpreter's time goes by operations, not by elements
INTERPRETER = Config(block_m=128, block_n=128, num_warps=4, num_stages=1)

# float32 multiplies without tensor cores: it exists to check logic, and larger tiles only spill. No other was measured
FLOAT32 = Config(block_m=32, block_n=32, num_warps=4, num_stages=1)

HALF = {
    # not measured. 164 KB of shared memory hold three stages of 64 keys; with four warps the loop spills
    80: Config(block_m=128, block_n=64, num_warps=8, num_stages=3),
    # not measured. 99 KB: two stages
    89: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # not measured. The same; descriptors would save 7 of 495 instructions a step, but Triton 3.6 spills inside the loop
    # with them
    120: Config(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # measured, the best of 20 tiles: 1.85 ms at R = 21 and 1.08 at R = 12 (509 and 498 TFLOP/s); the next, 128x128 with
    # eight warps and three stages, took 2.04 and 1.19. bench/results/NVIDIA-H200/tiles.csv: Wan 1.3B at 480p, F = 3,
    # D = 128, bfloat16, driver 580.159.04, torch 2.11.0, Triton 3.6.0, commit fd667e99b2, 2026-11-26. Two programs of
    # 112 KB each fill a multiprocessor, so that one's softmax lies under the other's products
    90: Config(block_m=64, block_n=64, num_warps=4, num_stages=3, tma=True, per_sm=2),
    # not measured. 802 instructions for 128 keys, against 2 x 561 for 64
    100: Config(block_m=128, block_n=128, num_warps=8, num_stages=2, tma=True),
}
WIDEST = 128  # a tile of wider heads does not fit the shared memory that these were chosen for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEASURED = {90: "measured on an NVIDIA H200"}  # the entries of HALF that a GPU has chosen


def frame_attention_config(arch: int, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile to launch. Head dims 64 and 128 share one, since half the channels only need fewer registers."""
    if arch == 0:
        return INTERPRETER
    return FLOAT32 if dtype.itemsize == 4 else HALF[arch]


def unfit(head_dim: int, dtype: torch.dtype, *, interpreted: bool = False) -> str | None:
    """Why no kernel takes heads of that size and dtype; None where the portable one does."""
    if dtype not in DTYPES:
        return f"the kernels take {', '.join(map(dtype_name, DTYPES))}, got {dtype_name(dtype)}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"the kernels take head dims that are powers of two from 16 on, got {head_dim}"
    if head_dim > WIDEST and not interpreted:
        return f"the kernels take head dims to {WIDEST} on a GPU, got {head_dim}"
    return None
