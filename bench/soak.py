"""An hour of the demo's video, killed and resumed on the way: what a night of rendering would show.

python bench/soak.py                                   # 57,600 pictures, five kills; hours on a CPU
python bench/soak.py --pictures 960 --kills 2 --compare

Time per chunk and memory should stay flat, and checkpoints cost less than 2 % of the time. On a busy machine the time
of the processor says more than the clock on the wall: both are kept. One row for every 100 chunks goes to soak.csv in
the folder of --results, and a plot of them to soak.png. --compare renders the video once more, undisturbed, and
compares the bytes.
"""

import csv
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import tyro

LIMIT = 0.02  # of the time, for checkpoints
COLUMNS = ("run", "pictures", "ms_per_chunk", "cpu_ms_per_chunk", "resident_mb", "seconds", "copying", "writing")
PROMPTS = ("a red disc and a blue square on dark green, fast", "a yellow disc and a cyan square on black, slow")


@dataclass(kw_only=True)
class Args:
    """What to render."""

    pictures: int = 57_600
    kills: int = 5
    preset: str = "infinity-rope"
    threads: int = 1
    chunks: int = 100
    """of a row"""
    compare: bool = False
    """render it once more without a kill"""
    results: Path = machine.RESULTS / "demo"
    worker: Path | None = None
    """a video to begin or to go on with; rows go to stdout. For the process that is killed"""


def work(args: Args, target: Path) -> None:
    """Begin or go on with the video; print a row for so many chunks."""
    import torch

    from flexkern import demo
    from flexkern.render import Order, PromptSwitch, find_stopped, prepare, resume

    torch.set_num_threads(args.threads)
    engine, family = demo.load_engine(), demo.family()
    every = max(30.0, args.pictures / 2 / family.fps)  # seconds between two prompts; every other is a cut
    count = max(1, int(args.pictures / family.fps // every))
    script = tuple(PromptSwitch(at=i * every, prompt=PROMPTS[i % 2], cut=i % 2 == 0 and i > 0) for i in range(count))
    order = Order(script=script, pictures=args.pictures, target=target, preset=args.preset)
    try:
        find_stopped(target)
        job = resume(target, engine, family, tell=tell)
    except FileNotFoundError:
        job = prepare(order, engine, family, tell=tell)
    step, taken, worked, began = job.session.step, [], [], time.perf_counter()

    def timed():
        start, busy = time.perf_counter(), time.process_time()
        chunk = step()
        taken.append(1000 * (time.perf_counter() - start))
        worked.append(1000 * (time.process_time() - busy))
        if len(taken) == args.chunks:
            kept, spent = job.checkpoints, time.perf_counter() - began
            pace, work = statistics.median(taken), statistics.median(worked)
            row = (job.writer.pictures, pace, work, machine.resident() / 1e6, spent, kept.copying, kept.writing)
            print(json.dumps(row), flush=True)
            taken.clear()
            worked.clear()
        return chunk

    job.session.step = timed
    if not job.run(progress=False):
        raise SystemExit(1)


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def supervise(args: Args, folder: Path) -> tuple[Path, list[dict[str, float]]]:
    """The video, rendered by processes of which the first ones are killed; and their rows."""
    target, rows = folder / "soak.mp4", []
    command = [sys.executable, __file__, "--worker", str(target)]
    command += ["--pictures", str(args.pictures), "--threads", str(args.threads), "--chunks", str(args.chunks)]
    command += ["--preset", args.preset]
    stops = [args.pictures * (i + 1) // (args.kills + 1) for i in range(args.kills)]
    for run in range(args.kills + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(dict(zip(COLUMNS, (run, *json.loads(line)), strict=True)))
                made = rows[-1]["pictures"]
                print(f"run {run}, {made} pictures, {rows[-1]['ms_per_chunk']:.1f} ms a chunk", file=sys.stderr)
                if run < args.kills and made >= stops[run]:
                    process.send_signal(signal.SIGKILL)
                    break
            status = process.wait()
        if status != (-signal.SIGKILL if run < args.kills else 0):
            raise SystemExit(f"run {run} ended with status {status}")
    return target, rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Time per chunk and memory over the video; a line where it was killed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    for run in sorted({row["run"] for row in rows}):
        own = [row for row in rows if row["run"] == run]
        minutes = [row["pictures"] / 16 / 60 for row in own]
        above.plot(minutes, [row["ms_per_chunk"] for row in own], ".-", color="C0", linewidth=0.7, markersize=3)
        above.plot(minutes, [row["cpu_ms_per_chunk"] for row in own], ".-", color="C1", linewidth=0.7, markersize=3)
        below.plot(minutes, [row["resident_mb"] for row in own], ".-", color="C0", linewidth=0.7, markersize=3)
        if run:
            for axes in (above, below):
                axes.axvline(minutes[0], color="grey", linewidth=0.5, linestyle="--")
    above.set(ylabel="ms a chunk (median)", ylim=(0, None), title="the demo's video, killed and resumed at the lines")
    above.legend(["wall", "processor"], loc="lower right")
    most = max(row["resident_mb"] for row in rows)
    below.set(ylabel="resident MB", ylim=(0, 1.2 * most), xlabel="minutes of video")
    figure.savefig(path, dpi=120)


def summary(rows: list[dict[str, float]]) -> list[str]:
    """What was measured, in words; each with whether it is as it should be."""
    longest = [rows_of[-1] for run in {row["run"] for row in rows} if (rows_of := [r for r in rows if r["run"] == run])]
    seconds = sum(row["seconds"] for row in longest)
    cost = sum(row["copying"] + row["writing"] for row in longest) / seconds
    third = max(1, len(rows) // 3)
    ends = rows[:third], rows[-third:]
    wall, work = ([statistics.median(row[name] for row in part) for part in ends] for name in COLUMNS[2:4])
    last = [row["resident_mb"] for row in rows if row["run"] == rows[-1]["run"]]
    return [
        f"checkpoints: {100 * cost:.2f} % of the time ({'as promised' if cost < LIMIT else 'MORE THAN 2 %'})",
        f"a chunk, wall: {wall[0]:.1f} ms in the first third, {wall[1]:.1f} ms in the last",
        f"a chunk, processor: {work[0]:.1f} ms in the first third, {work[1]:.1f} ms in the last",
        f"memory of the last run: {last[0]:.0f} MB at its first row, {last[-1]:.0f} MB at its last",
    ]


def main(args: Args) -> None:
    if args.worker is not None:
        return work(args, args.worker)
    with tempfile.TemporaryDirectory() as folder:
        target, rows = supervise(args, Path(folder))
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        lines = [f"{args.pictures} pictures, {args.kills} kills, {args.threads} threads: {digest}", *summary(rows)]
        if args.compare:
            whole, _ = supervise(Args(pictures=args.pictures, kills=0, threads=args.threads, chunks=args.chunks,
                                      preset=args.preset), Path(tempfile.mkdtemp(dir=folder)))  # fmt: skip
            same = target.read_bytes() == whole.read_bytes()
            lines.append(f"the same bytes as undisturbed: {'yes' if same else 'NO'}")
    with (args.results / "soak.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 3) for name, value in row.items()} for row in rows)
    draw(rows, args.results / "soak.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, prog=machine.program(), description=machine.described(__doc__)))
