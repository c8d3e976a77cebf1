"""Check and measure on a bare GPU machine for ten minutes, most valuable first; needs torch, triton and pytest.

python bench/gpu_suite.py --dry-run          # the queue with time estimates
python bench/gpu_suite.py                    # results in bench/results/<gpu>
python bench/gpu_suite.py --from peers       # the next command, where the first ran out of time

Every item is a process of its own with a time limit, and writes its results as it goes. A run that is cut off loses
only the item it was at; suite.csv says how every item ended and suite.log what it printed. To run from an archive, see
``machine.commit``.
"""

import argparse
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import machine

GRACE = 5.0  # seconds that an item needs to be worth starting
KERNELS = ("norm_rope_write", "modulate", "gate_residual", "add_modulate", "rms_norm")
LIBRARIES = {"flash-attn": ("flash_attn", "flash_attn_interface"), "xformers": ("xformers",)}  # and their modules


@dataclass(frozen=True, kw_only=True)
class Item:
    """One process of the queue. estimate, limit: seconds, guessed. absent: why it cannot run here, "" if it can."""

    name: str
    doc: str
    command: list[str]
    estimate: float
    limit: float
    absent: Callable[[], str] = field(default=lambda: "")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of suite.csv. outcome: running, ok, failed (code n), cut off, skipped (why), not reached."""

    item: str
    outcome: str
    seconds: float
    limit: float
    commit: str
    started: str


def without(tool: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(tool) else f"{tool} is not installed"


def without_package(*names: str) -> Callable[[], str]:
    return lambda: "" if any(find_spec(name) for name in names) else f"{names[0]} is not installed"


def without_hopper() -> str:
    return "" if find_spec("flexkern.kernels.attention.hopper") else "no such kernel in this version"


def without_tests() -> str:
    return "" if (machine.ROOT / "tests").is_dir() and machine.CHECKOUT else "the tests are not installed"


def python(script: str, *options: str) -> list[str]:
    return [sys.executable, str(machine.BENCH / script), *options]


def make_queue(out: Path) -> list[Item]:
    """The queue, most valuable first. ``out``: where results go."""
    to = ("--out", str(out))
    correctness = lambda kernel: python("correctness.py", kernel, *to)
    attention = lambda *options: python("bench_frame_attention.py", *options, *to)
    profiled = python("bench_frame_attention.py", "--what", "once")
    tiny = python("correctness.py", "frame_attention", "--tiny")
    checks = [
        Item(name="correctness frame_attention", doc="against float64 on real shapes, 10,000 repeats bitwise equal",
             command=correctness("frame_attention"), estimate=45, limit=150),
        # each loop in processes of its own, which a fault ends; what it decides is what everything waits for
        Item(name="variants", doc="which loop of the Hopper kernel: each tried, checked and timed",
             command=attention("--what", "variants"), estimate=120, limit=150, absent=without_hopper),
        Item(name="default path", doc="a render without any option takes the Hopper kernel",
             command=python("default_path.py"), estimate=30, limit=75, absent=without_package("numpy")),
        *(Item(name=f"correctness {kernel}", doc="the same", command=correctness(kernel), estimate=12, limit=60)
          for kernel in KERNELS),
        Item(name="correctness hopper", doc="the warp-specialised kernel: a fault may make it hang",
             command=correctness("hopper"), estimate=25, limit=75, absent=without_hopper),
        Item(name="correctness causal_conv", doc="the convolution for sm_90: a fault may make it hang",
             command=correctness("causal_conv"), estimate=30, limit=75, absent=without_hopper),
        *(Item(name=f"correctness {library}", doc="the backend over that library, against float64",
               command=correctness(library), estimate=15, limit=75, absent=without_package(*packages))
          for library, packages in LIBRARIES.items()),
        # alone they take over 120 s, nearly all of it compiling; with pytest-xdist eight processes share it
        Item(name="tests", doc="the kernels' tests on the GPU", command=python("correctness.py", "--pytest"),
             estimate=40, limit=150, absent=without_tests),
        Item(name="graphs", doc="captured passes and chunks give the bits of launched ones; no step waits for the GPU",
             command=python("correctness.py", "--pytest", "graphs"), estimate=50, limit=120, absent=without_tests),
    ]  # fmt: skip
    timings = [
        Item(name="roofs", doc="bf16 product, copy, clocks", command=python("bench_roofs.py", *to),
             estimate=12, limit=45),
        # 20 s for the first path with each of two presets, 6 s for others; the rest is compiling and filling windows
        Item(name="engine", doc="a chunk of Wan 1.3B with random weights, beside an eager research pipeline",
             command=python("bench_engine.py", "--seconds", "20", *to), estimate=190, limit=240,
             absent=without_package("numpy")),
        Item(name="causal_conv", doc="the VAE's convolutions, ours and cuDNN's",
             command=python("bench_causal_conv.py", *to), estimate=30, limit=90, absent=without_hopper),
        Item(name="vae", doc="the VAE's decoder, ours and diffusers'; compiling the latter takes longest",
             command=python("bench_vae.py", *to), estimate=125, limit=200),
        Item(name="attention", doc="ours at every shape of the short list", command=attention("--what", "ours"),
             estimate=35, limit=100),
        Item(name="hopper", doc="the portable and the warp-specialised kernel at the same shapes",
             command=attention("--what", "hopper"), estimate=35, limit=90, absent=without_hopper),
        Item(name="tiles", doc="every tile that might be better, windows 21 and 12",
             command=attention("--what", "tiles"), estimate=60, limit=150),
        Item(name="peers", doc="libraries, backends over them and designs of the turn, interleaved",
             command=attention("--what", "peers"), estimate=140, limit=240),
        *(Item(name=kernel, doc="against torch, torch.compile and a copy", command=python(f"bench_{kernel}.py", *to),
               estimate=22, limit=75) for kernel in KERNELS),
        Item(name="ncu", doc="profile of the hot kernel", estimate=25, limit=90, absent=without("ncu"),
             command=["ncu", "--set", "full", "--kernel-name", "regex:_frame_attention", "--launch-count", "1",
                      *profiled]),
        *(Item(name=f"sanitizer {tool}", doc="compute-sanitizer on a tiny shape", estimate=20, limit=90,
               absent=without("compute-sanitizer"), command=["compute-sanitizer", "--tool", tool, *tiny])
          for tool in ("memcheck", "racecheck")),
    ]  # fmt: skip
    return [*checks, *timings]


def choose(items: Sequence[Item], only: Sequence[str], start: str | None) -> list[Item]:
    """The items named, in the queue's order. Raises ValueError for a name that is not there."""
    names = [item.name for item in items]
    unknown = [name for name in (*only, *([start] if start else [])) if name not in names]
    if unknown:
        raise ValueError(f"no item {unknown[0]!r} in the queue: {', '.join(names)}")
    first = names.index(start) if start else 0
    return [item for item in items[first:] if not only or item.name in only]


@contextlib.contextmanager
def child(command: Sequence[str], log) -> Iterator[subprocess.Popen]:
    """A process in a session of its own; whatever of it is left at the end is killed."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=machine.child_environment(), cwd=machine.ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_item(item: Item, limit: float, log_path: Path) -> str:
    """Run one item and say how it ended; what it prints is appended to the log."""
    with log_path.open("ab") as log:
        log.write(f"\n=== {item.name}: {' '.join(item.command)}\n".encode())
        log.flush()
        try:
            with child(item.command, log) as process:
                code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "cut off"
        except OSError as fault:
            return f"failed ({fault})"
    return "ok" if code == 0 else f"failed (code {code})"


def tail(path: Path, start: int, lines: int) -> str:
    """The last lines of what a log holds after ``start`` bytes, whatever bytes they are."""
    with path.open("rb") as file:
        file.seek(start)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def record(outcome: Outcome, path: Path) -> None:
    """Write the outcome into its item's line of suite.csv. The file is never half written."""
    rows = {}
    if path.is_file():
        with path.open(newline="") as file:
            rows = {row["item"]: row for row in csv.DictReader(file)}
    rows[outcome.item] = asdict(outcome)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    partial.replace(path)


def run_queue(items: Sequence[Item], out: Path, minutes: float) -> list[Outcome]:
    """Run the items in turn until the time is up; suite.csv is written after each."""
    out.mkdir(parents=True, exist_ok=True)
    log, end, outcomes = out / "suite.log", time.monotonic() + 60 * minutes, []
    for item in items:
        began, started = time.monotonic(), time.strftime("%Y-%m-%d %H:%M:%S")
        limit, absent = min(item.limit, end - began), item.absent()

        def note(said: str, item=item, began=began, started=started, limit=limit) -> Outcome:
            times = dict(seconds=round(time.monotonic() - began, 1), limit=round(limit, 1), started=started)
            outcome = Outcome(item=item.name, outcome=said, commit=machine.commit(), **times)
            record(outcome, out / "suite.csv")
            return outcome

        if absent:
            outcomes.append(note(f"skipped ({absent})"))
        elif limit < min(GRACE, item.limit):
            outcomes.append(note("not reached"))
        else:
            print(f"--- {item.name}: {item.doc} (at most {limit:.0f} s)", flush=True)
            note("running")  # stays if this process is killed
            mark = log.stat().st_size if log.exists() else 0
            outcomes.append(note(run_item(item, limit, log)))
            print(tail(log, mark, 12 if outcomes[-1].outcome == "ok" else 30), flush=True)
        print(f"=== {item.name}: {outcomes[-1].outcome}, {outcomes[-1].seconds} s", flush=True)
    return outcomes


def describe(items: Sequence[Item], minutes: float) -> str:
    """The queue as text, with estimated times."""
    lines, total = [f"{'item':<28}{'estimate':>9}{'limit':>7}   what"], 0.0
    for item in items:
        absent = item.absent()
        total += 0 if absent else item.estimate
        what = f"{item.doc}  [skipped here: {absent}]" if absent else item.doc
        lines.append(f"{item.name:<28}{item.estimate:>7.0f} s{item.limit:>5.0f} s   {what}")
    lines.append(f"{'in all':<28}{total:>7.0f} s   estimated, of {60 * minutes:.0f} s; later items give way")
    return "\n".join(lines)


def main() -> int:
    about = dict(prog=machine.program(), description=machine.described(__doc__))
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the queue and stop")
    parser.add_argument("--minutes", type=float, default=9.5, help="wall time for everything (default 9.5)")
    parser.add_argument("--out", type=Path, help="default bench/results/<gpu>")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM")
    parser.add_argument("--from", dest="start", metavar="ITEM", help="leave out what comes before it")
    args = parser.parse_args()
    gpu = machine.ask_gpu("name")
    if not gpu and not args.dry_run:  # a container may lack nvidia-smi
        gpu = machine.answer(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())")
    out = (args.out or machine.RESULTS / machine.folder_of(gpu)).absolute()
    try:
        items = choose(make_queue(out), args.only, args.start)
    except ValueError as fault:
        parser.error(str(fault))
    print(describe(items, args.minutes), flush=True)
    if args.dry_run:
        return 0
    if not gpu:
        parser.error("there is no CUDA GPU: only --dry-run works here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running item is killed too
    outcomes = [outcome.outcome for outcome in run_queue(items, out, args.minutes)]
    return 0 if all(said == "ok" or said.startswith("skipped") for said in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
