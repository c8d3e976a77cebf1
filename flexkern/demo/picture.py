"""The demo's pictures: a sheet of films, the same moving, and how their figures go over time."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flexkern.demo import FPS, rooms

matplotlib.use("agg")  # files only: no display needed

INK, FAINT = "#222222", "#8a8a8a"
STYLES = (  # colours of Okabe and Ito, which colour-blind eyes tell apart, and dashes for those who print in grey
    ("#D55E00", "solid"), ("#0072B2", "solid"), ("#009E73", "dashed"), ("#CC79A7", "dashdot"), ("#E69F00", "dotted"),
    ("#56B4E9", "dashed"),
)  # fmt: skip
Panel = tuple[str, str, str, float, float]
PANELS: tuple[
    Panel, ...
] = (  # figure, title, what its axis says, the value of the truth, upper end of the axis at least
    ("ground", "Ground", "RGB distance to the first second's", 0.0, 0.3),
    ("palette", "Shapes' colours", "overlap with the first second's", 1.0, 1.05),
    ("course", "Course", "where straight flight puts it", 1.0, 1.05),
    ("speed", "Motion", "speed / the prompt's", 1.0, 1.3),
)
TILE, GAP, LABEL = 96, 6, 128  # pixels of the sheet
MOST = 6  # lights after the first, on a sheet
SPED, PAGES = 2, 126  # every so manieth frame is in the animation, which has so many at most
FACE = "DejaVu Sans"
FONT = {"font.family": FACE, "font.size": 11, "axes.edgecolor": FAINT, "text.color": INK}
FONT |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK}


def shown(lights: torch.Tensor) -> list[int]:
    """Frames for a sheet: the first, the end of the first light, the middle of the first dark, and of every light; of
    a long film every so manieth light, the last among them."""
    edges = [*rooms.switches(lights), (len(lights), False)]
    spans = [(start, stop, on) for (start, on), (stop, _) in zip(edges, edges[1:], strict=False)]
    middle = lambda start, stop: (start + stop) // 2
    dark = [middle(start, stop) for start, stop, on in spans if not on][:1]
    lit = [middle(start, stop) for start, stop, on in spans[1:] if on]
    step = max(1, math.ceil(len(lit) / MOST))
    return sorted([0, spans[0][1] - 1, *dark, *lit[::-1][::step]])


def tiles(pictures: torch.Tensor, size: int) -> list[Image.Image]:
    """Pictures [T, 3, h, w] in [-1, 1] at another size."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in pixels]


def font(points: int) -> ImageFont.FreeTypeFont:
    """The font of the other pictures."""
    return ImageFont.truetype(findfont(FACE), points)


def sheet(path: Path, films: Mapping[str, torch.Tensor], lights: torch.Tensor) -> None:
    """Write a PNG: a row for each film [T, 3, h, w], the columns that ``shown`` picks, seconds and lights above."""
    at = shown(lights)
    top = 40
    size = (LABEL + len(at) * (TILE + GAP) - GAP, top + len(films) * (TILE + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    large, small = (font(points) for points in (17, 14))
    for column, frame in enumerate(at):
        x = LABEL + column * (TILE + GAP) + TILE / 2
        draw.text((x, 12), f"{frame / FPS:.1f} s", INK, small, anchor="mm")
        draw.text((x, 29), "" if lights[frame] else "lights off", INK, small, anchor="mm")
    for row, (name, made) in enumerate(films.items()):
        y = top + row * (TILE + GAP)
        draw.text((LABEL - 10, y + TILE / 2), name, INK, large, anchor="rm")
        for column, tile in enumerate(tiles(made[at], TILE)):
            canvas.paste(tile, (LABEL + column * (TILE + GAP), y))
    canvas.save(path)


def animation(path: Path, films: Mapping[str, torch.Tensor], *, size: int = 152) -> None:
    """Write a WebP: the beginning of the films side by side, moving, every ``SPED``-th frame."""
    large = font(15)
    wide = len(films) * (size + GAP) - GAP
    rows = {name: tiles(made[: SPED * PAGES : SPED], size) for name, made in films.items()}
    pages = []
    for number in range(len(next(iter(rows.values())))):
        page = Image.new("RGB", (wide, size + 24), "white")
        draw = ImageDraw.Draw(page)
        for column, (name, made) in enumerate(rows.items()):
            draw.text((column * (size + GAP) + size / 2, 11), name, INK, large, anchor="mm")
            page.paste(made[number], (column * (size + GAP), 24))
        pages.append(page)
    pages[0].save(
        path, save_all=True, append_images=pages[1:], duration=round(1000 * SPED / FPS), loop=0, quality=60, method=4
    )


def dark_seconds(lights: torch.Tensor) -> list[tuple[float, float]]:
    """When the lights are off, from and to, in seconds."""
    edges = [*rooms.switches(lights), (len(lights), True)]
    return [(start / FPS, stop / FPS) for (start, on), (stop, _) in zip(edges, edges[1:], strict=False) if not on]


def drift_plot(
    path: Path, lines: dict[str, dict[str, NDArray[Any]]], *, fps: float, horizon: int, window: int, title: str,
    panels: Sequence[Panel] = PANELS, shaded: Sequence[tuple[float, float]] = (),
) -> None:  # fmt: skip
    """Write a PNG with one panel for each figure over time, and in each one line for each name.

    Args:
        path: The file to write.
        lines: Name -> figure -> [videos, frames], already smoothed over ``window`` frames; a line is the mean over the
            videos, its band one standard error to either side.
        fps: Frames per second.
        horizon: Frames of a training clip.
        window: Frames that the lines were smoothed over, for the note.
        title: Stands above the panels.
        panels: Which figures, see ``PANELS``.
        shaded: Seconds from and to which the background is grey.

    Raises:
        ValueError: There is no line.
    """
    if not lines:
        raise ValueError("expected at least one line, got none")
    with matplotlib.rc_context(FONT | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.6), dpi=120, facecolor="white", layout="constrained")
        drawn = figure.subplots(1, len(panels))
        for axes, (name, heading, label, asked, top) in zip(drawn, panels, strict=True):
            for start, stop in shaded:
                axes.axvspan(start, stop, color=FAINT, alpha=0.14, linewidth=0)
            peak = top
            for (source, values), (colour, dashes) in zip(lines.items(), _styles(len(lines)), strict=True):
                mean, error = mean_and_error(values[name])
                time = np.arange(len(mean)) / fps
                axes.fill_between(time, mean - error, mean + error, color=colour, alpha=0.16, linewidth=0)
                axes.plot(time, mean, color=colour, linestyle=dashes, linewidth=2, label=source)
                peak = max(peak, 1.08 * float(np.nanmax(mean + error, initial=0)))
            axes.axhline(asked, color=FAINT, linewidth=1, zorder=0)
            axes.axvline(horizon / fps, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
            axes.set(xlim=(0, time[-1]), ylim=(-0.03 * peak, peak), xlabel="time (s)", ylabel=label)
            axes.set_title(heading, loc="left", fontsize=13, weight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 3, 5, 10]))
        drawn[0].annotate(
            "training\nhorizon", (horizon / fps, 0), (5, 6), textcoords="offset points", fontsize=10, color=INK
        )
        handles, names = drawn[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
        videos = len(next(iter(lines.values()))[panels[0][0]])
        note = f"Mean of {videos} rooms, median (motion) or mean within a sliding window of {window} frames"
        note += " (fewer at the ends); band: ± 1 standard error. Grey line: the truth."
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
        figure.supxlabel(note, fontsize=9.5, color="#555555")
        figure.savefig(path)


def mean_and_error(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean over videos and its standard error, [videos, frames] -> [frames] each; NaN where a video has no figure."""
    known = ~np.isnan(values)
    count = known.sum(0)
    mean = np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)
    squares = (np.where(known, values - mean, 0) ** 2).sum(0)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return mean, np.where(count > 1, error, 0)


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]
