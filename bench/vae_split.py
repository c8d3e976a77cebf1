"""Where the time of a decoded chunk goes, by kind of kernel: what ``bench_vae.py`` adds to its rows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from breakdown import LINEAR, Span, by_kind, work_of
from harness import Row
from roofs import DEVICE

KINDS: dict[str, re.Pattern[str]] = {  # the first that a name fits; what fits none is other
    "ours": re.compile(r"add_norm_silu|to_bytes"),
    "convolution": re.compile(r"conv|fprop|dgrad|wgrad|winograd|im2col|vol2col", re.I),
    "attention": re.compile(r"flash|fmha|sdpa|attention", re.I),
    "product": LINEAR,
    "copy": re.compile(r"copy|memcpy|memset|cat|clone|contiguous|transpose|nchw|nhwc|upsample|pad", re.I),
}
NAMED = 3  # kernels that are named


@dataclass(frozen=True, kw_only=True)
class VaeRow(Row):
    """A decoded chunk. The parts are of a trace of another chunk than the timed ones; NaN where nothing was traced."""

    convolution_ms: float = math.nan
    product_ms: float = math.nan
    attention_ms: float = math.nan
    ours_ms: float = math.nan  # kernels of flexkern.kernels.vae
    copy_ms: float = math.nan  # copies, changes of layout, enlarging, padding
    other_ms: float = math.nan
    longest: str = ""  # the kernels that take longest, with what they take


def kind_of(name: str) -> str:
    """The kind of a kernel, or of an operator on a CPU."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def split(events: Sequence[dict], device: str = DEVICE) -> dict[str, float | str]:
    """The fields of a ``VaeRow`` that a Chrome trace of a chunk tells; none where nothing ran."""
    work = work_of(events, device)
    if not work:
        return {}
    spans: dict[str, list[Span]] = {kind: [] for kind in (*KINDS, "other")}
    taken: dict[str, float] = {}
    for event in work:
        spans[kind_of(event["name"])].append((event["ts"], event["ts"] + event["dur"]))
        taken[event["name"]] = taken.get(event["name"], 0.0) + event["dur"] / 1000
    short = lambda name: name.removeprefix("void ").partition("<")[0].partition("(")[0][:60]
    most = sorted(taken, key=lambda name: -taken[name])[:NAMED]
    return {
        **{f"{kind}_ms": ms for kind, ms in by_kind(spans).items()},
        "longest": ", ".join(f"{short(name)} {taken[name]:.3g} ms" for name in most),
    }
