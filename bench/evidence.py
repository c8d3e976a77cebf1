"""Does it work? Presets at 1 to 48 times the training horizon, then FLEX taken apart, on the world that needs memory.

    python bench/evidence.py                    # the small setting: 16 films a variant, about two hours on two cores
    python bench/evidence.py --films 48         # three times as many
    python bench/evidence.py --tables           # once more from films.csv, without filming

Every variant films the same rooms, prompts and noise, so that variants are compared film by film: a difference is the
mean over films of the difference to another variant, with a paired bootstrap interval of 95 %: presets and the parts
of FLEX to the plain window, the parts also to the sink alone, choices that the paper leaves open to the paper's own
equation. Figures are means over all frames beyond the horizon (of 1 x: over all generated ones), never over a part that
was chosen later.

Resumable: films.csv gets the rows of a batch of films in one write, and what it has is not made again. Rows of other
weights are refused; those of another commit stay where this one measures the same on films that they have, to the last
digit, so that variants which came later stand beside them. From it come presets.csv, parts.csv, choices.csv, a picture
of each and reading.md.
"""

import csv
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import machine
import torch
import tyro
from evidence_tables import FIGURES, Row, draw, films, reading, results, write_results
from variants import ALL, CHOICES, FLEX, PARTS, PLAIN, SINK, Variant

from flexkern.demo import rooms
from flexkern.demo.film_rooms import WEIGHTS, Case, film, load_engine
from flexkern.demo.measure_rooms import Marks, measure, summary
from flexkern.engine import Engine
from flexkern.policies import PRESETS, Preset

HORIZONS = (1, 3, 6, 12)  # times the frames of a training clip
LEAST = (ALL, "bands + sink", "noise + sink", SINK)  # parts that are choices too: to do without noise or bands
BATCH = 8  # films in one write, and the most that an interruption loses
COLUMNS = (
    "variant", "horizon", "film", "prompt", "range", *FIGURES, "overrides", "weights", "commit", "torch", "day",
    "seconds",
)  # fmt: skip


@dataclass(kw_only=True)
class Args:
    """What to run."""

    weights: Path = WEIGHTS
    out: Path = machine.RESULTS / "evidence"
    films: int = 16  # rooms, each with its own prompt, noise and look
    presets: tuple[str, ...] = (*PRESETS, ALL, SINK)
    horizons: tuple[int, ...] = HORIZONS  # of the presets
    far: int = 48  # times the horizon, for those below; 0 for none of it
    far_presets: tuple[str, ...] = (PLAIN, SINK, ALL, FLEX)
    parts: int = 12  # times the horizon, at which the parts of FLEX are tried; 0 for none of it
    choices: int = 6  # the same for what the paper leaves open
    seed: int = 0
    processes: int = os.cpu_count() or 1  # each has an engine of its own
    threads: int = 1  # of each
    device: str = "cpu"
    tables: bool = False  # only these, from the films that were measured, whatever weights and commit they are of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Films of one variant, of a length that all its horizons are scored on."""

    variant: Variant
    horizons: tuple[int, ...]
    films: range


def depends_on_length(preset: Preset) -> bool:
    """Whether a film's beginning depends on how long it is to be."""
    position, noise = preset.position, preset.noise
    static = position.scale == "auto" and position.scale_schedule == "static" and position.mode != "none"
    return static or noise.rho_schedule == "linear_decay"


def wanted(args: Args) -> list[tuple[Variant, tuple[int, ...]]]:
    """Every variant once, with the horizons on which it is scored."""
    of_flex = {one.name: one for one in (*PARTS, *CHOICES)}
    named = lambda name: of_flex[name] if name in of_flex else Variant(name=name, base=name)
    groups = [(named(name), args.horizons) for name in args.presets]
    groups += [(named(name), (args.far,)) for name in args.far_presets]
    groups += [(one, (args.parts, args.choices if one.name in LEAST else 0)) for one in PARTS]
    groups += [(one, (args.choices,)) for one in CHOICES]
    found: dict[str, tuple[Variant, set[int]]] = {}
    for one, horizons in groups:
        found.setdefault(one.name, (one, set()))[1].update(h for h in horizons if h)
    return [(one, tuple(sorted(horizons))) for one, horizons in found.values() if horizons]


def cells(args: Args) -> list[Cell]:
    """All that there is to film, in order: batches of films outermost, so that early ones cover every variant."""
    found = []
    for first in range(0, args.films, BATCH):
        films = range(first, min(first + BATCH, args.films))
        for chosen, horizons in wanted(args):
            lengths = [(h,) for h in horizons] if depends_on_length(chosen.preset) else [horizons]
            found += [Cell(variant=chosen, horizons=h, films=films) for h in lengths]
    return found


def scored(horizon: int, frames: int) -> slice:
    """The frames that count: all beyond the horizon; at one horizon, all that were not given."""
    return slice(rooms.TRAIN_FRAMES if horizon > 1 else rooms.CHUNK, frames)


_engine: Engine | None = None  # of this process


def load(args: Args) -> None:
    """The engine of this process, once."""
    global _engine
    torch.set_num_threads(args.threads)
    _engine = _engine or load_engine(args.weights, device=args.device)


def make(cell: Cell, seed: int) -> list[Row]:
    """Film and measure: one row for each film and horizon."""
    assert _engine is not None
    began = time.perf_counter()
    frames = max(cell.horizons) * rooms.TRAIN_FRAMES
    # the same films whatever the number of them: film f is always drawn alone, with seed + f
    case = join([Case.random(scenes=1, frames=frames, seed=seed + f) for f in cell.films])
    marks = measure(film(_engine, case, cell.variant.preset), case)
    return rows_of(cell, case, marks, time.perf_counter() - began)


def rows_of(cell: Cell, case: Case, marks: Marks, seconds: float) -> list[Row]:
    """One row for each film and horizon."""
    rows = []
    changes = " ".join(f"{name}={value}" for name, value in cell.variant.overrides)
    for horizon in cell.horizons:
        over = scored(horizon, horizon * rooms.TRAIN_FRAMES)
        found = summary(marks, over)
        for b, number in enumerate(cell.films):
            figures = {name: f"{found[name][b].item():.5f}" for name in FIGURES}
            rows.append(
                {
                    "variant": cell.variant.name, "horizon": str(horizon), "film": str(number),
                    "prompt": str(case.scenes[b]), "range": f"{over.start}-{over.stop - 1}", **figures,
                    "overrides": changes, "seconds": f"{seconds:.1f}",
                }
            )  # fmt: skip
    return rows


def append(path: Path, rows: Sequence[Row]) -> None:
    """All rows at the end of the file in one write: an interruption leaves the file with all of them or none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows there are; a last line that a full disk cut off is taken away from the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return list(csv.DictReader(io.StringIO(whole.decode())))


def make_missing(args: Args, path: Path) -> None:
    """Film and measure every cell that the file lacks.

    Raises:
        ValueError: The file has rows of other weights, or of another commit that measures otherwise.
    """
    about = {
        "weights": hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12], "commit": machine.commit(),
        "torch": torch.__version__, "day": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    rows = read(path)
    if others := {row["weights"] for row in rows} - {about["weights"]}:
        raise ValueError(
            f"{path} has rows of weights {', '.join(sorted(others))}, this is {about['weights']}: move it away"
        )
    if others := {row["commit"] for row in rows} - {about["commit"]}:
        validate_same(args, path, rows, sorted(others))
    key = lambda row: (row["variant"], row["horizon"], row["film"])
    have = {key(row) for row in rows}
    ready = lambda cell: {(cell.variant.name, str(h), str(f)) for h in cell.horizons for f in cell.films} <= have
    todo = [cell for cell in cells(args) if not ready(cell)]
    for number, (cell, made) in enumerate(made_side_by_side(args, todo), 1):
        append(path, [row | about for row in made if key(row) not in have])
        took = f"{made[0]['seconds']} s"
        print(f"{number}/{len(todo)}  {cell.variant.name}  {cell.horizons}  films {cell.films}  {took}", flush=True)


def validate_same(args: Args, path: Path, rows: Sequence[Row], commits: Sequence[str]) -> None:
    """Raises ValueError unless the shortest films that there are of each of these commits are measured alike today."""
    load(args)
    for commit in commits:
        own = [row for row in rows if row["commit"] == commit]
        first = min(own, key=lambda row: int(row["horizon"]))
        films = [row for row in own if (row["variant"], row["horizon"]) == (first["variant"], first["horizon"])][:BATCH]
        of = next((one for one, _ in wanted(args) if one.name == first["variant"]), None)
        numbers = range(int(films[0]["film"]), int(films[-1]["film"]) + 1)
        again = (
            [] if of is None else make(Cell(variant=of, horizons=(int(first["horizon"]),), films=numbers), args.seed)
        )
        figures = lambda rows: [[row[name] for name in FIGURES] for row in rows]
        if figures(again) != figures(films):
            told = f"{path} has rows of commit {commit}, which measured films of {first['variant']} otherwise"
            raise ValueError(f"{told}: move it away")


def made_side_by_side(args: Args, todo: Sequence[Cell]) -> Iterator[tuple[Cell, list[Row]]]:
    """Cells and their rows as they are finished, several processes at work; with one process, this one."""
    if args.processes == 1 or len(todo) <= 1:
        if todo:
            load(args)
        yield from ((cell, make(cell, args.seed)) for cell in todo)
        return
    # spawned, because threads of torch do not survive a fork
    with ProcessPoolExecutor(
        args.processes, mp_context=get_context("spawn"), initializer=load, initargs=(args,)
    ) as pool:
        pending = {pool.submit(make, cell, args.seed): cell for cell in todo}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def join(cases: Sequence[Case]) -> Case:
    """Several cases with the same lights and consecutive seeds as one."""
    together = {
        name: torch.cat([getattr(case.rooms, name) for case in cases]) for name in rooms.Rooms.__dataclass_fields__
    }
    scenes = [scene for case in cases for scene in case.scenes]
    return Case(scenes=scenes, rooms=rooms.Rooms(**together), lights=cases[0].lights, seed=cases[0].seed)


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "films.csv"
    if not args.tables:
        make_missing(args, path)
    rows = read(path)
    if not rows:
        raise ValueError(f"{path} has no films")
    said = lambda name: ", ".join(dict.fromkeys(row[name] for row in rows))
    commit = said("commit")
    parts = [*(one.name for one in PARTS), FLEX]
    choices = [*LEAST, *(one.name for one in CHOICES)]
    presets = results(rows, args.presets, PLAIN)
    of_parts = {against: results(rows, parts, against, (args.parts,)) for against in (PLAIN, SINK)}
    of_choices = results(rows, choices, ALL, (args.choices, args.parts))
    write_results(args.out / "presets.csv", presets, commit)
    write_results(args.out / "parts.csv", [*of_parts[PLAIN], *of_parts[SINK]], commit)
    write_results(args.out / "choices.csv", of_choices, commit)
    longest = max(args.horizons)
    pictures = {
        "presets": [one for one in presets if one.horizon == longest],
        "parts": of_parts[PLAIN],
        "choices": [one for one in of_choices if one.horizon == args.choices],
    }
    for name, found in pictures.items():
        if found:
            where = f"difference to {found[0].against} at {found[0].horizon} x, {films(found)} films"
            draw(args.out / f"{name}.png", found, f"{name}: {where}")
    about = (
        "Films of a variant have a room, a prompt and noise of their own each, the same for all variants; "
        "means over all frames beyond the horizon (at one horizon: over all that were not given), differences film by "
        f"film with paired bootstrap intervals of 95 %. Commit {commit}, weights {said('weights')}, torch "
        f"{said('torch')}, {said('day')}, device {args.device}."
    )
    of_flex = results(rows, args.presets, FLEX, (longest,)) if FLEX in args.presets else []
    sections = [
        ("Presets", presets),
        ("Presets", of_flex),
        ("Parts of FLEX", of_parts[PLAIN]),
        ("Parts of FLEX", of_parts[SINK]),
    ]
    (args.out / "reading.md").write_text(
        reading([*sections, ("What the paper leaves open", of_choices)], about), encoding="utf-8"
    )
    print((args.out / "reading.md").read_text(encoding="utf-8"), file=sys.stdout)


if __name__ == "__main__":
    main(tyro.cli(Args, prog=machine.program(), description=machine.described(__doc__)))
