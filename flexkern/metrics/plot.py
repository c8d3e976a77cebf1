"""Curves of several videos over time, one panel per figure, all on the same axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexkern.metrics import curves
from flexkern.metrics.measure import CURVES, LEARNED, Report, validate_reports

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError('matplotlib is not installed: pip install "flexkern[metrics]"') from error

INK, FAINT = "#222222", "#8a8a8a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = ("solid", "dashed", "dashdot", "dotted")
FONT = {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "text.color": INK}
FONT |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK}
FONT |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"}
OTHERS = {  # curves that belong to figures of a whole video: title, unit, what is better
    "sink_distance": ("Distance to the sink", "of its median", "dips are collapses"),
    "repeats": ("Repeats", "correlation", "1: the picture one cycle before"),
    "sink_alignment": ("Sink alignment, predicted", "|mean exp(iθ′t)|", "maxima invite collapse"),
}
SHARP = ("sink_distance", "sink_alignment")  # curves drawn as they are: a mean would fill their dips
DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "neither": "level is best"}


def plot_curves(
    path: str | Path, reports: Mapping[str, Report], *, horizon: float | None = None, title: str = ""
) -> None:
    """Write a PNG: a panel per figure and a line per video, smoothed over a second (of a long one, over 1/200).

    Args:
        path: of the picture.
        reports: of the videos, by the name that the legend shows.
        horizon: seconds that the model was trained on; marked in every panel.
        title: above it all.

    Raises:
        ValueError: there is no report, or reports are not by name.
    """
    validate_reports(reports)
    shown = _shown(list(reports.values()))
    columns = 3 if len(shown) > 4 else 2
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(5.2 * columns, 2.75 * rows + 0.9), dpi=110, facecolor="white", layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, shown, strict=False):
            _panel(axes, name, reports, horizon)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("time (s)" if _longest(reports) < 180 else "time (min:s)")
        handles, numbers = panels[0].get_legend_handles_labels()
        names = [list(reports)[int(number)] for number in numbers]  # matplotlib hides a label that begins with _
        place = dict(loc="outside upper left", ncols=min(len(names), 6), frameon=False, fontsize=11)
        plain(*figure.legend(handles, [""] * len(names), **place).get_texts(), says=names)
        if title:
            plain(figure.suptitle(" ", x=0.99, ha="right", fontsize=13, weight="bold"), says=[title])
        note = f"Lines: mean of a sliding window of {clock(_window(reports))}; faint: single pictures."
        figure.supxlabel(note + (" Dashed: training horizon." if horizon else ""), fontsize=9, color="#555555")
        figure.savefig(Path(path))


def plain(*texts: Text, says: Sequence[str]) -> None:
    """Let texts of a figure say words of the user's, in which a dollar or an underscore is itself."""
    for text, words in zip(texts, says, strict=True):
        text.set_parse_math(False)
        text.set_text(words)


def clock(seconds: float, *, minutes_from: float = 180) -> str:
    """Return a time as one reads it: 7 s, 7.5 s, 3:05, 1:00:00; in seconds alone below ``minutes_from``."""
    if seconds < minutes_from:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _shown(reports: Sequence[Report]) -> list[str]:
    have = {name for report in reports for name in report.curves}
    return [name for name in (*CURVES, *LEARNED, *OTHERS) if name in have]


def _longest(reports: Mapping[str, Report]) -> float:
    return max(report.pictures / report.fps for report in reports.values())


def _window(reports: Mapping[str, Report]) -> float:
    """Seconds that a line is the mean of."""
    return max(1.0, round(_longest(reports) / 200))


def _panel(axes: Any, name: str, reports: Mapping[str, Report], horizon: float | None) -> None:
    drawn = []
    for number, report in enumerate(reports.values()):
        if name not in report.curves:
            continue
        raw = report.curves[name]
        line = raw if name in SHARP else curves.smooth(raw, max(1, round(report.fps * _window(reports))))
        colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        time = np.arange(len(raw)) / report.fps
        if name not in SHARP:
            axes.plot(time, raw, color=colour, alpha=0.22, linewidth=0.7)
        axes.plot(time, line, color=colour, linestyle=dashes, linewidth=1.8, label=f"{number}")
        drawn.append(raw)
    if horizon is not None:
        axes.axvline(horizon, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=0)
    metric = CURVES.get(name) or LEARNED.get(name)
    if metric:
        heading, unit, direction = metric.title, metric.unit, DIRECTIONS[metric.better]
    else:
        heading, unit, direction = OTHERS[name]
    axes.set_title(heading, loc="left", fontsize=11, weight="bold")
    axes.set_title(direction, loc="right", fontsize=8.5, color="#666666")
    axes.set(xlim=(0, _longest(reports)), ylim=curves.bars(drawn), ylabel=unit)
    if name == "repeats":
        axes.set_ylim(-0.5, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 3, 5, 6, 10]))
    if _longest(reports) >= 180:
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda at, _: clock(max(at, 180)) if at >= 180 else f"0:{at:02.0f}")
        )
