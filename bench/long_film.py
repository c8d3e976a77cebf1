"""One room, filmed for an hour: what a method still knows of its first second.

python bench/long_film.py --out an_hour                         # 57,600 frames of flex: more than an hour on a CPU
python bench/long_film.py --out four_minutes --frames 3840 --method sink

Frames are kept in frames.npy as they are made, one uint8 picture each, and a film that is whole is not made again. Then
the video film.mp4, and minutes.csv: a row for each minute, with what ``flexkern.demo.measure_rooms`` says of it.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import torch
import tyro

from flexkern.demo import FPS, rooms
from flexkern.demo.__main__ import TRUTH, method, write_video
from flexkern.demo.film_rooms import Case, film_chunks, load_engine
from flexkern.demo.measure_rooms import FIGURES, measure, summary
from flexkern.kernels.reference import to_bytes
from flexkern.render.meter import Meter

MINUTE = 60 * FPS


@dataclass(kw_only=True)
class Args:
    """What to film."""

    out: Path
    method: str = "flex"  # of the demo's four, any preset, or truth
    frames: int = 60 * MINUTE
    seed: int = 0
    threads: int = 1  # one film has too little in an operation for more


def film(args: Args, case: Case) -> np.ndarray:
    """uint8 [frames, SIZE, SIZE, 3]; made, where it is not there as a whole."""
    whole, part = args.out / "frames.npy", args.out / "frames.part.npy"
    if not whole.exists():
        shape = args.frames, rooms.SIZE, rooms.SIZE, 3
        held = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        first = 0
        with Meter("frames", program=machine.program()) as meter:
            meter.begin(args.frames)
            for latents in parts(args, case):
                made = to_bytes(latents.movedim(1, -1))[: args.frames - first]
                held[first : first + len(made)] = made.numpy()
                first += len(made)
                meter.advance(len(made))
        held.flush()
        part.rename(whole)
    return np.load(whole, mmap_mode="r")


def parts(args: Args, case: Case) -> Iterator[torch.Tensor]:
    """The film, [T, 3, SIZE, SIZE] of a few frames at a time."""
    if args.method != TRUTH:
        yield from (chunk.latents[0] for chunk in film_chunks(load_engine(), case, method(args.method)))
        return
    for frames in torch.arange(args.frames).split(MINUTE):
        centres = case.rooms.centres(case.scenes, frames)
        yield rooms.render(case.scenes, case.rooms, centres, case.lights[None, frames])[0]


def measured(latents: torch.Tensor, case: Case, path: Path) -> None:
    """A row for each minute of latents [T, 3, SIZE, SIZE]; the first without what was given, and its horizon."""
    marks = measure(latents[None], case)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("minute", "first_frame", "last_frame", *FIGURES))
        for start in range(0, len(latents), MINUTE):
            over = slice(max(start, rooms.TRAIN_FRAMES), min(start + MINUTE, len(latents)))
            found = summary(marks, over)
            numbers = (f"{found[name].item():.4f}" for name in FIGURES)
            writer.writerow((start // MINUTE, over.start, over.stop - 1, *numbers))


def main(args: Args) -> None:
    """Film, write, measure."""
    torch.set_num_threads(args.threads)
    if args.method != TRUTH:
        method(args.method)  # a misspelt one fails before the work
    args.out.mkdir(parents=True, exist_ok=True)
    case = Case.random(scenes=1, frames=args.frames, seed=args.seed)
    pictures = torch.from_numpy(np.array(film(args, case))).movedim(-1, 1)
    latents = pictures.to(torch.float16) / 127.5 - 1  # exact to the byte, and an hour of them fits into memory
    write_video(args.out / "film.mp4", latents)
    measured(latents, case, args.out / "minutes.csv")


if __name__ == "__main__":
    main(tyro.cli(Args, prog=machine.program(), description=machine.described(__doc__)))
