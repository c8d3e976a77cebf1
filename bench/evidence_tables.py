"""Tables, pictures and text of the evidence: means and paired differences with bootstrap intervals."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("agg")

RESAMPLES = 10_000
MEMORY, MOTION = ("ground", "palette"), ("course", "speed")
FIGURES = (*MEMORY, "area", *MOTION)
BETTER = {"ground": -1, "palette": 1, "course": 1, "speed": 1}  # which way; of an area neither
DIGITS = {"ground": 4}  # after the point, where not three

Row = dict[str, str]  # of films.csv


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over films of paired differences; NaN do not count."""
    values = np.array([d for d in differences if not math.isnan(d)])
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A figure of a variant over all films, and its difference to that of another one on the same films."""

    variant: str
    against: str
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


def results(rows: Iterable[Row], names: Sequence[str], against: str, horizons: Sequence[int] = ()) -> list[Result]:
    """The named variants at these horizons (at all, if none is named), beside the one they are held against."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        films = found.setdefault((row["variant"], int(row["horizon"])), {})
        films[int(row["film"])] = {name: float(row[name]) for name in FIGURES}
    out = []
    for horizon in sorted({h for _, h in found if h in horizons or not horizons}):
        base = found.get((against, horizon), {})
        for name in names:
            films = found.get((name, horizon), {})
            for figure in FIGURES if films else ():
                both = sorted(films.keys() & base.keys())
                mean = interval([films[f][figure] for f in films])
                apart = interval([films[f][figure] - base[f][figure] for f in both])
                out.append(
                    Result(
                        variant=name, against=against, horizon=horizon, figure=figure, films=len(films), mean=mean[0],
                        low=mean[1], high=mean[2], difference=apart[0], difference_low=apart[1],
                        difference_high=apart[2],
                    )
                )  # fmt: skip
    return out


def write_results(path: Path, found: Sequence[Result], commit: str) -> None:
    """One row per variant, horizon and figure, with the commit."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [name for name in Result.__dataclass_fields__]
        writer.writerow([*names, "verdict", "commit"])
        for one in found:
            values = [getattr(one, name) for name in names]
            shown = [f"{v:.4f}" if isinstance(v, float) else v for v in values]
            writer.writerow([*shown, one.verdict, commit])


def load_results(path: Path) -> list[Result]:
    """What ``write_results`` wrote."""
    text, whole = ("variant", "against", "figure"), ("horizon", "films")
    read = lambda name, value: value if name in text else int(value) if name in whole else float(value)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Result(**{name: read(name, row[name]) for name in Result.__dataclass_fields__}) for row in rows]


def draw(path: Path, found: Sequence[Result], title: str) -> None:
    """Differences with their intervals, one panel a figure."""
    names = list(dict.fromkeys(one.variant for one in found))
    figure = Figure(figsize=(14, 1.4 + 0.28 * len(names)), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(BETTER), sharey=True)
    for axes, name in zip(panels, BETTER, strict=True):
        for at, one in enumerate(o for o in found if o.figure == name):
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


def table(found: Sequence[Result]) -> list[str]:
    """A Markdown table of results against one variant at one horizon: every figure with its difference, in bold where
    the interval excludes zero."""
    against = found[0].against
    lines = [f"| | {' | '.join(BETTER)} |", "|---|" + "---|" * len(BETTER)]
    for name in dict.fromkeys(one.variant for one in found):
        those = [one for one in found if one.variant == name and one.figure in BETTER]
        cells = []
        for one in those:
            digits = DIGITS.get(one.figure, 3)
            low, high = f"{one.difference_low:+.{digits}f}", f"{one.difference_high:+.{digits}f}"
            said = f"{one.difference:+.{digits}f} ({low} to {high})"
            mark = {"better": f", **better** {said}", "worse": f", **worse** {said}"}.get(one.verdict, f", {said}")
            cells.append(f"{one.mean:.{digits}f}" + ("" if name == against else mark))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def films(found: Sequence[Result]) -> str:
    """How many films the results are of."""
    counts = sorted({one.films for one in found})
    return " or ".join(map(str, counts))


def reading(sections: Sequence[tuple[str, Sequence[Result]]], about: str) -> str:
    """What the tables say, variant by variant, over the whole range and for every figure: nothing is left out."""
    lines = ["# What the evidence says", "", about, ""]
    for title, found in sections:
        for horizon in sorted({one.horizon for one in found}):
            those = [one for one in found if one.horizon == horizon]
            lines += [
                f"## {title}, {horizon} times the horizon, {films(those)} films, against {those[0].against}",
                "",
                *table(those),
                "",
            ]
    return "\n".join(lines)
