"""Time gate_residual: x + update * gate; two reads and one write.

python bench/bench_gate_residual.py --save
"""

import harness
import torch
from harness import Case, Truth
from pointwise import EVERY, PROVIDERS, SHORT, TINY, Tokens, copy_of, shared
from roofs import DEVICE

from flexkern.kernels import reference
from flexkern.kernels.pointwise.gate_residual import gate_residual


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    x, update = shape.draw(), shape.draw()
    gate = torch.randn(shape.batch, shape.frames, 6, shape.channels, device=DEVICE).bfloat16()[:, :, 2]
    args = x, update, gate
    bytes_ = 2 * 3 * shape.count + 2 * gate.numel()
    cast = lambda dtype: [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
    truth = Truth(
        exact=reference.gate_residual(*cast(torch.float64)),
        entitled=reference.gate_residual(*cast(torch.float32)).bfloat16(),
    )
    providers = shared(reference.gate_residual, *args, kernel=gate_residual) | {"copy": copy_of(bytes_)}
    return Case(
        kernel="gate_residual", shape=str(shape), bytes=bytes_, flops=0, bound="copy", providers=providers, truth=truth
    )


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "gate_residual", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
