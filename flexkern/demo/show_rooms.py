"""Who forgets and who remembers: one room at twelve times the training length, filmed with several methods.

    python -m flexkern.demo.show_rooms --out rooms_out

The lights go out for longer than the window, again and again. Writes sheet.png (one row a method, the truth first),
films.webp (the same, moving), curves.png (memory and motion over time, over a few more rooms) and figures.csv.
"""

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from flexkern.demo import FPS, rooms
from flexkern.demo.evaluate import Spread
from flexkern.demo.film_rooms import WEIGHTS, Case, film, load_engine
from flexkern.demo.measure import curves
from flexkern.demo.measure_rooms import FIGURES, Marks, measure, summary
from flexkern.demo.picture import FACE, INK, drift_plot
from flexkern.policies import Preset, get_preset

TRUTH = "truth"
METHODS: dict[str, tuple[str, dict[str, object]]] = {  # name -> preset, and what of it differs
    "plain window": ("self-forcing", {}),
    "sink": ("self-forcing", {"retention.sink": 3}),
    "pi": ("pi", {}),
    "flex": ("flex", {}),
}
PANELS = (
    ("ground", "Ground", "RGB distance to the first second's", 0.0, 0.3),
    ("palette", "Shapes' colours", "overlap with the first second's", 1.0, 1.05),
    ("course", "Course", "where straight flight puts it", 1.0, 1.05),
    ("speed", "Motion", "speed / the prompt's", 1.0, 1.3),
)
TILE, GAP, LABEL = 96, 6, 128  # pixels of the sheet
SPED = 2  # every so manieth frame is in the animation


@dataclass(kw_only=True)
class Args:
    """What to film."""

    weights: Path = WEIGHTS
    out: Path = Path("rooms_out")
    seed: int = 0
    frames: int = 12 * rooms.TRAIN_FRAMES
    videos: int = 6  # rooms that the curves average, the shown one among them
    device: str = "cpu"


def methods() -> dict[str, Preset]:
    """The methods that are shown."""
    return {name: get_preset(base, overrides) for name, (base, overrides) in METHODS.items()}


def shown(lights: torch.Tensor) -> list[int]:
    """Frames for a sheet: the first, the end of the first light, the middle of the first dark, and of every light."""
    edges = [*rooms.switches(lights), (len(lights), False)]
    spans = [(start, stop, on) for (start, on), (stop, _) in zip(edges, edges[1:], strict=False)]
    middle = lambda start, stop: (start + stop) // 2
    dark = [middle(start, stop) for start, stop, on in spans if not on][:1]
    lit = [middle(start, stop) for start, stop, on in spans[1:] if on]
    return sorted([0, spans[0][1] - 1, *dark, *lit])


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
    """Write a WebP: the films side by side, moving, every ``SPED``-th frame."""
    large = font(15)
    wide = len(films) * (size + GAP) - GAP
    rows = {name: tiles(made[::SPED], size) for name, made in films.items()}
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


def lines(marks: Mapping[str, Marks], window: int) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What ``drift_plot`` draws."""
    found = {name: curves(one, window) for name, one in marks.items()}
    return {name: {figure: line.numpy() for figure, line in one.items()} for name, one in found.items()}


def dark_seconds(lights: torch.Tensor) -> list[tuple[float, float]]:
    """When the lights are off, from and to, in seconds."""
    edges = [*rooms.switches(lights), (len(lights), True)]
    return [(start / FPS, stop / FPS) for (start, on), (stop, _) in zip(edges, edges[1:], strict=False) if not on]


def report(path: Path, marks: Mapping[str, Marks], frames: int) -> str:
    """Write the figures over all frames beyond the horizon, and say them."""
    said = [f"frames {rooms.TRAIN_FRAMES} to {frames - 1}, mean ± 95 % interval of the mean (10th to 90th percentile)"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "first_frame", "last_frame", "figure", "mean", "interval95", "p10", "p90", "films"))
        for name, one in marks.items():
            found = {k: Spread.of(v) for k, v in summary(one, slice(rooms.TRAIN_FRAMES, frames)).items()}
            said.append(f"{name:14}" + "  ".join(f"{k} {found[k].mean:.3f} ± {found[k].interval:.3f}" for k in FIGURES))
            for figure, s in found.items():
                numbers = (f"{x:.4f}" for x in (s.mean, s.interval, s.low, s.high))
                writer.writerow((name, rooms.TRAIN_FRAMES, frames - 1, figure, *numbers, s.count))
    return "\n".join(said)


def main(args: Args, chosen: Sequence[str] = tuple(METHODS)) -> None:
    """Film, measure, draw."""
    began = time.perf_counter()
    case = Case.random(scenes=args.videos, frames=args.frames, seed=args.seed)
    engine = load_engine(args.weights, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    made = {TRUTH: case.truth()}
    presets = methods()
    for name in tqdm(chosen, unit="method"):
        made[name] = film(engine, case, presets[name])
    marks = {name: measure(films, case) for name, films in made.items()}
    first = {name: films[0] for name, films in made.items()}
    sheet(args.out / "sheet.png", first, case.lights)
    animation(args.out / "films.webp", first)
    times = args.frames / rooms.TRAIN_FRAMES
    drift_plot(
        args.out / "curves.png", lines({name: marks[name] for name in chosen}, rooms.TRAIN_FRAMES), fps=FPS,
        horizon=rooms.TRAIN_FRAMES, window=rooms.TRAIN_FRAMES, panels=PANELS, shaded=dark_seconds(case.lights),
        title=f"{args.frames / FPS:.0f} s, {times:.3g} times the training horizon; grey: lights off",
    )  # fmt: skip
    print(report(args.out / "figures.csv", marks, args.frames))
    print(f"{time.perf_counter() - began:.0f} s; sheet.png, films.webp, curves.png and figures.csv in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
