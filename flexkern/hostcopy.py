"""A tensor of a device, in the host's memory, without anybody waiting until it is there."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor that the device makes when it comes to it.

    On a GPU the copy goes to pinned memory, and is queued on the stream that makes the tensor: what is queued there
    afterwards may overwrite the tensor. One that the host has already is not copied.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach()
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def is_there(self) -> bool:
        """Whether ``wait`` would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def wait(self) -> Tensor:
        """The copy, once it is there; from any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
