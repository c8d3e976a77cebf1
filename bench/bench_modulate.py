"""Time modulate: LayerNorm, scale and shift by frame; one read and one write.

python bench/bench_modulate.py --save
"""

import harness
import torch
from harness import Case
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, build_pointwise
from roofs import DEVICE

from flexkern.kernels.pointwise.modulate import modulate


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    x = shape.draw()
    scale, shift = torch.randn(shape.batch, shape.frames, 6, shape.channels, device=DEVICE).bfloat16().unbind(2)[:2]
    bytes_ = 2 * 2 * shape.count + 2 * 2 * scale.numel()
    return build_pointwise("modulate", modulate, shape, (x, scale, shift, 1e-6), bytes_)


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "modulate", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
