"""e4m3 pages in torch: what the tests of the fp8 kernels call right."""

import pytest
import torch
from torch import Tensor

NEEDED = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no 8-bit products"
)


def e4m3(x: Tensor) -> Tensor:
    """Rounded to the nearest e4m3, saturated; torch's own cast turns what is too large into NaN."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn)


def value_order(tokens: int) -> Tensor:
    """Which token stands at each place of a value page [S_pad]; from ``tokens`` on, none."""
    groups = -(-tokens // 16)
    return torch.arange(16 * groups).view(groups, 2, 4, 2).transpose(1, 2).flatten()


def pack_values(values: Tensor) -> Tensor:
    """Value pages [B, P, H, D, S_pad] of values [B, P, S, H, D] over their scale, any dtype."""
    tokens = values.shape[2]
    order = value_order(tokens)
    padded = values.new_zeros(*values.shape[:2], len(order), *values.shape[3:])
    padded[:, :, :tokens] = values
    return padded[:, :, order].permute(0, 1, 3, 4, 2).contiguous()


def unpack_values(pages: Tensor, tokens: int) -> Tensor:
    """Inverse of ``pack_values``."""
    values = pages.permute(0, 1, 4, 2, 3)
    return values[:, :, value_order(tokens).argsort()][:, :, :tokens]


def by_token(scale: Tensor) -> Tensor:
    """Scales [B, P, H] for numbers [B, P, S, H, D]."""
    return scale[:, :, None, :, None]
