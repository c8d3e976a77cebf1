"""What a launch needs beside its tensors, made once for tensors of one shape and kept.

Triton binds and specialises all arguments of a kernel again at every launch, and looks its compiled kernel up by their
text: on a CPU that takes about as long as a small kernel takes on a GPU (README.md, "What a launch costs"). Both follow
from shapes, strides and dtypes, from whether pointers are multiples of 16 bytes, and from the current device. So each
launcher has one function under ``keep`` whose arguments are that key, and which returns what follows from it: grid,
numbers, constants, tiles, checks. Nothing that is kept holds a tensor or a stream: results and workspaces are allocated
at every call, where streams and captured graphs look after them, and descriptors are made of the call's own pages.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

KEPT = 256  # keys of a launcher; a render needs a handful. The one used longest ago makes room
Made = TypeVar("Made")


def keep(make: Callable[..., Made]) -> Callable[..., Made]:
    """The function, which keeps what it made for its last ``KEPT`` keys; errors are not kept."""
    kept = lru_cache(maxsize=KEPT)(make)

    def get(*key: object) -> Made:
        return make(*key) if torch.compiler.is_compiling() else kept(*key)

    get.clear = kept.cache_clear  # type: ignore[attr-defined]
    return get


class Prepared:
    """A kernel's launch for tensors of known shapes, strides and dtypes.

    Called with the tensors, and descriptors of tensors, in the order of the kernel's arguments, the first of them a
    tensor. The first call goes through Triton, which compiles; where all pointers were multiples of 16 bytes the
    compiled kernel is kept for the device and called itself from then on, as Triton does it: on the current stream,
    with the hooks of profilers. Pointers that are not take Triton's way every time. Triton launches on the current
    device, wherever the tensors are: here it is that of the first one.

    Args:
        kernel: The kernel, ``triton.jit`` or ``gluon.jit``.
        grid: Programs, by axis.
        numbers: Its arguments between the tensors and the constants.
        constants: Its constexpr arguments, by name.
        options: num_warps and the like.
    """

    __slots__ = ("compiled", "constants", "grid", "kernel", "numbers", "options", "rest")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], constants: dict[str, Any], **options: Any
    ):
        self.kernel, self.numbers, self.constants, self.options = kernel, numbers, constants, options
        self.grid = (*grid, 1, 1)[:3]
        # a compiled kernel takes every argument, and by position
        self.rest = (*numbers, *(constants[name] for name in kernel.arg_names[-len(constants) :]))
        self.compiled: dict[int, Callable[..., None]] = {}

    def __call__(self, *tensors: Any) -> None:
        if torch.compiler.is_compiling():
            self._by_triton(tensors)
            return
        where = tensors[0].get_device()  # -1 of a CPU
        if where >= 0 and where != current_device():
            with torch.cuda.device(where):
                self._launch(tensors, where)
        else:
            self._launch(tensors, where)

    def _launch(self, tensors: tuple[Any, ...], where: int) -> None:
        aligned = are_aligned(tensors)
        if aligned and self.compiled and (launch := self.compiled.get(where if where >= 0 else current_device())):
            launch(*tensors, *self.rest)
            return
        compiled = self._by_triton(tensors)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self.compiled[where if where >= 0 else current_device()] = compiled[self.grid]

    def _by_triton(self, tensors: tuple[Any, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)


def current_device() -> int:
    """The device that Triton compiles for and launches on."""
    return driver.active.get_current_device()


def are_aligned(tensors: tuple[Any, ...]) -> bool:
    """Whether all tensors begin at multiples of 16 bytes; descriptors do, and None has no beginning."""
    begins = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            begins |= tensor.data_ptr()
    return begins % 16 == 0


class Blocks:
    """How blocks of a tensor are read by TMA: ``of(tensor)`` is its descriptor.

    A descriptor's checks see geometry alone, but for the tensor's alignment; so one is made and checked here, of no
    tensor, and ``of`` copies it.

    Args:
        descriptor: ``TensorDescriptor`` of Triton or of Gluon.
        dtype: Of the tensors.
        shape: Of the tensors as the descriptor sees them, contiguous.
        block: What one read brings.
        layout: Of the block in shared memory, for Gluon.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, descriptor: Any, dtype: torch.dtype, shape: tuple[int, ...], block: list[int], *layout: object):
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        self.kind = descriptor
        self.fields = vars(descriptor(torch.empty(0, dtype=dtype), list(shape), strides, block, *layout))

    def of(self, tensor: Tensor) -> Any:
        """A descriptor of that tensor. Raises ValueError unless it begins at a multiple of 16 bytes."""
        if tensor.data_ptr() % 16:
            raise ValueError(f"pages must begin at a multiple of 16 bytes to be read by TMA, got {tensor.data_ptr()}")
        descriptor = object.__new__(self.kind)
        vars(descriptor).update(self.fields, base=tensor)
        return descriptor
