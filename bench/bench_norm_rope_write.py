"""Time norm_rope_write: query and key normalised and turned by place, keys and values written to their pages.

python bench/bench_norm_rope_write.py --save
"""

import harness
import torch
from harness import Case, Provider, Truth
from pointwise import EAGER, EVERY, PROVIDERS, SHORT, TINY, Tokens, copy_of
from roofs import DEVICE
from torch import Tensor

from flexkern.kernels import reference
from flexkern.kernels.pages.norm_rope_write import norm_rope_write

EPS = 1e-6


def plain(
    query: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, place_turn: Tensor,
    key_pages: Tensor, value_pages: Tensor, slots: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """``reference.norm_rope_write`` in float32, with every slot written, so that nothing waits for the host."""

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        normed = reference.rms_norm(x.float().flatten(-2), weight.float(), eps).view_as(x)
        turn = reference.pad_turn(place_turn, x.shape[-1] // 2, front=True)[:, None]
        return reference.rotate(reference.split_pairs(normed), turn).to(x.dtype)

    key_pages.index_copy_(1, slots.long(), norm_rope(key, key_weight))
    value_pages.index_copy_(1, slots.long(), value)
    return norm_rope(query, query_weight)


def build(shape: Tokens) -> Case:
    torch.manual_seed(0)
    dim = shape.head_dim
    place_pairs = 2 * (dim // 2 // 3)
    query, key, value = (shape.draw(shape.heads, dim) for _ in range(3))
    weights = (1 + 0.1 * torch.randn(2, shape.channels, device=DEVICE)).bfloat16()
    angle = 6.3 * torch.rand(shape.tokens, place_pairs, device=DEVICE)
    place_turn = torch.stack((angle.cos(), angle.sin()), dim=-1)
    pages = torch.empty(2, shape.batch, shape.frames + 2, *key.shape[2:], device=DEVICE, dtype=torch.bfloat16)
    slots = torch.randperm(shape.frames + 2)[: shape.frames].int().to(DEVICE)
    bytes_ = 6 * 2 * shape.count

    def args(pages: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple:
        wide = (x.to(dtype) for x in (query, key, value, *weights))
        return *wide, place_turn, *pages, slots, EPS

    def result(out: Tensor, pages: Tensor = pages) -> Tensor:
        return torch.stack((out, *pages[:, :, slots.long()].to(out.dtype)))

    def oracle(dtype: torch.dtype) -> Tensor:
        written = torch.zeros_like(pages, dtype=dtype)
        return result(reference.norm_rope_write(*args(written, dtype)), written)

    ready = args(pages)  # made once: views made at every call would cost as much as the launch
    compiled = "needs a CUDA GPU"
    if DEVICE == "cuda":
        torch._dynamo.reset()
        fast = torch.compile(plain, dynamic=False)
        compiled = Provider(call=lambda: fast(*ready), result=result)
    return Case(
        kernel="norm_rope_write", shape=str(shape), bytes=bytes_, flops=0, bound="copy",
        truth=Truth(exact=oracle(torch.float64), entitled=oracle(torch.float32).bfloat16()),
        reset=lambda: pages.fill_(torch.nan),
        providers={
            "triton": Provider(call=lambda: norm_rope_write(*ready), result=result),
            "torch": Provider(call=lambda: reference.norm_rope_write(*ready), result=result, **EAGER),
            "torch in float32": Provider(call=lambda: plain(*ready), result=result),
            "torch.compile": compiled,
            "copy": copy_of(bytes_),
        },
    )  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    harness.run(args, "norm_rope_write", harness.shapes_for(args, SHORT, EVERY, TINY), build)


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
