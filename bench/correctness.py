"""Is a kernel right on the shapes it is used at, and the same every time? Writes correctness.csv.

python bench/correctness.py frame_attention --save     # or hopper, another kernel, or a backend: flash-attn, xformers
python bench/correctness.py --pytest                   # the kernels' tests, on the GPU if there is one
python bench/correctness.py --pytest graphs            # of captured passes and chunks, and of steps that do not wait

Every shape is judged against the oracle in float64, then repeated and compared bit by bit; a small shape is repeated
10,000 times, which is how a race shows itself.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import harness
import machine
import torch
from harness import Case
from roofs import DEVICE

BENCHES = (
    "frame_attention", "hopper", "norm_rope_write", "modulate", "gate_residual", "add_modulate", "rms_norm",
    "causal_conv", "flash-attn", "xformers",
)  # fmt: skip
ATTENTION = {  # providers of bench_frame_attention.py
    "frame_attention": "portable",
    "hopper": "hopper",
    "flash-attn": "backend flash-attn",
    "xformers": "backend xformers",
}
PROVIDERS = ATTENTION | {"causal_conv": "hopper"}  # where it is not "triton"
WORKERS = 8  # processes of pytest-xdist
# the last one may hang
KERNELS = (
    "frame_attention", "norm_rope_write", "modulate", "gate_residual", "add_modulate", "rms_norm",
    "add_norm_silu", "to_bytes", "causal_conv", "frame_attention_hopper",
)  # fmt: skip
TESTS = {
    "kernels": tuple(f"tests/kernels/test_{name}.py" for name in KERNELS),
    "graphs": ("tests/engine/test_waiting.py", "tests/model/vae/test_graphs_on_gpu.py"),
}
# of loops that no GPU has run: the queue's item "variants" tries each in a process that may hang
TRIED_ALONE = "test_variants_on_a_gpu"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of correctness.csv. differing: how many of the repeats were not bitwise equal to the first call."""

    kernel: str
    shape: str
    error: float
    repeats: int
    differing: int
    verdict: str
    path: str = ""  # of our attention: "hopper plain", "portable 64x64 w4 s3 tma x2"
    gpu: str
    driver: str
    torch: str
    triton: str
    interpreter: str = ""  # "yes" where Triton interprets kernels
    commit: str
    day: str


def count_differing(case: Case, name: str, repeats: int) -> int:
    """Repeats whose result is not the first one, bit by bit. The host does not wait between calls."""
    provider = case.providers[name]
    everything = provider.everything or provider.result
    result = lambda: everything(provider.call())
    case.reset()
    first = result().clone()
    differing = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        differing += (result() != first).any()
    return differing.item()


def judge(kernel: str, case: Case, name: str, repeats: int) -> Verdict:
    """Judge one provider of a case, then repeat it."""
    error, fault = harness.judge(case, case.providers[name])
    differing = 0 if fault else count_differing(case, name, repeats)
    verdict = fault or (f"wrong: {differing} of {repeats} repeats differ" if differing else "right")
    about = dict(kernel=kernel, shape=case.shape, error=error, repeats=0 if fault else repeats, differing=differing)
    about["path"] = getattr(case.providers[name], "path", "")  # a string has none: it cannot run here
    return Verdict(**about, verdict=verdict, **harness.provenance())


def cases(kernel: str, is_tiny: bool) -> Iterator[tuple[Case, int]]:
    """Cases of a kernel, and how often each is repeated: the small shape last, and most often."""
    is_attention = kernel in ATTENTION
    bench = import_module("bench_frame_attention" if is_attention else f"bench_{kernel}")
    shapes = [] if is_tiny else [(shape, 50) for shape in bench.SHORT]
    if is_attention:
        small = bench.TINY if is_tiny else replace(bench.SHORT[0], frames=1, read=3)
        build = lambda shape: bench.build(shape, (ATTENTION[kernel],))
    else:
        small, build = bench.TINY if is_tiny else bench.SHORT[1], bench.build
    for shape, repeats in [*shapes, (small, 3 if is_tiny else 10_000)]:
        yield build(shape), repeats


def run_pytest(which: str) -> int:
    import pytest

    tests = [str(path) for name in TESTS[which] if (path := machine.ROOT / name).is_file()]
    options = ["--rootdir", str(machine.ROOT), "-q", "--maxfail=20", "-p", "no:cacheprovider", "--durations=5"]
    options += ["-k", f"not {TRIED_ALONE}"]
    if find_spec("xdist"):  # nearly all the time goes into compiling; workers import this tree through ``machine``
        options += ["-n", str(WORKERS), "-p", "machine"]
    return pytest.main([*options, *tests])


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("kernel", nargs="?", choices=BENCHES)
    parser.add_argument("--pytest", nargs="?", const="kernels", choices=list(TESTS))
    args = parser.parse_args()
    if args.pytest:
        raise SystemExit(run_pytest(args.pytest))
    out, all_right = harness.folder(args), True
    kernel = args.kernel or BENCHES[0]
    name = PROVIDERS.get(kernel, "triton")
    for case, repeats in cases(kernel, args.tiny or DEVICE == "cpu"):
        row = judge(kernel, case, name, repeats)
        error = "" if math.isnan(row.error) else f"  error {row.error:.2e}"
        if args.json:
            harness.show(row, as_json=True)
        else:
            print(f"{row.kernel} {row.shape}{error}  {row.repeats} repeats  {row.verdict}", flush=True)
        all_right &= row.verdict == "right" or row.verdict.startswith("absent")
        if out:
            harness.save([row], out / "correctness.csv", key=("kernel", "shape"))
    sys.exit(0 if all_right else 1)


if __name__ == "__main__":
    main()
