"""Time the 3x3x3 convolutions of the VAE's decoder: our kernel for sm_90 beside cuDNN's, at the shapes of a chunk.

python bench/bench_causal_conv.py --save

It decides who computes them (``convolutions`` of ``WanDecoder``). ``torch`` is the kernel of cuDNN that torch takes by
itself, ``torch, searched`` the fastest by trial (``torch.backends.cudnn.benchmark``). All read the same buffer,
channels last. The roof is a large bf16 product.
"""

from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from harness import Case, Provider, Truth
from roofs import DEVICE
from torch import Tensor

from flexkern.kernels import reference
from flexkern.kernels.gpus import why_not_convolve

OURS, SEARCHED = "hopper", "torch, searched"
PROVIDERS = (OURS, "torch", SEARCHED)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a convolution reads, besides two frames of the past, and how many channels it makes."""

    name: str
    frames: int
    height: int
    width: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        size = f"T={self.frames} H={self.height} W={self.width}"
        return f"{self.name} {size} C={self.inputs} N={self.outputs} bfloat16"

    @property
    def places(self) -> int:
        return self.frames * self.height * self.width


TINY = Features(name="tiny", frames=2, height=3, width=5, inputs=32, outputs=32)
SHORT = [
    Features(name="480p", frames=12, height=480, width=832, inputs=96, outputs=96),
    Features(name="480p", frames=3, height=60, width=104, inputs=384, outputs=384),
    Features(name="480p", frames=12, height=240, width=416, inputs=192, outputs=192),
    Features(name="480p", frames=6, height=120, width=208, inputs=384, outputs=384),
    Features(name="480p", frames=6, height=120, width=208, inputs=192, outputs=384),
]
EVERY = [
    *SHORT,
    Features(name="480p, first chunk", frames=9, height=480, width=832, inputs=96, outputs=96),
    Features(name="480p, one picture", frames=1, height=480, width=832, inputs=96, outputs=96),
    Features(name="480p, one latent", frames=4, height=480, width=832, inputs=96, outputs=96),
    Features(name="720p", frames=12, height=720, width=1280, inputs=96, outputs=96),
    Features(name="720p", frames=12, height=360, width=640, inputs=192, outputs=192),
]


def convolve(buffer: Tensor, weight: Tensor, bias: Tensor, *, searched: bool) -> Tensor:
    """torch's convolution, as the decoder calls it."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=searched):
        return F.conv3d(buffer.movedim(-1, 1), weight, bias, padding=(0, 1, 1)).movedim(1, -1)


def build(shape: Features) -> Case:
    torch.manual_seed(0)
    draw = lambda *size: torch.randn(size, device=DEVICE)
    buffer = draw(1, shape.frames + 2, shape.height, shape.width, shape.inputs).bfloat16()
    weight = (draw(shape.outputs, shape.inputs, 3, 3, 3) / (27 * shape.inputs) ** 0.5).bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    arguments = buffer, weight, draw(shape.outputs).bfloat16()
    in_dtype = lambda dtype: reference.causal_conv(*(x.to(dtype) for x in arguments))
    ours: Provider | str = why_not_convolve(buffer.device, buffer.dtype) or ""
    if not ours:
        from flexkern.kernels.vae.causal_conv import causal_conv_hopper

        ours = Provider(call=lambda: causal_conv_hopper(*arguments))
    return Case(
        kernel="causal_conv", shape=str(shape), bytes=2 * (buffer.numel() + shape.places * shape.outputs),
        flops=54 * shape.places * shape.inputs * shape.outputs, bound="matmul",
        truth=Truth(exact=in_dtype(torch.float64), entitled=in_dtype(torch.float32).bfloat16()),
        providers={
            OURS: ours,
            "torch": Provider(call=lambda: convolve(*arguments, searched=False)),
            SEARCHED: Provider(call=lambda: convolve(*arguments, searched=True)),
        },
    )  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "causal_conv", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
