"""What the Hopper kernels share, in Gluon: how a warpgroup holds a product, and names that differ between releases."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# a barrier of the warps of a role
four_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # before Triton 3.7: the latter
# have TMA write a block of a tensor to shared memory, and tell an mbarrier; before Triton 3.9: the latter
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(columns):
    """How a warpgroup's registers hold 64 rows of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(columns):
    """How its registers hold the left factor of a product with that many columns."""
    return gl.DotOperandLayout(0, product_layout(columns), 2)
