"""A contact sheet of any videos: a row for each, a column for each moment, on one time axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flexkern.metrics.plot import FAINT, FONT, INK, clock, plain
from flexkern.metrics.video import inspect_video, pictures_at
from flexkern.metrics.vision import Picture

COLUMNS = 8
TILE = 240  # pixels
GAP, DPI = 8, 100
LETTER = 10.5  # pixels of a letter of the row names, on average


def moments(seconds: float, columns: int) -> list[float]:
    """Return ``columns`` moments, evenly spaced, from the first picture to the end of ``seconds`` or nearly so.

    The step is a round number of seconds where one reaches 95 % of the way, else it is exact.
    """
    if columns < 2:
        return [0.0]
    exact = seconds / (columns - 1)
    steps = [0.1, 0.2, 0.25, 0.5, *range(1, 10), *range(10, 60, 5), *(60 * minute for minute in range(1, 60))]
    fitting = [step for step in steps if 0.95 * exact <= step <= 1.005 * exact]
    step = fitting[-1] if fitting else exact
    return [min(number * step, seconds) for number in range(columns)]


def contact_sheet(
    out: str | Path,
    videos: Mapping[str, str | Path],
    *,
    columns: int = COLUMNS,
    at: Sequence[float] | None = None,
    tile: int = TILE,
    title: str = "",
    horizon: float | None = None,
) -> None:
    """Write a PNG that shows videos under each other at the same moments.

    Args:
        out: of the sheet.
        videos: files, by the name of their row.
        columns: moments, spread evenly from the first picture to the end of the longest video.
        at: the moments themselves in seconds, instead.
        tile: width of a picture, in pixels; heights follow each video's own shape.
        title: above it all.
        horizon: seconds that the model was trained on; a line is drawn before the first moment past it.

    Raises:
        FileNotFoundError: a video is not there.
        ValueError: there is no video, no column, a tile below 32 pixels, or a file that is no video.
    """
    if not videos:
        raise ValueError("expected at least one video, got none")
    if columns < 1 or tile < 32:
        raise ValueError(f"columns must be at least 1 and tile at least 32 pixels, got {columns} and {tile}")
    if at is not None and (not at or min(at) < 0):
        raise ValueError(f"at must list seconds of at least 0, got {list(at)}")
    files = [inspect_video(path) for path in videos.values()]
    last = max(file.seconds - 1 / file.fps for file in files)
    shown = sorted(at) if at is not None else moments(max(last, 0.0), columns)
    rows = [
        [None if picture is None else _fit(picture, tile) for picture in pictures_at(file.path, shown)]
        for file in files
    ]
    heights = [max(16, round(tile * file.height / file.width)) for file in files]
    _draw(Path(out), list(videos), rows, heights, shown, tile, title, horizon)


def _fit(picture: Picture, width: int) -> Picture:
    height = max(16, round(width * picture.shape[0] / picture.shape[1]))
    larger = width > picture.shape[1]
    kind = (
        cv2.INTER_NEAREST if larger and width >= 3 * picture.shape[1] else cv2.INTER_CUBIC if larger else cv2.INTER_AREA
    )
    return np.asarray(cv2.resize(picture, (width, height), interpolation=kind), dtype=np.uint8)


def _draw(
    out: Path,
    names: list[str],
    rows: list[list[Picture | None]],
    heights: list[int],
    shown: Sequence[float],
    tile: int,
    title: str,
    horizon: float | None,
) -> None:
    tops = [sum(heights[:row]) + row * GAP for row in range(len(rows))]
    width, height = len(shown) * (tile + GAP) - GAP, tops[-1] + heights[-1]
    sheet = _compose(rows, heights, tops, tile, (height, width))
    names = [_wrapped(name) for name in names]
    left = 24 + round(LETTER * max(len(line) for name in names for line in name.split("\n")))
    top, margin = (84 if title else 46), 14
    inside = sum(moment < horizon for moment in shown) if horizon is not None else 0
    marked = 0 < inside < len(shown)
    bottom = 44 if marked else margin
    total = width + left + margin, height + top + bottom
    with matplotlib.rc_context(FONT | {"axes.grid": False}):
        figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI, facecolor="white")
        axes = figure.add_axes((left / total[0], bottom / total[1], width / total[0], height / total[1]))
        axes.imshow(sheet, interpolation="none", extent=(0, width, height, 0), aspect="auto")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_yticks([])
        middle = [y + high / 2 for y, high in zip(tops, heights, strict=True)]
        # not labels of ticks, whose text is set anew whenever they are drawn
        plain(*(axes.text(-8, y, "", fontsize=13, ha="right", va="center") for y in middle), says=names)
        axes.set_xticks([number * (tile + GAP) + tile / 2 for number in range(len(shown))])
        minutes_from = 60 if max(shown) >= 180 else 180  # beside 3:01 stands 1:02, beside 61.7 s nothing of minutes
        axes.set_xticklabels([clock(moment, minutes_from=minutes_from) for moment in shown], fontsize=13)
        for row, pictures in enumerate(rows):
            for column, picture in enumerate(pictures):
                if picture is None:
                    place = column * (tile + GAP) + tile / 2, tops[row] + heights[row] / 2
                    axes.text(*place, "over", color=FAINT, fontsize=13, ha="center", va="center")
        if marked and horizon is not None:
            note = f"Dashed line: end of the training horizon, {clock(horizon)}."
            figure.text(left / total[0], 12 / total[1], note, fontsize=11, color="#555555")
            axes.axvline(
                inside * (tile + GAP) - GAP / 2, color=INK, linewidth=2.5, linestyle=(0, (3, 2)), clip_on=False
            )
        if title:
            place = left / total[0], 1 - 10 / total[1]
            plain(figure.text(*place, "", fontsize=16, weight="bold", va="top"), says=[title])
        figure.savefig(out, dpi=DPI)


def _compose(
    rows: list[list[Picture | None]], heights: list[int], tops: list[int], tile: int, size: tuple[int, int]
) -> NDArray[np.uint8]:
    sheet = np.full((*size, 3), 255, np.uint8)
    for pictures, high, top in zip(rows, heights, tops, strict=True):
        for column, picture in enumerate(pictures):
            x = column * (tile + GAP)
            sheet[top : top + high, x : x + tile] = 242 if picture is None else picture[:high]
    return sheet


def _wrapped(name: str, width: int = 22) -> str:
    """A name broken into lines, at spaces and underscores where there are any."""
    lines = [""]
    for word in name.replace("_", "_ ").split(" "):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word if lines[-1].endswith("_") or not lines[-1] else f" {word}"
    return "\n".join(line[i : i + width] for line in lines for i in range(0, max(1, len(line)), width))
