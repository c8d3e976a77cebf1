"""Time rms_norm over all heads, the query norm of cross-attention; one read and one write.

python bench/bench_rms_norm.py --save
"""

import harness
import torch
from harness import Case, Truth
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, copy_of, shared
from roofs import DEVICE

from flexkern.kernels import reference
from flexkern.kernels.pointwise.rms_norm import rms_norm


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    weight = (1 + 0.1 * torch.randn(shape.channels, device=DEVICE)).bfloat16()
    args = shape.draw(), weight, 1e-6
    bytes_ = 2 * 2 * shape.count + 2 * shape.channels
    cast = lambda dtype: [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
    truth = Truth(
        exact=reference.rms_norm(*cast(torch.float64)),
        entitled=reference.rms_norm(*cast(torch.float32)).bfloat16(),
    )
    providers = shared(reference.rms_norm, *args, kernel=rms_norm) | {"copy": copy_of(bytes_)}
    return Case(
        kernel="rms_norm", shape=str(shape), bytes=bytes_, flops=0, bound="copy", providers=providers, truth=truth
    )


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "rms_norm", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
