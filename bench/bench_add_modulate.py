"""Time add_modulate: the residual sum and its modulated norm; two reads and two writes.

python bench/bench_add_modulate.py --save

``two kernels`` is gate_residual and then modulate, which move five times the tokens where this moves four.
"""

from collections.abc import Callable

import harness
import torch
from harness import Case, Provider, Truth
from pointwise import EAGER, EVERY, PROVIDERS, SHORT, TINY, Tokens, copy_of
from roofs import DEVICE
from torch import Tensor

from flexkern.kernels import reference
from flexkern.kernels.pointwise.add_modulate import add_modulate
from flexkern.kernels.pointwise.gate_residual import gate_residual
from flexkern.kernels.pointwise.modulate import modulate

TWO = "two kernels"
Both = tuple[Tensor, Tensor]


def two_kernels(x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Both:
    """The same by one kernel for the sum and one for the norm, which is of the rounded sum."""
    total = gate_residual(x, update, gate)
    return total, modulate(total, scale, shift)


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    x, update = shape.draw(), shape.draw()
    gates = torch.randn(shape.batch, shape.frames, 6, shape.channels, device=DEVICE).bfloat16().unbind(2)[:3]
    bytes_ = 2 * 4 * shape.count + 2 * 3 * gates[0].numel()
    arguments = x, update, *gates

    def in_dtype(dtype: torch.dtype) -> Both:
        return reference.add_modulate(*(t.to(dtype) for t in arguments))

    def once_rounded() -> Both:
        total, out = in_dtype(torch.float32)
        return total.to(x.dtype), out.to(x.dtype)

    both = lambda call, **budget: Provider(call=call, result=torch.stack, **budget)
    compiled: Provider | str = "needs a CUDA GPU"
    if DEVICE == "cuda":
        torch._dynamo.reset()
        fast: Callable[[], Both] = torch.compile(once_rounded, dynamic=False)
        compiled = both(fast)
    return Case(
        kernel="add_modulate", shape=str(shape), bytes=bytes_, flops=0, bound="copy",
        truth=Truth(exact=torch.stack(in_dtype(torch.float64)), entitled=torch.stack(once_rounded())),
        providers={
            "triton": both(lambda: add_modulate(*arguments)),
            "torch": both(lambda: reference.add_modulate(*arguments), **EAGER),
            "torch in float32": both(once_rounded),
            "torch.compile": compiled,
            TWO: both(lambda: two_kernels(*arguments), **EAGER),
            "copy": copy_of(bytes_),
        },
    )  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "add_modulate", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, (*PROVIDERS, TWO), build)

if __name__ == "__main__":
    main()
