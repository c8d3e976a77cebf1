"""Reports of several videos as CSV, JSON and lines of a table."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexkern.checks import json_text
from flexkern.metrics.measure import CURVES, LEARNED, WHOLE, Better, Metric, Report, validate_reports

ARROWS: dict[Better, str] = {"higher": "↑", "lower": "↓", "neither": ""}
EXTRA = {"sink_distance": "of its median", "repeats": "correlation", "sink_alignment": "0..1"}
LAG_FROM = 0.3  # strength of a loop from which its length means something


def rows(reports: Sequence[Report]) -> Iterator[tuple[str, str, Better]]:
    """Yield name, unit and direction of each number that the reports have, in order."""
    names = reports[0].summary
    for metric in (*CURVES.values(), *LEARNED.values()):
        if metric.name in names:
            yield metric.name, metric.unit, metric.better
            yield f"{metric.name}_drift", metric.unit, "lower"
            yield f"{metric.name}_change", metric.unit, "neither"
    for metric in WHOLE.values():
        yield metric.name, metric.unit, metric.better


def write_summary(path: Path, reports: Mapping[str, Report]) -> None:
    """Write one line per video and number: video, metric, unit, better, value; an unknown value is left empty."""
    validate_reports(reports)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video", "metric", "unit", "better", "value"))
        for name, report in reports.items():
            for metric, unit, better in rows([report]):
                writer.writerow((name, metric, unit, better, _cell(report.summary[metric])))


def write_curves(path: Path, reports: Mapping[str, Report]) -> None:
    """Write one line per picture of each video: video, picture, seconds, and a column per curve."""
    validate_reports(reports)
    columns = list(dict.fromkeys(name for report in reports.values() for name in report.curves))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("video", "picture", "seconds", *columns))
        for name, report in reports.items():
            curves = [report.curves.get(column) for column in columns]
            for number in range(report.pictures):
                values = ("" if curve is None else _cell(float(curve[number])) for curve in curves)
                writer.writerow((name, number, f"{number / report.fps:.3f}", *values))


def write_json(path: Path, reports: Mapping[str, Report]) -> None:
    """Write summaries, events, rates and lengths by video, and what each figure means; unknown values are null.

    Curves are in the CSV.
    """
    validate_reports(reports)
    known = {metric.name: metric for metric in (*CURVES.values(), *LEARNED.values(), *WHOLE.values())}
    first = next(iter(reports.values()))
    used = {name: _described(metric) for name, metric in known.items() if name in first.summary}
    videos = {
        name: {
            "fps": report.fps,
            "pictures": report.pictures,
            "summary": {key: value if math.isfinite(value) else None for key, value in report.summary.items()},
            "events": report.events,
        }
        for name, report in reports.items()
    }
    path.write_text(json_text({"metrics": used, "videos": videos}, indent=1) + "\n", encoding="utf-8")


def table(reports: Mapping[str, Report]) -> list[str]:
    """Return the summaries as lines of text: a row per figure, with its unit and direction, a column per video."""
    validate_reports(reports)
    lines = [["", "", "", *reports]]
    for metric, unit, better in rows(list(reports.values())):
        values = [_short(report.summary[metric]) for report in reports.values()]
        lines.append([metric, ARROWS[better], unit, *values])
    dips = [", ".join(f"{dip:.1f}" for dip in report.events["sink_dips"]) or "-" for report in reports.values()]
    lags = [f"{lag:.2f}" if lag else "-" for lag in map(loop_seconds, reports.values())]
    lines += [["sink dips at", "", "s", *dips], ["loop lasts", "", "s", *lags]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = lambda line: [
        cell.ljust(width) if column < 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return ["  ".join(aligned(line)).rstrip() for line in lines]


def loop_seconds(report: Report) -> float | None:
    """Return the length of the cycle in which a video repeats itself, None where it hardly does."""
    return report.events["loop"][0] if report.summary["loop"] >= LAG_FROM and report.events["loop"] else None


def _described(metric: Metric) -> dict[str, Any]:
    return {"title": metric.title, "unit": metric.unit, "better": metric.better, "definition": metric.definition}


def _cell(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def _short(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
