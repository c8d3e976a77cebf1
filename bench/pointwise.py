"""What the benches of the memory-bound kernels share: shapes, providers, and the case of an operation without state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import Case, Provider, Truth
from roofs import DEVICE
from torch import Tensor

from flexkern.kernels import reference

EAGER = {"mean": 10.0, "worst": 10.0}  # rounds after every operation
PROVIDERS = ("triton", "torch", "torch in float32", "torch.compile", "copy")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Activations of a chunk, [B, F, S, C] with C = H * D."""

    name: str
    frames: int
    tokens: int
    heads: int
    head_dim: int = 128
    batch: int = 1

    def __str__(self) -> str:
        b, f, s, h, d = self.batch, self.frames, self.tokens, self.heads, self.head_dim
        return f"{self.name} B={b} F={f} S={s} H={h} D={d} bfloat16"

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def count(self) -> int:
        return self.batch * self.frames * self.tokens * self.channels

    def draw(self, *last: int) -> Tensor:
        """Random numbers in bf16, magnitudes of tokens spread over five decades: [B, F, S, *last], default [.., C]."""
        x = torch.randn(self.batch, self.frames, self.tokens, *(last or (self.channels,)), device=DEVICE)
        size = torch.logspace(-3, 2, self.tokens, device=DEVICE)
        return (x * size.view(-1, *[1] * len(last or (1,)))).bfloat16()


TINY = Tokens(name="tiny", frames=2, tokens=7, heads=2, head_dim=64)
SHORT = [
    Tokens(name="1.3B 480p", frames=3, tokens=1560, heads=12),
    Tokens(name="1.3B 480p", frames=1, tokens=1560, heads=12),
    Tokens(name="14B 720p", frames=3, tokens=3600, heads=40),
    Tokens(name="odd", frames=3, tokens=1559, heads=12),
]
EVERY = [
    Tokens(name=f"{model} {size}", frames=frames, tokens=tokens, heads=heads)
    for model, heads in (("1.3B", 12), ("5B", 24), ("14B", 40))
    for size, tokens in (("480p", 1560), ("720p", 3600))
    for frames in (3, 1)
]
EVERY = list(dict.fromkeys([*SHORT, *EVERY]))


def run_in(function: Callable, arguments: Sequence, dtype: torch.dtype) -> Tensor:
    """The function's result with all tensors converted to dtype first."""
    return function(*(x.to(dtype) if isinstance(x, Tensor) else x for x in arguments))


def build_pointwise(name: str, kernel: Callable, shape: Tokens, arguments: Sequence, bytes_: int) -> Case:
    """The case of an operation that writes nothing in place: kernel and ``reference.name`` take the same arguments."""
    oracle = getattr(reference, name)
    dtype = arguments[0].dtype
    once_rounded = lambda *arguments: run_in(oracle, arguments, torch.float32).to(dtype)
    compiled: Provider | str = "needs a CUDA GPU"
    if DEVICE == "cuda":
        torch._dynamo.reset()
        fast = torch.compile(once_rounded, dynamic=False)
        compiled = Provider(call=lambda: fast(*arguments))
    return Case(
        kernel=name, shape=str(shape), bytes=bytes_, flops=0, bound="copy",
        truth=Truth(exact=run_in(oracle, arguments, torch.float64), entitled=once_rounded(*arguments)),
        providers={
            "triton": Provider(call=lambda: kernel(*arguments)),
            "torch": Provider(call=lambda: oracle(*arguments), **EAGER),
            "torch in float32": Provider(call=lambda: once_rounded(*arguments)),
            "torch.compile": compiled,
            "copy": copy_of(bytes_),
        },
    )  # fmt: skip


def copy_of(bytes_: int) -> Provider:
    """A device copy of the same bytes, read plus written: the most that can be reached at this size."""
    source = torch.randn(max(1, bytes_ // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Provider(call=lambda: target.copy_(source), result=None)
