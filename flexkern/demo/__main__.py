"""Who forgets and who remembers: one room at twelve times the training length, filmed with several methods.

    python -m flexkern.demo --out demo_out

The lights go out for longer than the window, again and again. Writes an mp4 for each method, sheet.png (a row a method,
the truth first), films.webp (the same, moving), curves.png (memory and motion over time, over a few more rooms) and
figures.csv. Bits differ between CPUs: on another machine the rooms are the same, the films are not, pixel by pixel.
"""

import csv
import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flexkern.render.signals import leave_at_once, quietly

if __name__ == "__main__":  # before anything heavy is loaded
    leave_at_once("flexkern.demo")

try:
    import numpy as np
    import torch
    import tyro
    from numpy.typing import NDArray

    from flexkern.demo import FPS, rooms
    from flexkern.demo.evaluate import Spread
    from flexkern.demo.film_rooms import WEIGHTS, Case, film_chunks, load_engine
    from flexkern.demo.measure import curves
    from flexkern.demo.measure_rooms import FIGURES, Marks, measure, summary
    from flexkern.demo.picture import animation, dark_seconds, drift_plot, sheet, tiles
    from flexkern.policies import Preset, get_preset
    from flexkern.render.meter import Meter
    from flexkern.render.target import make_folder
    from flexkern.render.writer import VideoWriter
except ModuleNotFoundError as error:
    if str(error.name).startswith("flexkern"):
        raise
    advice = 'pip install "flexkern[video]"'
    print(f"flexkern.demo: error: the package {error.name!r} is not installed: {advice}", file=sys.stderr)
    raise SystemExit(2) from None

TRUTH = "truth"
METHODS: dict[str, tuple[str, dict[str, object]]] = {  # name -> preset, and what of it differs
    "plain window": ("self-forcing", {}),
    "sink": ("self-forcing", {"retention.sink": 3}),
    "pi": ("pi", {}),
    "flex": ("flex", {}),
}
VIDEO = 384  # pixels of an mp4, either way


@dataclass(kw_only=True)
class Args:
    """What to film."""

    out: Path = Path("demo_out")
    methods: list[str] = field(default_factory=lambda: list(METHODS))  # those four, or any preset
    seed: int = 0
    frames: int = 12 * rooms.TRAIN_FRAMES
    videos: int = 3  # rooms that the curves average, the shown one among them
    weights: Path = WEIGHTS
    device: str = "cpu"


def method(name: str) -> Preset:
    """A method that is shown, or a preset. Raises ValueError where it is neither."""
    base, overrides = METHODS.get(name, (name, {}))
    return get_preset(base, overrides)


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads for an operation, in this thread and in those that begin in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def film_all(args: Args, case: Case, presets: Mapping[str, Preset]) -> dict[str, torch.Tensor]:
    """Films [B, frames, 3, SIZE, SIZE] by method, as many methods at a time as the CPU has cores.

    Operations of this size are too small to share: a core for a method makes 1.4 times as many frames as two cores
    for one (two-core CPU, torch 2.13).
    """
    here, stop = threading.local(), threading.Event()
    at_once = min(len(presets), os.cpu_count() or 1) if torch.device(args.device).type == "cpu" else 1

    def film(preset: Preset) -> torch.Tensor:
        if not hasattr(here, "engine"):
            here.engine = load_engine(args.weights, device=args.device)
        made = []
        for chunk in film_chunks(here.engine, case, preset):
            if stop.is_set():
                raise KeyboardInterrupt
            made.append(chunk.latents.cpu())
            meter.advance(min(len(chunk.frames), args.frames - chunk.frames[0]))
        return torch.cat(made, dim=1)[:, : args.frames]

    threads = threads_of_torch(max(1, (os.cpu_count() or 1) // at_once))
    with threads, Meter("frames", program="flexkern.demo") as meter, ThreadPoolExecutor(at_once) as pool:
        meter.begin(len(presets) * args.frames)
        films = {name: pool.submit(film, preset) for name, preset in presets.items()}
        try:
            return {name: made.result() for name, made in films.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def lines(marks: Mapping[str, Marks], window: int) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What ``drift_plot`` draws."""
    found = {name: curves(one, window) for name, one in marks.items()}
    return {name: {figure: line.numpy() for figure, line in one.items()} for name, one in found.items()}


def report(path: Path, marks: Mapping[str, Marks], frames: int) -> str:
    """Write the figures over all frames beyond the horizon, and say them."""
    over = slice(rooms.TRAIN_FRAMES if frames > rooms.TRAIN_FRAMES else rooms.CHUNK, frames)
    said = [f"frames {over.start} to {frames - 1}, mean ± 95 % interval of the mean"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "first_frame", "last_frame", "figure", "mean", "interval95", "p10", "p90", "films"))
        for name, one in marks.items():
            found = {k: Spread.of(v) for k, v in summary(one, over).items()}
            said.append(f"{name:14}" + "  ".join(f"{k} {found[k].mean:.3f} ± {found[k].interval:.3f}" for k in FIGURES))
            for figure, s in found.items():
                numbers = (f"{x:.4f}" for x in (s.mean, s.interval, s.low, s.high))
                writer.writerow((name, over.start, frames - 1, figure, *numbers, s.count))
    return "\n".join(said)


def write_video(path: Path, film: torch.Tensor) -> None:
    """An mp4 of a film [T, 3, h, w] in [-1, 1]."""
    with VideoWriter(path, VIDEO, VIDEO, FPS) as writer:
        for part in film.split(FPS):  # a second at a time: an hour of pictures does not fit into memory
            writer.write(np.stack([np.asarray(picture) for picture in tiles(part, VIDEO)]))


def validate(args: Args) -> None:
    """Make the folder. Raises ValueError for a method that is none, OSError where the folder cannot be written to."""
    for name in args.methods:
        method(name)
    make_folder(args.out)


def main(args: Args) -> None:
    """Film, measure, draw."""
    began = time.perf_counter()
    presets = {name: method(name) for name in args.methods}  # a misspelt one fails before the work
    case = Case.random(scenes=args.videos, frames=args.frames, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    made = {TRUTH: case.truth()} | film_all(args, case, presets)
    marks = {name: measure(films, case) for name, films in made.items()}
    first = {name: films[0] for name, films in made.items()}
    for name, film in first.items():
        write_video(args.out / f"{name.replace(' ', '-')}.mp4", film)
    sheet(args.out / "sheet.png", first, case.lights)
    animation(args.out / "films.webp", first)
    times = args.frames / rooms.TRAIN_FRAMES
    drift_plot(
        args.out / "curves.png", lines({name: marks[name] for name in presets}, rooms.TRAIN_FRAMES), fps=FPS,
        horizon=rooms.TRAIN_FRAMES, window=rooms.TRAIN_FRAMES, shaded=dark_seconds(case.lights),
        title=f"{args.frames / FPS:.0f} s, {times:.3g} times the training horizon; grey: lights off",
    )  # fmt: skip
    print(report(args.out / "figures.csv", marks, args.frames))
    few = "1 room is" if args.videos == 1 else f"{args.videos} rooms are"
    print(f"{few} few: tables over 16, film by film, are in flexkern/docs/evidence.md")
    written = "videos, sheet.png, films.webp, curves.png and figures.csv"
    print(f"{time.perf_counter() - began:.0f} s; {written} in {args.out}")


if __name__ == "__main__":
    with quietly("flexkern.demo"):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a locale may know ASCII alone, and no plus-minus
        chosen = tyro.cli(Args, prog="python -m flexkern.demo", description=__doc__)
        try:
            validate(chosen)
        except (ValueError, OSError) as error:
            print(f"flexkern.demo: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        main(chosen)
