"""What the benches of the memory-bound kernels share: their shapes, and the providers all of them have."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Provider
from roofs import DEVICE
from torch import Tensor

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


def shared(oracle: Callable, *args, kernel: Callable) -> dict[str, Provider | str]:
    """The providers of an operation without state: ``oracle`` and ``kernel`` take the same arguments."""

    def once_rounded(*args) -> Tensor:
        wide = (x.float() if isinstance(x, Tensor) else x for x in args)
        return oracle(*wide).to(args[0].dtype)

    compiled = "needs a CUDA GPU"
    if DEVICE == "cuda":
        torch._dynamo.reset()
        fast = torch.compile(once_rounded, dynamic=False)
        compiled = Provider(call=lambda: fast(*args))
    return {
        "triton": Provider(call=lambda: kernel(*args)),
        "torch": Provider(call=lambda: oracle(*args), **EAGER),
        "torch in float32": Provider(call=lambda: once_rounded(*args)),
        "torch.compile": compiled,
    }


def copy_of(bytes_: int) -> Provider:
    """A device copy that moves as many bytes, read and written: what such a size can reach at all."""
    source = torch.randn(max(1, bytes_ // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Provider(call=lambda: target.copy_(source), result=None)
