"""``torch.ops.flexkern.frame_attention``: one operator for both devices, opaque to torch.compile and torch.export.

Its arguments are those of ``flexkern.kernels.reference.frame_attention``, checked by the functions that call it.
Autocast does not reach inside: the result has the query's dtype, as the operator's fake implementation promises.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexkern.backends.gathered import attend_turned
from flexkern.backends.sdpa import attend

from .validate import CUDA_HEAD_DIMS


def on_cpu(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The operator by torch's attention: every key turned the opposite way, once for each query frame."""
    pages = key_pages.shape[1]
    if slots.min() < 0 or slots.max() >= pages:
        raise IndexError(f"slots must be in [0, {pages}), the pages there are, got {slots.tolist()}")
    with torch.autocast("cpu", enabled=False):
        query = (query * logit_scale[:, None, None, None]).to(query.dtype)
        key_turn = turn * turn.new_tensor([1.0, -1.0])
        return attend_turned(query, key_pages, value_pages, slots, key_turn, bias, attend).contiguous()


def on_cuda(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The operator by the Triton kernel; a head dim that it does not have is a wider one that ends in zeros."""
    from flexkern.kernels.attention.portable import frame_attention

    dim, slots = query.shape[-1], slots.int()
    if dim in CUDA_HEAD_DIMS:
        return frame_attention(query, key_pages, value_pages, slots, turn, logit_scale, bias)[0]
    wide = min(width for width in CUDA_HEAD_DIMS if width > dim)
    key_pages, value_pages = (widen(x.index_select(1, slots), wide) for x in (key_pages, value_pages))
    slots = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
    logit_scale = logit_scale * math.sqrt(wide / dim)  # the kernel divides by the root of the wider one
    out = frame_attention(widen(query, wide), key_pages, value_pages, slots, turn, logit_scale, bias)[0]
    return out.unflatten(-1, (2, -1))[..., : dim // 2].flatten(-2).contiguous()


def widen(x: Tensor, dim: int) -> Tensor:
    """x [..., D] in split layout with ``dim`` channels: zeros after its real parts and after its imaginary ones."""
    return F.pad(x.unflatten(-1, (2, -1)), (0, (dim - x.shape[-1]) // 2)).flatten(-2)


SCHEMA = (
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor slots, Tensor turn, Tensor logit_scale, Tensor? bias)"
    " -> Tensor"
)
operator = torch.library.custom_op(
    "flexkern::frame_attention", on_cpu, mutates_args=(), device_types="cpu", schema=SCHEMA
)
operator.register_kernel("cuda", on_cuda)
operator.register_fake(lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format))
