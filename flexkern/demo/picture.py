"""The demo's pictures: a contact sheet of videos side by side, and how their figures go over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

matplotlib.use("agg")  # files only: no display needed

INK, FAINT = "#222222", "#8a8a8a"
TRAIL = 6  # frames
STYLES = (  # colours of Okabe and Ito, which colour-blind eyes tell apart, and dashes for those who print in grey
    ("#D55E00", "solid"), ("#0072B2", "solid"), ("#009E73", "dashed"), ("#CC79A7", "dashdot"), ("#E69F00", "dotted"),
    ("#56B4E9", "dashed"),
)  # fmt: skip
Panel = tuple[str, str, str, float, float]
PANELS: tuple[
    Panel, ...
] = (  # figure, title, what its axis says, the value that the prompt asks for, upper end of the axis at least
    ("identity", "Identity", "right colour and outline", 1.0, 1.05),
    ("speed", "Motion", "speed / the prompt's", 1.0, 1.3),
    ("ground", "Ground colour", "RGB distance to the prompt's", 0.0, 0.1),
)
FACE = "DejaVu Sans"
FONT = {"font.family": FACE, "font.size": 11, "axes.edgecolor": FAINT, "text.color": INK}
FONT |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK}


def evenly(frames: int, count: int) -> list[int]:
    """``count`` frame numbers from the first to the last, evenly spaced; all of them where there are fewer."""
    count = min(count, frames)
    return [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]


def _strip(pixels: NDArray[np.uint8], shown: Sequence[int], size: int) -> list[NDArray[np.uint8]]:
    return [
        np.asarray(Image.fromarray(pixels[frame]).resize((size, size), Image.Resampling.LANCZOS)) for frame in shown
    ]


def contact_sheet(
    path: Path, videos: dict[str, NDArray[np.uint8]], *, title: str, fps: float, horizon: int, count: int = 21,
    tracks: dict[str, NDArray[Any]] | None = None,
) -> None:  # fmt: skip
    """Write a PNG: one row per video, by name, and ``count`` of its frames from left to right; the horizon is marked.

    Args:
        path: The file to write.
        videos: uint8 [frames, height, width, 3] each, equally long.
        title: Stands above the rows.
        fps: Frames per second.
        horizon: Frames of a training clip.
        count: Pictures per row.
        tracks: [frames, shapes, 2 (x, y)] each, in widths of a picture: dots show where the shapes were in the
            ``TRAIL`` frames before, because evenly spaced pictures of something that bounces to and fro can look as if
            it stood still.

    Raises:
        ValueError: There is no video, or their lengths differ.
    """
    lengths = {len(pixels) for pixels in videos.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"expected videos of one length, got lengths {sorted(lengths)}")
    frames = lengths.pop()
    shown = evenly(frames, count)
    size, gap, wide = 96, 6, 36
    inside = sum(frame < horizon for frame in shown)
    left = [i * (size + gap) + (wide - gap) * (i >= inside) for i in range(len(shown))]
    height, width = len(videos) * (size + gap) - gap, left[-1] + size
    sheet = np.full((height, width, 3), 255, np.uint8)
    for row, pixels in enumerate(videos.values()):
        for x, picture in zip(left, _strip(pixels, shown, size), strict=True):
            sheet[row * (size + gap) : row * (size + gap) + size, x : x + size] = picture

    margin = {"left": 190, "right": 12, "top": 104, "bottom": 84 if tracks else 46}  # pixels
    dpi = 100
    total = width + margin["left"] + margin["right"], height + margin["top"] + margin["bottom"]
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(total[0] / dpi, total[1] / dpi), dpi=dpi, facecolor="white")
        box = (margin["left"] / total[0], margin["bottom"] / total[1], width / total[0], height / total[1])
        axes = figure.add_axes(box)
        axes.imshow(sheet, interpolation="none", extent=(0, width, height, 0), aspect="auto")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([row * (size + gap) + size / 2 for row in range(len(videos))], videos, fontsize=19)
        every = 2 if len(shown) > 12 else 1
        times = [f"{frame / fps:.1f} s" for frame in shown[::every]]
        axes.set_xticks([x + size / 2 for x in left[::every]], times, fontsize=16)
        if 0 < inside < len(shown):
            middle = left[inside] - wide / 2
            axes.axvline(middle, color=INK, linewidth=2, linestyle=(0, (4, 3)), clip_on=False)
            text = f"beyond the training horizon of {horizon} frames, {horizon / fps:.1f} s  →"
            axes.annotate(text, (middle, 0), (4, 7), textcoords="offset points", fontsize=16, annotation_clip=False)
        figure.text(margin["left"] / total[0], 1 - 12 / total[1], title, fontsize=21, weight="bold", va="top")
        if tracks:
            for row, name in enumerate(videos):
                _draw_trails(axes, tracks[name], shown, left, row * (size + gap), size)
            note = f"Dots: where the shapes were in the {TRAIL} frames before."
            figure.text(margin["left"] / total[0], 12 / total[1], note, fontsize=16, color="#555555")
        figure.savefig(path, dpi=dpi)


def _draw_trails(
    axes: Any, track: NDArray[Any], shown: Sequence[int], left: Sequence[int], top: int, size: int
) -> None:
    """Dots on a row of pictures for the frames before each."""
    for frame, x in zip(shown, left, strict=True):
        dots = track[max(0, frame - TRAIL) : frame].reshape(-1, 2) * size
        axes.scatter(x + dots[:, 0], top + dots[:, 1], s=9, color="white", edgecolors=INK, linewidths=0.5)


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
        note = f"Mean of {videos} prompts, median (motion) or mean within a sliding window of {window} frames"
        note += " (fewer at the ends); band: ± 1 standard error. Grey line: what the prompt asks for."
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
