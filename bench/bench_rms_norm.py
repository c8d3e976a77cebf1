"""Time rms_norm over all heads, the query norm of cross-attention; one read and one write.

python bench/bench_rms_norm.py --save
"""

import harness
import torch
from harness import Case
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, build_pointwise
from roofs import DEVICE

from flexkern.kernels.pointwise.rms_norm import rms_norm


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    weight = (1 + 0.1 * torch.randn(shape.channels, device=DEVICE)).bfloat16()
    bytes_ = 2 * 2 * shape.count + 2 * shape.channels
    return build_pointwise("rms_norm", rms_norm, shape, (shape.draw(), weight, 1e-6), bytes_)


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "rms_norm", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
