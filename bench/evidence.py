"""Does it work? Presets at 1 to 48 times the training horizon, then FLEX taken apart, on the world that needs memory.

    python bench/evidence.py --weights rooms.safetensors                    # the small setting: 16 films a variant
    python bench/evidence.py --weights rooms.safetensors --films 48         # three times as many

Every variant films the same rooms, prompts and noise, so that variants are compared film by film: a difference is the
mean over films of the difference to the plain window, with a paired bootstrap interval of 95 %. Figures are means over
all frames beyond the horizon (of 1 x: over all generated ones), never over a part that was chosen later.

Resumable: films.csv gets the rows of a batch of films in one write, and what it has is not made again; rows of other
weights or another commit are refused. From it come presets.csv, taken_apart.csv, two pictures and reading.md.
"""

import csv
import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from flexkern.demo import rooms
from flexkern.demo.film_rooms import Case, film, load_engine
from flexkern.demo.measure_rooms import Marks, measure, summary
from flexkern.engine import Engine
from flexkern.policies import PRESETS, Preset, get_preset

matplotlib.use("agg")

PLAIN = "self-forcing"
HORIZONS = (1, 3, 6, 12, 48)  # times the frames of a training clip
APART = 12  # times: the length at which FLEX is taken apart
BATCH = 8  # films in one write, and the most that an interruption loses
RESAMPLES = 10_000
MEMORY, MOTION = ("ground", "palette"), ("course", "speed")
FIGURES = (*MEMORY, "area", *MOTION)
BETTER = {"ground": -1, "palette": 1, "course": 1, "speed": 1}  # which way; of an area neither
COLUMNS = (
    "part", "variant", "horizon", "film", "prompt", "range", *FIGURES, "overrides", "weights", "commit", "torch",
    "day", "seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method under a name of its own: a preset, and the fields in which it differs."""

    name: str
    base: str = "flex"
    overrides: tuple[tuple[str, object], ...] = ()

    @property
    def preset(self) -> Preset:
        """Policies as the engine takes them."""
        return get_preset(self.base, dict(self.overrides))


def variant(name: str, base: str = "flex", **fields: object) -> Variant:
    """``position__alpha=0.1`` overrides position.alpha."""
    return Variant(name=name, base=base, overrides=tuple((k.replace("__", "."), v) for k, v in fields.items()))


NO_BANDS, NO_NOISE, NO_SINK = {"position__mode": "none"}, {"noise__kind": "iid"}, {"retention__sink": 0}
PARTS = (  # each alone, each pair, all: what is left of flex where the others are taken away
    variant(PLAIN, PLAIN),
    variant("bands", **NO_NOISE, **NO_SINK),
    variant("noise", **NO_BANDS, **NO_SINK),
    variant("sink", **NO_BANDS, **NO_NOISE),
    variant("bands + noise", **NO_SINK),
    variant("bands + sink", **NO_NOISE),
    variant("noise + sink", **NO_BANDS),
    variant("flex"),
)
CHOICES = (
    variant("slow the sink's distance only", position__reach="beyond"),
    variant("bands + sink, sink's distance only", position__reach="beyond", **NO_NOISE),
    variant("sink at slots", position__index="slot", **NO_BANDS, **NO_NOISE),
    variant("alpha 0.05, beta 0.25", position__alpha=0.05, position__beta=0.25),
    variant("alpha 0.5, beta 2", position__alpha=0.5, position__beta=2.0),
    variant("ramp smooth", position__ramp="smooth"),
    variant("ramp cosine", position__ramp="cosine"),
    variant("hard step at beta", position__mode="hard"),
    variant("pi's bands", position__mode="pi"),
    variant("scale static", position__scale_schedule="static"),
    variant("scale dynamic", position__scale_schedule="dynamic"),
    variant("scale 2", position__scale=2.0),
    variant("scale 4", position__scale=4.0),
    variant("rho -0.3", noise__rho=-0.3),
    variant("rho -0.9", noise__rho=-0.9),
    variant("rho +0.7", noise__rho=0.7),
    variant("noise per chunk", noise__scope="chunk"),
    variant("noise on every step", noise__apply="initial+renoise"),
    variant("sink 1", retention__sink=1),
    variant("sink 6", retention__sink=6),
    variant("window 12", retention__window=12),
    variant("window 15", retention__window=15),
)


@dataclass(kw_only=True)
class Args:
    """What to run."""

    weights: Path
    out: Path = machine.RESULTS / "evidence"
    films: int = 16  # rooms, each with its own prompt, noise and look
    horizons: tuple[int, ...] = HORIZONS
    presets: tuple[str, ...] = tuple(PRESETS)
    apart: int = APART  # horizons of FLEX taken apart; 0 for none of it
    seed: int = 0
    threads: int = 2
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Films of one variant, of a length that all its horizons are scored on."""

    part: str
    variant: Variant
    horizons: tuple[int, ...]
    films: range


def depends_on_length(preset: Preset) -> bool:
    """Whether a film's beginning depends on how long it is to be."""
    position, noise = preset.position, preset.noise
    static = position.scale == "auto" and position.scale_schedule == "static" and position.mode != "none"
    return static or noise.rho_schedule == "linear_decay"


def cells(args: Args) -> list[Cell]:
    """All that there is to film, in order: batches of films outermost, so that early ones cover every variant."""
    found = []
    for first in range(0, args.films, BATCH):
        films = range(first, min(first + BATCH, args.films))
        for name in args.presets:
            chosen = Variant(name=name, base=name)
            lengths = [(h,) for h in args.horizons] if depends_on_length(chosen.preset) else [tuple(args.horizons)]
            found += [Cell(part="presets", variant=chosen, horizons=h, films=films) for h in lengths if h]
        if args.apart:
            one = {"part": "apart", "horizons": (args.apart,), "films": films}
            found += [Cell(variant=chosen, **one) for chosen in (*PARTS, *CHOICES)]  # type: ignore[arg-type]
    return found


def scored(horizon: int, frames: int) -> slice:
    """The frames that count: all beyond the horizon; at one horizon, all that were not given."""
    return slice(rooms.TRAIN_FRAMES if horizon > 1 else rooms.CHUNK, frames)


def rows_of(cell: Cell, case: Case, marks: Marks, about: dict[str, str], seconds: float) -> list[dict[str, object]]:
    """One row for each film and horizon."""
    rows = []
    for horizon in cell.horizons:
        frames = horizon * rooms.TRAIN_FRAMES
        over = scored(horizon, frames)
        found = summary(marks, over)
        for b, film_number in enumerate(cell.films):
            figures = {name: f"{found[name][b].item():.5f}" for name in FIGURES}
            changes = " ".join(f"{name}={value}" for name, value in cell.variant.overrides)
            rows.append(
                {
                    "part": cell.part, "variant": cell.variant.name, "horizon": horizon, "film": film_number,
                    "prompt": str(case.scenes[b]), "range": f"{over.start}-{over.stop - 1}", **figures,
                    "overrides": changes, **about, "seconds": f"{seconds:.1f}",
                }
            )  # fmt: skip
    return rows


def append(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """All rows at the end of the file in one write: an interruption leaves the file with all of them or none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, str]]:
    """The rows there are; a last line that a full disk cut off is taken away from the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return list(csv.DictReader(io.StringIO(whole.decode())))


def make(args: Args, path: Path) -> None:
    """Film and measure every cell that the file lacks.

    Raises:
        ValueError: The file has rows of other weights or of another commit.
    """
    digest = hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12]
    about = {
        "weights": digest, "commit": machine.commit(), "torch": torch.__version__, "day": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    rows = read(path)
    for name in ("weights", "commit"):
        others = {row[name] for row in rows} - {about[name]}
        if others:
            raise ValueError(
                f"{path} has rows of {name} {', '.join(sorted(others))}, this is {about[name]}: move it away"
            )
    have = {(row["part"], row["variant"], int(row["horizon"]), int(row["film"])) for row in rows}
    engine: Engine | None = None
    todo = cells(args)
    for number, cell in enumerate(todo):
        wanted = {(cell.part, cell.variant.name, h, f) for h in cell.horizons for f in cell.films}
        if wanted <= have:
            continue
        engine = engine or load_engine(args.weights, device=args.device)
        began = time.perf_counter()
        frames = max(cell.horizons) * rooms.TRAIN_FRAMES
        # the same films whatever the number of them: film f is always drawn alone, with seed + f
        case = join([Case.random(scenes=1, frames=frames, seed=args.seed + f) for f in cell.films])
        marks = measure(film(engine, case, cell.variant.preset), case)
        seconds = time.perf_counter() - began
        made = rows_of(cell, case, marks, about, seconds)
        append(path, [row for row in made if (row["part"], row["variant"], row["horizon"], row["film"]) not in have])
        print(
            f"{number + 1}/{len(todo)}  {cell.part}  {cell.variant.name}  films {cell.films}  {seconds:.0f} s",
            flush=True,
        )


def join(cases: Sequence[Case]) -> Case:
    """Several cases with the same lights and consecutive seeds as one."""
    together = {
        name: torch.cat([getattr(case.rooms, name) for case in cases]) for name in rooms.Rooms.__dataclass_fields__
    }
    scenes = [scene for case in cases for scene in case.scenes]
    return Case(scenes=scenes, rooms=rooms.Rooms(**together), lights=cases[0].lights, seed=cases[0].seed)


def interval(differences: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over films of paired differences; NaN do not count."""
    values = np.array([d for d in differences if not math.isnan(d)])
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A figure of a variant over all films, and its difference to that of another one on the same films."""

    variant: str
    horizon: int
    figure: str
    films: int
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float

    @property
    def verdict(self) -> str:
        """better or worse than the other where the interval of the difference excludes zero, else undecided."""
        sign = BETTER.get(self.figure, 0)
        if sign == 0 or math.isnan(self.difference) or self.difference_low <= 0 <= self.difference_high:
            return "undecided"
        return "better" if self.difference * sign > 0 else "worse"


def results(rows: Iterable[dict[str, str]], part: str, against: str) -> list[Result]:
    """Every variant of a part at every horizon, beside the one that it is held against."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["part"] == part:
            films = found.setdefault((row["variant"], int(row["horizon"])), {})
            films[int(row["film"])] = {name: float(row[name]) for name in FIGURES}
    out = []
    for (name, horizon), films in found.items():
        base = found.get((against, horizon), {})
        for figure in FIGURES:
            both = sorted(films.keys() & base.keys())
            mean = interval([films[f][figure] for f in films])
            apart = interval([films[f][figure] - base[f][figure] for f in both])
            out.append(
                Result(
                    variant=name, horizon=horizon, figure=figure, films=len(films), mean=mean[0], low=mean[1],
                    high=mean[2], difference=apart[0], difference_low=apart[1], difference_high=apart[2],
                )
            )  # fmt: skip
    return out


def write_results(path: Path, found: Sequence[Result], commit: str) -> None:
    """One row per variant, horizon and figure, with the commit."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [name for name in Result.__dataclass_fields__]
        writer.writerow([*names, "verdict", "commit"])
        for one in found:
            values = [getattr(one, name) for name in names]
            shown = [f"{v:.4f}" if isinstance(v, float) else v for v in values]
            writer.writerow([*shown, one.verdict, commit])


def draw(path: Path, found: Sequence[Result], horizon: int, title: str) -> None:
    """Differences to the plain window with their intervals, one panel a figure."""
    shown = [one for one in found if one.horizon == horizon]
    names = list(dict.fromkeys(one.variant for one in shown))
    figure = Figure(figsize=(14, 1.4 + 0.28 * len(names)), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(BETTER), sharey=True)
    for axes, name in zip(panels, BETTER, strict=True):
        for at, one in enumerate(o for o in shown if o.figure == name):
            colour = {"better": "#0072B2", "worse": "#D55E00"}.get(one.verdict, "#8a8a8a")
            axes.plot([one.difference_low, one.difference_high], [at, at], color=colour, linewidth=2)
            axes.plot([one.difference], [at], "o", color=colour, markersize=5)
        axes.axvline(0, color="#222222", linewidth=1)
        axes.set_title(f"{name} ({'less' if BETTER[name] < 0 else 'more'} is better)", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    figure.savefig(path)


def sentence(one: Result, against: str) -> str:
    """What a result says, with its interval."""
    return (
        f"{one.figure} {one.mean:.3f}, {one.difference:+.3f} ({one.difference_low:+.3f} to {one.difference_high:+.3f}) "
        f"to {against}: {one.verdict}"
    )


def reading(presets: Sequence[Result], apart: Sequence[Result], about: str) -> str:
    """What the tables say, variant by variant, over the whole range and for every figure: nothing is left out."""
    lines = ["# What the evidence says", "", about, ""]
    for title, found, against in (("Presets", presets, PLAIN), ("FLEX taken apart", apart, PLAIN)):
        for horizon in sorted({one.horizon for one in found}):
            lines += [f"## {title} at {horizon} times the horizon", ""]
            for name in dict.fromkeys(one.variant for one in found if one.horizon == horizon):
                those = [o for o in found if o.variant == name and o.horizon == horizon and o.figure in BETTER]
                if name == against:
                    lines.append(f"- **{name}**: " + ", ".join(f"{o.figure} {o.mean:.3f}" for o in those) + ".")
                else:
                    lines.append(f"- **{name}**: " + "; ".join(sentence(o, against) for o in those) + ".")
            lines.append("")
    return "\n".join(lines)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "films.csv"
    make(args, path)
    rows = read(path)
    presets, apart = results(rows, "presets", PLAIN), results(rows, "apart", PLAIN)
    commit = rows[0]["commit"]
    write_results(args.out / "presets.csv", presets, commit)
    write_results(args.out / "taken_apart.csv", apart, commit)
    longest = max(args.horizons)
    for name, found, horizon in (("presets", presets, longest), ("taken_apart", apart, args.apart)):
        if found:
            title = f"{name.replace('_', ' ')}: difference to the plain window at {horizon} x, {args.films} films"
            draw(args.out / f"{name}.png", found, horizon, title)
    about = (
        f"{args.films} films a variant, each with a room, a prompt and noise of its own, the same for all variants; "
        "means over all frames beyond the horizon (at one horizon: over all that were not given), differences film by "
        f"film with paired bootstrap intervals of 95 %. Commit {commit}, weights {rows[0]['weights']}, torch "
        f"{rows[0]['torch']}, {rows[0]['day']}, device {args.device}."
    )
    (args.out / "reading.md").write_text(reading(presets, apart, about))
    print((args.out / "reading.md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
