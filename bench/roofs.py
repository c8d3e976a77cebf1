"""Milliseconds of a call on a GPU, and the two roofs that a kernel is compared with: measured, not looked up."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any `import triton`

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
ROUNDS = 6
CPU_CALLS = 30  # of which the fastest is the roof of a CPU
LEAD_CYCLES = 3_000_000  # about 2 ms
SIDE, COPIED = (8192, 1 << 30) if DEVICE == "cuda" else (128, 1 << 17)  # of the product's matrices; bytes of the copy


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES if DEVICE == "cuda" else 1, dtype=torch.int8, device=DEVICE)


def flush() -> None:
    """Empty the L2 cache of everything that a call will read."""
    _flush_buffer().zero_()


def allocated() -> int:
    """Bytes that are allocated on the GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


class Stamp:
    """A moment on the GPU's clock. The difference of two is in seconds; only taking it waits for the GPU."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def stamp() -> "Stamp | float":
    """Now: on the GPU's clock, or on the host's without a GPU."""
    return Stamp() if DEVICE == "cuda" else time.perf_counter()


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, with a cold L2 cache, after one that does not count."""
    call()
    if DEVICE == "cuda":
        torch.cuda._sleep(LEAD_CYCLES)  # the host runs ahead, so that launches are not what is timed
    stamps = []
    for _ in range(repeats):
        flush()
        start = stamp()
        call()
        stamps.append((start, stamp()))
    return [1000 * (end - start) for start, end in stamps]


def measure(calls: Sequence[Callable[[], object]], budget_ms: float = 200.0) -> list[list[float]]:
    """Milliseconds of every call, in interleaved rounds: A B C, C B A, ... Each gets about ``budget_ms``."""
    if DEVICE == "cpu":
        budget_ms = 0.0
    # warm, then see how long it takes
    single = [statistics.median(timed(call, 3)) for call in calls]
    repeats = [max(1, min(50, round(budget_ms / ROUNDS / max(ms, 1e-3)))) for ms in single]
    taken = [[] for _ in calls]
    for i in range(ROUNDS if DEVICE == "cuda" else 2):
        order = range(len(calls)) if i % 2 == 0 else reversed(range(len(calls)))
        for j in order:
            taken[j] += timed(calls[j], repeats[j])
    return taken


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """matmul_tflop_s: a large bf16 product of random numbers. copy_gb_s: a device copy, bytes read plus written."""

    matmul_tflop_s: float
    copy_gb_s: float


@cache
def measure_roofs() -> Roofs:
    """Measure both, once in a process."""
    a, b = torch.randn(2, SIDE, SIDE, device=DEVICE).bfloat16()
    source = torch.randn(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    calls = [lambda: a @ b, lambda: target.copy_(source)]
    if DEVICE == "cuda":
        product, copied = map(statistics.median, measure(calls))
    else:  # calls of microseconds, which whatever else the machine does makes a thousand times as long
        product, copied = (min(timed(call, CPU_CALLS)) for call in calls)
    return Roofs(matmul_tflop_s=2 * SIDE**3 / product / 1e9, copy_gb_s=2 * source.nbytes / copied / 1e6)
