"""What the tests of the fp8 kernels share."""

import pytest
import torch
from torch import Tensor

NEEDED = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no 8-bit products"
)


def by_token(scale: Tensor) -> Tensor:
    """Scales [B, P, H] for numbers [B, P, S, H, D]."""
    return scale[:, :, None, :, None]
