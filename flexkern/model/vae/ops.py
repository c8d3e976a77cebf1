"""What the decoder computes besides products and attention: norms, the buffers they are written to, convolutions.

On a GPU the kernels of ``flexkern.kernels.vae`` compute it, where the installed Triton has them; elsewhere torch does.

    N(x) = x / max(|x|, 1e-12) * sqrt(C) * gamma        over the channels of a place

Numerics: float32 (float64 for float64), one rounding where a result is written.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexkern.backends import why_not

BEFORE = 2  # frames that a causal convolution of three sees besides the present one


def splice(x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a causal convolution reads: the frames before, then these; and what it will need of them.

    Args:
        x: [B, T, H, W, C].
        past: [B, 2, H, W, C], the last two frames before x; None for zeros.

    Returns:
        The buffer [B, T + 2, H, W, C], and a copy of its last two frames.
    """
    buffer = _begin(x, past)
    buffer[:, BEFORE:] = x
    return buffer, buffer[:, -BEFORE:].clone()


def add_norm(x: Tensor, addend: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and the sum normalised.

    Args:
        x: [B, T, H, W, C]; may be overwritten with the sum.
        addend: The same shape, or None for zero.
        gamma: [C, ...].
    """
    total = x if addend is None else x.add_(addend)
    return total, _normalise(total, gamma).to(total.dtype)


def add_norm_silu(
    x: Tensor, addend: Tensor | None, gamma: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum; silu(N(sum)) behind the two frames before, as ``splice`` lays it out; and its last two frames.

    Args:
        x: [B, T, H, W, C]; may be overwritten with the sum.
        addend: The same shape, or None for zero.
        gamma: [C, ...].
        past: [B, 2, H, W, C], None for zeros.
    """
    if fused(x.device):
        from flexkern.kernels.vae.add_norm_silu import add_norm_silu as launch

        return launch(x, addend, gamma.flatten(), past)
    total = x if addend is None else x.add_(addend)
    buffer = _begin(total, past)
    new = buffer[:, BEFORE:]
    if total.dtype in (torch.float32, torch.float64):
        F.silu(_normalise(total, gamma, out=new), inplace=True)
    else:
        new.copy_(F.silu(_normalise(total, gamma), inplace=True))
    return total, buffer, buffer[:, -BEFORE:].clone()


def convolve(buffer: Tensor, conv: nn.Conv3d, *, own: bool) -> Tensor:
    """A causal convolution of what ``add_norm_silu`` or ``splice`` laid out.

    Args:
        buffer: [B, T + 2, H, W, inputs].
        conv: Its weights, channels last in memory.
        own: By a kernel of ``flexkern.kernels.vae``, which ``why_not_own`` has allowed; else by torch's library.

    Returns:
        [B, T, H, W, outputs].
    """
    if own:
        from flexkern.kernels.vae.causal_conv import causal_conv_hopper

        assert conv.bias is not None
        return causal_conv_hopper(buffer, conv.weight, conv.bias)
    return nn.Conv3d.forward(conv, buffer.movedim(-1, 1)).movedim(1, -1).contiguous()


def why_not_own(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no convolution is computed by a kernel of our own there; None where those are that it takes."""
    from flexkern.kernels.gpus import why_not_convolve

    try:
        return why_not_convolve(device, dtype)
    except ImportError:
        return "Triton is not installed"


def takes_own(conv: nn.Conv3d) -> bool:
    """Whether the kernel takes a convolution."""
    from flexkern.kernels.vae.causal_conv import unfit_channels

    return unfit_channels(conv.in_channels, conv.out_channels, conv.kernel_size) is None


def _begin(x: Tensor, past: Tensor | None) -> Tensor:
    """The buffer of a convolution over x, of which the frames before are there."""
    batch, count, *shape = x.shape
    buffer = x.new_empty(batch, BEFORE + count, *shape)
    if past is None:
        buffer[:, :BEFORE].zero_()
    else:
        buffer[:, :BEFORE] = past
    return buffer


def _normalise(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    factor = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-12)
    return torch.mul(wide, factor, out=out).mul_(gamma.flatten().to(wide.dtype))


def to_bytes(x: Tensor, out: Tensor) -> None:
    """Write colours as bytes: -1 becomes 0 and 1 becomes 255, what lies beyond is clamped.

    Args:
        x: [..., 3].
        out: uint8, of the same shape.
    """
    if fused(x.device):
        from flexkern.kernels.vae.to_bytes import to_bytes as launch

        launch(x, out)
    else:
        out.copy_(((x.float().clamp(-1, 1) + 1) * 127.5).round())


@cache
def fused(device: torch.device) -> bool:
    """Whether the kernels run there."""
    return device.type == "cuda" and why_not("triton", device) is None
