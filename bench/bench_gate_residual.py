"""Time gate_residual: x + update * gate; two reads and one write.

python bench/bench_gate_residual.py --save
"""

import harness
import torch
from harness import Case
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, build_pointwise
from roofs import DEVICE

from flexkern.kernels.pointwise.gate_residual import gate_residual


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    x, update = shape.draw(), shape.draw()
    gate = torch.randn(shape.batch, shape.frames, 6, shape.channels, device=DEVICE).bfloat16()[:, :, 2]
    bytes_ = 2 * 3 * shape.count + 2 * gate.numel()
    return build_pointwise("gate_residual", gate_residual, shape, (x, update, gate), bytes_)


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "gate_residual", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
