"""What several kernels share."""

import triton
import triton.language as tl

if not hasattr(triton, "knobs"):
    raise ImportError(f"the kernels need Triton >= 3.4 (torch 2.8), and Triton {triton.__version__} is installed")

# the interpreter keeps bfloat16 as bit patterns and would multiply those: there, operands are widened first
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to the nearest of dtype, on a GPU and in the interpreter, whose own bfloat16 is cut off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)
