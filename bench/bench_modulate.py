"""Time modulate: LayerNorm, scale and shift by frame; one read and one write.

python bench/bench_modulate.py --save
"""

import harness
import torch
from harness import Case, Truth
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, copy_of, shared
from roofs import DEVICE

from flexkern.kernels import reference
from flexkern.kernels.pointwise.modulate import modulate


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    x = shape.draw()
    scale, shift = torch.randn(shape.batch, shape.frames, 6, shape.channels, device=DEVICE).bfloat16().unbind(2)[:2]
    args = x, scale, shift, 1e-6
    bytes_ = 2 * 2 * shape.count + 2 * 2 * scale.numel()
    cast = lambda dtype: [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
    truth = Truth(
        exact=reference.modulate(*cast(torch.float64)),
        entitled=reference.modulate(*cast(torch.float32)).bfloat16(),
    )
    providers = shared(reference.modulate, *args, kernel=modulate) | {"copy": copy_of(bytes_)}
    return Case(
        kernel="modulate", shape=str(shape), bytes=bytes_, flops=0, bound="copy", providers=providers, truth=truth
    )


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "modulate", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
