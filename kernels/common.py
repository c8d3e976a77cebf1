"""What several kernels share: constants, a cast that always rounds, the rule for rows in registers, argument checks.

The rule. A program that keeps rows in registers gives each thread 64 channels, padding included (which costs nothing):
then C = 1536, 3072 and 5120 fill their warps exactly, and 12 heads of 128 fill one warp, which needs no barrier. By its
registers an SM then holds 40 to 60 KB of rows; one microsecond at 4.8 TB/s is 36 KB an SM.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # log2(e): exponents of 2 in place of exponents of e
LN_2 = tl.constexpr(0.6931471805599453)
# the interpreter keeps bfloat16 as bit patterns and would multiply those: there, operands are widened first
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round x to the nearest value of dtype, in the interpreter too, which would truncate to bfloat16 by itself."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


def count_warps(channels: int) -> int:
    """Warps for a program that keeps ``channels`` in registers: 64 to a thread, at most 16 warps."""
    return min(max(channels // 2048, 1), 16)


def row_tile(channels: int) -> tuple[int, int, int]:
    """Rows of a program, channels rounded up to a power of two, and warps: two rows at least while they fit."""
    block_c = triton.next_power_of_2(channels)
    rows = max(2048 // block_c, 2 if block_c <= 4096 else 1)
    return rows, block_c, count_warps(rows * block_c)


def require_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor is not contiguous, naming it, its shape and its strides. None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got shape {list(tensor.shape)}, strides {tensor.stride()}")


def require_contiguous_channels(**tensors: Tensor) -> None:
    """Raise ValueError if neighbours in a tensor's last dimension are not neighbours in memory, naming the tensor."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"channels of {name} must be contiguous, got shape {list(tensor.shape)}, strides {tensor.stride()}"
            )


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this shape and these strides is contiguous."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
