"""Copies for the host: none of what it has already, and of a GPU what was there when it was asked for."""

import pytest
import torch

from flexkern.hostcopy import HostCopy


def test_what_the_host_has_is_not_copied():
    tensor = torch.arange(6.0, requires_grad=True)
    copy = HostCopy(tensor)
    assert copy.is_there() and copy.wait().data_ptr() == tensor.data_ptr() and not copy.wait().requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True])
def test_a_copy_is_of_what_was_there_when_it_was_asked_for(strided):
    """Though the GPU was busy until then, and the tensor is overwritten at once."""
    matrix = torch.rand(4096, 4096, device="cuda")
    tensor = torch.arange(1 << 22, device="cuda", dtype=torch.int32).reshape(2048, 2048)
    given = tensor.T if strided else tensor
    expected = given.cpu()
    for _ in range(20):
        matrix = matrix @ matrix / 4096
    copy = HostCopy(given)
    tensor.zero_()
    assert copy.wait().is_pinned() and torch.equal(copy.wait(), expected) and copy.is_there()
