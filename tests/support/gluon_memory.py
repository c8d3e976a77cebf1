"""The memory that gluon_player.py plays: tensors behind pointers and TMA descriptors, buffers in shared memory."""

import threading
from types import SimpleNamespace

import torch


class Value(torch.Tensor):
    """A tensor whose ``x += y`` makes a new one, as in a kernel."""

    __iadd__ = torch.Tensor.__add__
    __isub__ = torch.Tensor.__sub__
    __imul__ = torch.Tensor.__mul__


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    def __init__(self, tensor: torch.Tensor, offset=0):
        assert tensor.is_contiguous()
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def resolve(self, mask):
        """Offsets it points to, and which of them count; raises where one is outside the tensor."""
        offset = value(self.offset).long()
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
        assert ((offset >= 0) & (offset < self.tensor.numel()))[mask].all(), "out of bounds"
        return offset, mask


def load(pointer: Pointer, mask=None, other=0.0) -> Value:
    offset, mask = pointer.resolve(mask)
    found = pointer.tensor.view(-1)[torch.where(mask, offset, 0)]
    return value(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(pointer: Pointer, x, mask=None) -> None:
    offset, mask = pointer.resolve(mask)
    pointer.tensor.view(-1)[offset[mask]] = x.expand(offset.shape)[mask].to(pointer.tensor.dtype)


class Shared:
    """A buffer in shared memory, or [n] of them; views share the storage."""

    def __init__(self, storage: torch.Tensor, shape, dirty: dict[int, str], layout=None):
        self.storage, self.shape, self.dirty, self.layout = storage, list(shape), dirty, layout
        self.dtype = storage.dtype

    @property
    def tensor(self) -> torch.Tensor:
        count = torch.Size(self.shape).numel()
        return self.storage[:count].view(self.shape)

    def index(self, i) -> "Shared":
        size = self.storage.numel() // self.shape[0]
        return Shared(self.storage[int(i) * size :][:size], self.shape[1:], self.dirty, self.layout)

    def slice(self, start: int, length: int) -> "Shared":
        assert start >= 0 and start + length <= self.shape[0]
        size = torch.Size(self.shape[1:]).numel()
        return Shared(self.storage[start * size :], [length, *self.shape[1:]], self.dirty, self.layout)

    def reshape(self, shape) -> "Shared":
        assert torch.Size(shape).numel() == torch.Size(self.shape).numel()
        return Shared(self.storage, shape, self.dirty, self.layout)

    def load(self, layout) -> Value:
        return value(self.tensor.clone())

    def permute(self, order) -> SimpleNamespace:
        assert tuple(order) == (1, 0)
        return SimpleNamespace(read=lambda: self.read().T)

    def store(self, x) -> None:
        self.tensor.copy_(x)
        self.dirty[self.storage.data_ptr()] = threading.current_thread().name

    def read(self) -> torch.Tensor:
        """As the asynchronous proxy sees it."""
        assert self.storage.data_ptr() not in self.dirty, "read through the asynchronous proxy without a fence"
        return self.tensor.float().clone()


class Descriptor:
    """How blocks of a tensor are copied."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: None):
        self.base, self.shape, self.block = base, shape, block_shape

    @property
    def tensor(self) -> torch.Tensor:
        return self.base.view(self.shape)

    def read(self, corner: list[int]) -> torch.Tensor:
        """The block that begins there; what is outside of the tensor arrives as zeros."""
        whole, inside, there = self.tensor, [], []
        block = torch.zeros(self.block, dtype=whole.dtype)
        for begin, length, size in zip(corner, self.block, whole.shape, strict=True):
            first, last = max(begin, 0), max(min(begin + length, size), max(begin, 0))
            inside.append(slice(first, last))
            there.append(slice(first - begin, last - begin))
        block[tuple(there)] = whole[tuple(inside)]
        return block
