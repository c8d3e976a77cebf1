"""The e4m3 format of pages: how a number is rounded, in which order values stand, how scales are chosen.

    key_pages    [B, P, S, H, D]      e4m3; split pairs, turned by place
    value_pages  [B, P, H, D, S_pad]  e4m3; the keys of a channel are contiguous, as the 8-bit product P V wants them,
                                      S_pad = S rounded up to 16, zeros behind the last token
    key_scale, value_scale [B, P, H]  float32; a number is its stored value times its scale

Tokens of a value page are reordered within groups of 16: place 4 t + 2 a + b holds token 8 a + 2 t + b (a, b < 2,
t < 4). A tensor core leaves a row's scores of keys 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1 in one thread, and takes the
8-bit weights of places 4 t to 4 t + 3 from one thread: in this order they are the same, and nothing is exchanged.

e4m3 has 3 bits of mantissa at any size between 2^-6 and 448, so a scale only has to bring numbers into a range of 15
powers of two; that they come close to 448 gains nothing. Hence powers of two, which divide exactly, and margins.

- Keys: sqrt(C) max|w| bounds a normalised channel, and a turned pair as well, as sqrt(re^2 + im^2) <= sqrt(sum of all
  squares) = sqrt(C). It depends on the weight alone, so that a page does not depend on what its slot held before.
- Values have no bound. Each write records the largest magnitude it met; the next write of the page takes its scale from
  that. The passes of a chunk overwrite its pages: what stays has the scale that the pass before asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED
from .tuned import arch_of

LARGEST = 448.0
# values may grow by this from one pass to the next before they saturate; it costs nothing but a bit of range
MARGIN = 2.0
# of a page whose values nobody has seen: up to 112, and three bits of mantissa down to 0.004
FIRST_VALUE_SCALE = 0.25


@triton.jit
def to_e4m3(x):
    """float32 to the nearest e4m3, ties to even, saturated at +-448: what a GPU's conversion does."""
    if INTERPRETED:  # whose own conversion drops the carry of a rounding and does not saturate
        magnitude = tl.minimum(tl.abs(x), 448.0)
        bits = magnitude.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xFF  # the sum's last bit is worth 2^-9
        code = tl.where(x == x, tl.where(magnitude < 0.015625, subnormal, normal), 0x7F)
        code |= (x.to(tl.uint32, bitcast=True) >> 31) << 7
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def token_at(place):
    """The token that stands at a place of a value page: place 4 t + 2 a + b of a group of 16 holds 8 a + 2 t + b."""
    return (place & ~15) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)


@triton.jit
def in_value_order(weights):
    """Weights [M, N] of tokens, as weights of places; in registers, where a tensor core leaves and takes them."""
    M: tl.constexpr = weights.shape[0]
    N: tl.constexpr = weights.shape[1]
    return weights.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N)


def refuse_without_fp8(device: torch.device) -> None:
    """Raise NotImplementedError for a GPU that cannot multiply e4m3; widening it there would be slower than bf16."""
    arch = arch_of(device)
    # arch_of lets 8.6 and 8.7 stand for 8.9
    if arch == 80 or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)):
        raise NotImplementedError("fp8 pages need a GPU of compute capability 8.9 or newer; use bf16 pages")


def power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is at least x, float32; at least 2^-100."""
    bits = x.float().clamp(min=2.0**-100).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def key_scale_bound(weight: Tensor, heads: int) -> Tensor:
    """A scale per head [H] with which no key behind an RMSNorm of this weight [C] saturates."""
    return power_of_two(weight.float().view(heads, -1).abs().amax(1) * (weight.numel() ** 0.5 / LARGEST))


def scale_of(seen: Tensor, standing: Tensor) -> Tensor:
    """Scales for values as large as were ``seen``; where nothing was, the standing ones. Any shape."""
    return torch.where(seen > 0, power_of_two(seen * (MARGIN / LARGEST)), standing)


def renew_value_scales(value_scale: Tensor, value_seen: Tensor, slots: Tensor) -> None:
    """Before a write: the pages of ``slots`` have the scales that their last write asked for, and nothing seen.

    value_scale, value_seen: [..., P, H], of one layer or of all, changed in place. slots: [F]; negative ones are none.
    """
    pages = torch.arange(value_scale.shape[-2], device=slots.device)
    is_written = (pages[:, None] == slots).any(1)[:, None]
    value_scale.copy_(torch.where(is_written, scale_of(value_seen, value_scale), value_scale))
    value_seen.masked_fill_(is_written, 0)
