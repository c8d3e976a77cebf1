import pytest
import torch
from tokens import DTYPES

from flexkern.kernels import reference
from flexkern.kernels.vae.to_bytes import to_bytes


def converted(x):
    out = torch.full(x.shape, 77, dtype=torch.uint8, device=x.device)
    to_bytes(x, out)
    return out


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 3), (2, 3, 5, 7, 3), (1, 2, 25, 41, 3)], ids=str)
def test_matches_oracle(shape, dtype, device):
    x = (1.5 * torch.randn(shape, device=device)).to(dtype)
    assert torch.equal(converted(x), reference.to_bytes(x.float()))


def test_every_byte_and_every_middle(device):
    """The middles of two bytes, as far as they are exact in float32, go to the even one, as torch rounds."""
    middles = torch.arange(0, 255, device=device) + 0.5
    x = torch.cat((middles, torch.arange(0, 256, device=device))) / 127.5 - 1
    x = torch.cat((x, torch.tensor([0.0, -1.0, 1.0, -3.0, 3.0, float("inf"), -float("inf")], device=device)))
    x = torch.cat((x, x.new_zeros(-len(x) % 3))).view(1, 1, 1, -1, 3)
    assert torch.equal(converted(x), reference.to_bytes(x))
    assert converted(torch.zeros(1, 1, 1, 1, 3, device=device)).tolist() == [[[[[128] * 3]]]]


def test_only_the_piece_is_written(device):
    out = torch.full((2, 5, 3, 4, 3), 77, dtype=torch.uint8, device=device)
    x = torch.rand(2, 2, 3, 4, 3, device=device) * 2 - 1
    to_bytes(x, out[:, 2:4])
    assert torch.equal(out[:, 2:4], reference.to_bytes(x))
    assert (out[:, :2] == 77).all() and (out[:, 4:] == 77).all()


def test_what_does_not_fit_is_refused(device):
    x = torch.zeros(1, 2, 3, 4, 3, device=device)
    with pytest.raises(ValueError, match=r"out must be uint8 \[1, 2, 3, 4, 3\], got torch.uint8 \[1, 2, 3, 4, 1\]"):
        to_bytes(x, torch.zeros(1, 2, 3, 4, 1, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="got torch.float32"):
        to_bytes(x, x)
    with pytest.raises(ValueError, match="x must be contiguous"):
        to_bytes(x.transpose(2, 3), torch.zeros(1, 2, 4, 3, 3, dtype=torch.uint8, device=device))
