"""Judge, time and record: shared by every bench.

A bench builds ``Case``s, one per shape. Every provider of a case is judged first, against the oracle in float64; if its
error exceeds its budget, it is recorded as wrong and not timed. The others are timed in interleaved rounds (A B C,
C B A, ...), so that a drifting clock affects all of them equally, each call with a cold L2 cache, on random data.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import pytest
import roofs
import torch
import triton
from roofs import DEVICE, Roofs, measure
from torch import Tensor

from flexkern.testing import assert_as_accurate


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a CSV. Times are NaN if nothing was timed; ``note`` then says why."""

    kernel: str
    provider: str
    shape: str  # "1.3B 480p B=1 F=3 R=21 S=1560 H=12 D=128 bfloat16"
    ms: float = math.nan  # median
    ms_20: float = math.nan  # 20th percentile
    ms_80: float = math.nan
    gb_s: float = math.nan  # 1e9 bytes per second, of the bytes that the operation must move
    tflop_s: float = math.nan  # of the floating-point operations that the mathematics needs
    roof_percent: float = math.nan  # of the copy rate or the large bf16 product measured in the same run
    error: float = math.nan  # mean distance from the float64 oracle over the mean magnitude
    pictures_s: float = math.nan  # pictures per second, where a row is of a whole chunk
    peak_gb: float = math.nan  # 1e9 bytes, the most that was allocated at once: on the GPU, or by the process on a CPU
    note: str = ""
    path: str = ""  # of our attention: "hopper plain", "portable 64x64 w4 s3 tma x2"
    gpu: str
    driver: str
    torch: str
    triton: str
    interpreter: str = ""  # "yes" where Triton interprets kernels, whether or not this provider has any
    commit: str
    day: str
    clocks: str = ""  # of the GPU while the case ran: "sm 1740 MHz, memory 3201 MHz"
    load: float = math.nan  # processes that wanted a CPU, over the last minute
    threads: int = 0  # CPU threads of torch


KEY = ("kernel", "provider", "shape")


def provenance() -> dict[str, str]:
    """Where a row comes from."""
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "driver": machine.ask_gpu("driver_version") or "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "interpreter": "yes" if triton.knobs.runtime.interpret else "",
        "commit": machine.commit(),
        "day": date.today().isoformat(),
    }


def conditions(call: Callable[[], object]) -> dict[str, object]:
    """What a time depends on beside the machine, seen while ``call`` runs."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    clocks = machine.clocks_during(lambda: (call(), torch.cuda.synchronize())) if DEVICE == "cuda" else ""
    return {"clocks": clocks, "load": load, "threads": torch.get_num_threads()}


def load(path: Path, kind: type = Row) -> list:
    """The rows of a CSV; none if the file does not exist."""
    if not path.is_file():
        return []
    types = {field.name: field.type for field in fields(kind)}
    read = {float: lambda text: float(text) if text else math.nan, int: lambda text: int(text or 0), str: str}
    with path.open(newline="") as file:
        return [
            kind(**{name: read[types[name]](text) for name, text in row.items() if name in types})
            for row in csv.DictReader(file)
        ]


def save(rows: Sequence, path: Path, key: Sequence[str] = KEY) -> None:
    """Add rows to a CSV; a row with the same key takes the place of the old one. The file is never half written."""
    identity = lambda row: tuple(getattr(row, name) for name in key)
    merged = {identity(row): row for row in [*load(path, type(rows[0])), *rows]}
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: as_text(value) for name, value in asdict(row).items()} for row in merged.values())
        partial.replace(path)
    except OSError as fault:  # what was there stays
        with contextlib.suppress(OSError):
            partial.unlink()
        machine.refuse(f"cannot write {path}: {fault.strerror}", status=1)


def as_text(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.5g}"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a result is judged by. exact: the oracle in float64. entitled: the oracle in the declared numerics."""

    exact: Tensor
    entitled: Tensor

    def judge(self, actual: Tensor, mean: float, worst: float) -> tuple[float, str]:
        """Relative mean error, and what is wrong with it, "" if nothing is."""
        assert actual.shape == self.exact.shape, f"shape {list(actual.shape)} instead of {list(self.exact.shape)}"
        error = ((actual.double() - self.exact).abs().mean() / self.exact.abs().mean()).item()
        try:
            assert_as_accurate(actual, self.exact, self.entitled, mean, worst)
        except AssertionError as fault:
            return error, f"wrong: {fault}"
        return error, ""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute a case.

    call: what is timed. result: what is judged, from what ``call`` returns; None if there is nothing to judge.
    everything: all that was computed, to compare repeats; None for ``result``. mean, worst: budget, as multiples of the
    entitled error. calls: operations in one ``call``. truth: what to judge by, if not the case's. path: which of our
    attention kernels it launches, and with which tile.
    """

    call: Callable[[], object]
    result: Callable[[object], Tensor] | None = lambda out: out
    everything: Callable[[object], Tensor] | None = None
    mean: float = 1.05
    worst: float = 2.0
    calls: int = 1
    truth: Truth | None = None
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one operation. In place of a provider that cannot run here stands a string that says why.

    bytes, flops: of one operation, by the mathematics. reset: fills whatever a provider writes in place with NaN.
    """

    kernel: str
    shape: str
    bytes: int
    flops: int
    bound: str  # "copy" or "matmul": the roof it is held against
    providers: dict[str, Provider | str]
    truth: Truth
    reset: Callable[[], object] = lambda: None


def judge(case: Case, provider: Provider | str) -> tuple[float, str]:
    """Relative error of a provider, and why it must not be timed, "" if it may."""
    if isinstance(provider, str):
        return math.nan, f"absent: {provider}"
    case.reset()
    try:
        out = provider.call()
        if provider.result is None:
            return math.nan, ""
        return (provider.truth or case.truth).judge(provider.result(out), provider.mean, provider.worst)
    except Exception as fault:  # a peer may fail in any way; the others are still wanted
        return math.nan, f"failed: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def compare(case: Case, roof: Roofs, *, budget_ms: float = 200.0, note: str = "", as_json: bool = False) -> list[Row]:
    """Judge all providers of a case, then time those that are right side by side. Prints a line for each."""
    judged = {name: judge(case, provider) for name, provider in case.providers.items()}
    good = [name for name, (_, fault) in judged.items() if not fault]
    taken = dict(zip(good, measure([case.providers[name].call for name in good], budget_ms), strict=True))
    around = conditions(case.providers[good[0]].call if good else lambda: None)
    rows = []
    for name, (error, fault) in judged.items():
        timed = {}
        if name in taken:
            timed = rates(case, [ms / case.providers[name].calls for ms in taken[name]], roof)
        about = dict(kernel=case.kernel, provider=name, shape=case.shape, error=error, note=fault or note)
        about["path"] = getattr(case.providers[name], "path", "")  # a string has none: it cannot run here
        rows.append(Row(**about, **timed, **around, **provenance()))
        show(rows[-1], as_json=as_json)
    return rows


def rates(case: Case, times: Sequence[float], roof: Roofs) -> dict[str, float]:
    """The measured columns of a row, from milliseconds per operation."""
    ms_20, ms, ms_80 = quantiles(times)
    gb_s, tflop_s = case.bytes / ms / 1e6, case.flops / ms / 1e9 if case.flops else math.nan
    percent = 100 * (gb_s / roof.copy_gb_s if case.bound == "copy" else tflop_s / roof.matmul_tflop_s)
    return dict(ms=ms, ms_20=ms_20, ms_80=ms_80, gb_s=gb_s, tflop_s=tflop_s, roof_percent=percent)


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def show(row: Any, *, as_json: bool) -> None:
    """Print a row: a line to read, or a JSON object on a line, in which what was not measured is null."""
    if as_json:
        found = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(row).items()}
        print(json.dumps(found), flush=True)
    else:
        print(describe(row), flush=True)


def describe(row: Row) -> str:
    head = f"{row.kernel} {row.shape}  {row.provider:<28}"
    if math.isnan(row.ms):
        return f"{head} {row.note}"
    parts = [
        (row.ms, f"{row.ms:9.4f} ms ({row.ms_20:.4f} to {row.ms_80:.4f})"),
        (row.gb_s, f"{row.gb_s:8.4g} GB/s"),
        (row.tflop_s, f"{row.tflop_s:8.4g} TFLOP/s"),
        (row.roof_percent, f"{row.roof_percent:7.3g} % of the roof"),
        (row.pictures_s, f"{row.pictures_s:7.2f} pictures/s"),
        (row.peak_gb, f"peak {row.peak_gb:.2f} GB"),
        (row.error, f" error {row.error:.2e}"),
    ]
    return f"{head} {' '.join(text for value, text in parts if not math.isnan(value))}"


def shown_results() -> str:
    return "bench/results" if machine.CHECKOUT else machine.RESULTS.name


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    about = dict(prog=machine.program(), description=machine.described(doc))
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = shown_results()
    parser.add_argument("--save", action="store_true", help=f"write {shown}/<gpu>/<kernel>.csv")
    parser.add_argument("--out", type=Path, help=f"write there instead of {shown}/<gpu>")
    parser.add_argument("--all", action="store_true", help="every shape instead of the short list")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, which a CPU manages in the interpreter")
    parser.add_argument("--json", action="store_true", help="print every row as a JSON object on a line")
    parser.add_argument("--budget-ms", type=float, default=200.0, help="time given to each provider and shape")
    return parser


def folder(args: argparse.Namespace) -> Path | None:
    """The folder that rows go to, made if needed; None if they are not saved."""
    if args.out:
        return machine.writable(args.out)
    if args.save and DEVICE == "cpu":
        machine.refuse(f"no CUDA GPU: only figures of a GPU belong in {shown_results()} (use --out to see the CSV)")
    return machine.writable(machine.RESULTS / machine.folder_of(provenance()["gpu"])) if args.save else None


def shapes_for(args: argparse.Namespace, short: Sequence, every: Sequence, tiny: object) -> Sequence:
    return [tiny] if args.tiny or DEVICE == "cpu" else every if args.all else short


def run(args: argparse.Namespace, name: str, shapes: Iterable, build: Callable[..., Case]) -> None:
    """Compare the providers at each shape; ``name``.csv is written after every shape."""
    out, roof = folder(args), roofs.measure_roofs()
    print(f"{provenance()}\n{roof}", file=sys.stderr if args.json else sys.stdout)
    for shape in shapes:
        rows = compare(build(shape), roof, budget_ms=args.budget_ms, as_json=args.json)
        if out:
            save(rows, out / f"{name}.csv")


def speed_test(shapes: Sequence, tiny: object, providers: Sequence[str], build: Callable[..., Case]) -> Callable:
    """A test for pytest-benchmark of the same cases: cold L2, timed by the GPU's own clock."""
    built = {}
    # without the plugin its mark is unknown, and bench/conftest.py skips the test
    on_the_gpu_clock = pytest.mark.benchmark(timer=roofs.stamp) if find_spec("pytest_benchmark") else lambda test: test

    @on_the_gpu_clock
    @pytest.mark.parametrize("provider", providers)
    @pytest.mark.parametrize("shape", shapes if DEVICE == "cuda" else [tiny], ids=str)
    def test(benchmark, shape, provider):
        if shape not in built:
            built.clear()
            built[shape] = build(shape)
        case = built[shape]
        chosen = case.providers.get(provider, "this shape does not have it")
        error, fault = judge(case, chosen)
        if fault.startswith("absent"):
            pytest.skip(fault)
        assert not fault, fault
        benchmark.group = f"{case.kernel} {case.shape}"
        benchmark.extra_info.update(error=error, calls=chosen.calls, **provenance())
        rounds = 20 if DEVICE == "cuda" else 2
        benchmark.pedantic(chosen.call, setup=roofs.flush, rounds=rounds, warmup_rounds=3)
        if benchmark.stats:  # None under --benchmark-disable
            per_call = benchmark.stats.stats.median / chosen.calls
            benchmark.extra_info.update(gb_s=case.bytes / per_call / 1e9, tflop_s=case.flops / per_call / 1e12)

    return test
