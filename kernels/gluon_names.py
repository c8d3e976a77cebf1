"""What releases of Gluon call differently, from Triton 3.6 to 3.9: device functions under one name."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# a barrier of the warps of a role
four_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # before 3.7: the latter
# have TMA write a block of a tensor to shared memory, and tell an mbarrier
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before 3.9: the latter
