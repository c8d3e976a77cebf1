"""Where the time of a chunk goes: a trace of it, cut by kind of kernel; what its arithmetic needs; how it drifts.

``ChunkRow`` is the row of a chunk of a whole model, which ``bench_engine.py`` writes and ``tables.py`` reads.
"""

import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Row
from roofs import DEVICE
from torch.profiler import ProfilerActivity, profile, record_function

VAE = "decode the chunk"  # the range in a trace in which the decoder launches
ATTENTION = re.compile(r"_frame_attention|^_merge\b|flash|fmha|sdpa|attention", re.I)
# of cuBLAS, CUTLASS and nvJet, and torch's own on a CPU
LINEAR = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|^aten::(linear|addmm|mm|bmm|matmul|baddbmm)$", re.I)
KINDS = ("vae", "attention", "linear", "other")
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ChunkRow(Row):
    """A chunk of a whole model. ``ms`` and its percentiles are of chunks with their pictures, where there is a decoder.

    ``roof_percent``, ``tflop_s``: of the arithmetic of denoising, over ``denoise_ms``.
    """

    ms_95: float = math.nan  # 95th percentile
    denoise_ms: float = math.nan  # from noise to clean latents and their keys, the median
    denoise_ms_95: float = math.nan
    denoise_fps: float = math.nan  # pictures of a chunk over denoise_ms
    attention_ms: float = math.nan  # the GPU computes attention, of either kind; of parts that overlap, each once
    linear_ms: float = math.nan
    other_ms: float = math.nan
    vae_ms: float = math.nan  # whatever the decoder launches
    idle_ms: float = math.nan  # ms, less all of these
    device_gb: float = math.nan  # of the GPU, by its driver: what torch keeps for later and CUDA graphs, too
    first_picture_ms: float = math.nan  # from a prompt's embedding to the first pictures, kernels compiled
    chunks: int = 0  # how many were timed, with a full window
    slope_ms: float = math.nan  # of ms over 100 chunks, least squares, and its interval of 95 %
    slope_ms_low: float = math.nan
    slope_ms_high: float = math.nan
    slope_mb: float = math.nan  # likewise of the memory that is held between chunks, in 1e6 bytes
    slope_mb_low: float = math.nan
    slope_mb_high: float = math.nan
    roof_ms: float = math.nan  # what the arithmetic of denoising takes at the bf16 product of the same run
    over_roof_percent: float = math.nan  # how much longer denoise_ms is


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Milliseconds in which something of a kind ran. attention_kernel: the attention that took longest, by name."""

    attention: float
    linear: float
    other: float
    vae: float
    attention_kernel: str

    @property
    def busy(self) -> float:
        return self.attention + self.linear + self.other + self.vae


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as disjoint spans, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def kind_of(name: str) -> str:
    """attention, linear or other, by the name of a kernel, or of an operator on a CPU."""
    return "attention" if ATTENTION.search(name) else "linear" if LINEAR.search(name) else "other"


def cut(events: Sequence[dict], device: str = DEVICE) -> Parts:
    """The parts of a Chrome trace: of a GPU's kernels and copies, or of a CPU's operators. NaN where it has none.

    A kernel belongs to the VAE where it was launched within a range of that name. A moment in which several kinds run
    counts once, for the first of ``KINDS``: operators lie within each other.
    """
    events = [event for event in events if event.get("ph") == "X"]
    inside = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == VAE]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    work = work_of(events, device)
    if not work:
        return Parts(**dict.fromkeys(KINDS, math.nan), attention_kernel="")
    spans: dict[str, list[Span]] = {kind: [] for kind in KINDS}
    by_kernel: dict[str, float] = {}
    for event in work:
        launch = launches.get(event.get("args", {}).get("correlation"), event)
        decodes = any(
            launch["tid"] == mark["tid"] and mark["ts"] <= launch["ts"] < mark["ts"] + mark["dur"] for mark in inside
        )
        kind = "vae" if decodes else kind_of(event["name"])
        spans[kind].append((event["ts"], event["ts"] + event["dur"]))
        if kind == "attention":
            by_kernel[event["name"]] = by_kernel.get(event["name"], 0.0) + event["dur"]
    found = by_kind(spans)
    longest = max(by_kernel, key=lambda name: by_kernel[name], default="")
    return Parts(**found, attention_kernel=longest.removeprefix("void ").partition("<")[0].partition("(")[0][:80])


def work_of(events: Iterable[dict], device: str = DEVICE) -> list[dict]:
    """The events of a Chrome trace in which the device works: a GPU's kernels and copies, a CPU's operators."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device == "cuda" else ("cpu_op",)
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]


def by_kind(spans: dict[str, list[Span]]) -> dict[str, float]:
    """Milliseconds of each kind, of spans in microseconds; a moment counts once, for the first kind that it is of."""
    covered: list[Span] = []
    found: dict[str, float] = {}
    for kind, own in spans.items():
        before, covered = length(covered), union([*covered, *own])
        found[kind] = (length(covered) - before) / 1000
    return found


def trace(call: Callable[[], object], keep_in: Path | None = None) -> Parts:
    """Run a call that waits for the device, under torch's profiler, and cut its trace.

    Args:
        call: Makes a chunk.
        keep_in: A file for the trace, which chrome://tracing and Perfetto show.
    """
    return cut(traced(call, keep_in))


def traced(call: Callable[[], object], keep_in: Path | None = None) -> list[dict]:
    """The events of the Chrome trace of a call that waits for the device. Arguments are ``trace``'s.

    Kernels take as long as without the profiler; the host does not, so that gaps are not to be read from it.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = keep_in or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(path))
        found: list[dict] = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return found


class Marked:
    """A decoder, and what it launches can be told from the rest in a trace."""

    def __init__(self, decoder):
        self.decoder = decoder

    def __call__(self, latents):
        with record_function(VAE):
            return self.decoder(latents)

    def __getattr__(self, name: str):
        return getattr(self.decoder, name)


def count_flops(config, size: tuple[int, int], *, frames: int, window: int, steps: int, text: int) -> int:
    """Floating-point operations of denoising a chunk, two for each product: linear layers and both attentions.

    Norms, turns and activations are none, keys and values of the prompt are made once for a video. The clean pass ends
    with the keys and values of the last layer.

    Args:
        config: A ``WanConfig``.
        size: Height and width of a latent frame.
        frames: Latent frames of the chunk.
        window: Latent frames attended, those of the chunk included.
        steps: Denoising passes.
        text: Rows of the prompt that cross-attention reads.
    """
    _, ph, pw = config.patch_size
    dim, places = config.dim, (size[0] // ph) * (size[1] // pw)
    tokens = frames * places
    keys = tokens * 2 * dim**2
    layer = tokens * (6 * dim**2 + 2 * dim * config.ffn_dim)  # q, k, v, o, and q, o of cross-attention
    layer += 2 * tokens * dim * (window * places + text)
    embed = tokens * ph * pw * config.in_dim * dim + frames * dim * (config.freq_dim + 7 * dim)
    head = tokens * ph * pw * config.out_dim * dim
    passes = (steps + 1) * (config.num_layers * layer + embed) + steps * head
    return 2 * (passes - layer + keys)


def slope(values: Sequence[float]) -> tuple[float, float, float]:
    """Least-squares slope of values over 100 steps, with the ends of its 95 % interval; NaN for fewer than five.

    The interval holds for values that vary on their own; a clock that drifts makes it too narrow.
    """
    count = len(values)
    if count < 5:
        return math.nan, math.nan, math.nan
    line = statistics.linear_regression(range(count), values)
    off = sum((value - line.intercept - line.slope * i) ** 2 for i, value in enumerate(values))
    spread = count * (count**2 - 1) / 12
    half = student(count - 2) * math.sqrt(off / (count - 2) / spread)
    return tuple(100 * value for value in (line.slope, line.slope - half, line.slope + half))


def student(freedom: int) -> float:
    """The 97.5th percentile of Student's distribution, to 1 % from three degrees of freedom on (Fisher's expansion)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
