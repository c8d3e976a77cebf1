"""Far beyond the training horizon on any machine: one prompt and seed rendered with several presets.

    python -m flexkern.demo --out demo_out

Writes one mp4 per preset, contact_sheet.png (those videos, time to the right), drift.png (identity, motion and ground
colour over time, over a few more prompts) and figures.csv.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from flexkern.demo import FPS, WEIGHTS, ZOOM, load_engine, world
from flexkern.demo.evaluate import differences, held_out_scenes, render_chunks, table, windows, write_csv
from flexkern.demo.measure import Marks, curves, measure
from flexkern.demo.picture import contact_sheet, drift_plot
from flexkern.engine import Engine
from flexkern.policies import get_preset
from flexkern.render.signals import quietly
from flexkern.render.writer import VideoWriter


@dataclass(kw_only=True)
class Args:
    """What to render."""

    out: Path = Path("demo_out")
    prompt: str = "a red disc and a blue square on black, fast"
    seed: int = 0
    frames: int = 12 * world.TRAIN_FRAMES
    presets: list[str] = field(default_factory=lambda: ["self-forcing", "flex", "pi"])
    videos: int = 6  # prompts that the drift plot averages, the given one among them
    weights: Path = WEIGHTS
    device: str = "cpu"


def chosen_scenes(prompt: str, videos: int) -> list[world.Scene]:
    """The prompt's scene and, up to ``videos``, others that training never saw."""
    scene = world.Scene.parse(prompt)
    others = [other for other in held_out_scenes(videos, seed=0) if other != scene]
    return [scene, *others][:videos]


def render_preset(
    engine: Engine, scenes: list[world.Scene], preset: str, args: Args
) -> tuple[torch.Tensor, np.ndarray]:
    """The first scene's mp4 on disk. Returns latents [B, frames, 3, SIZE, SIZE] and that video's pictures."""
    latents, pictures = [], []
    size = ZOOM * world.SIZE
    with (
        VideoWriter(args.out / f"{preset}.mp4", size, size, FPS) as writer,
        tqdm(total=args.frames, desc=f"{preset:20}", unit="frame") as progress,
    ):
        for chunk in render_chunks(engine, scenes, preset, args.frames, args.seed):
            assert chunk.pixels is not None, "the demo has a decoder"
            left = args.frames - chunk.frames[0]
            latents.append(chunk.latents[:, :left].cpu())
            pictures.append(chunk.pixels[0, :left].cpu().numpy())
            writer.write(pictures[-1])
            progress.update(len(pictures[-1]))
    return torch.cat(latents, dim=1), np.concatenate(pictures)


def report(marks: dict[str, Marks], frames: int) -> None:
    """Print the figures inside the horizon and at the end."""
    count = len(next(iter(marks.values())).ground)
    print(f"\n{count} prompts: mean ± 95 % interval of the mean (10th to 90th percentile)")
    for start, stop in dict.fromkeys((windows(frames)[0], windows(frames)[-1])):
        print("", table(marks, start, stop), differences(marks, start, stop), sep="\n")


def main(args: Args) -> None:
    began = time.perf_counter()
    scenes = chosen_scenes(args.prompt, args.videos)
    presets = [get_preset(name).name for name in args.presets]  # a misspelt one fails before the work
    engine = load_engine(args.weights, device=args.device)
    print(engine.backend_choice)
    args.out.mkdir(parents=True, exist_ok=True)
    marks, pictures = {}, {}
    for name in presets:
        latents, pictures[name] = render_preset(engine, scenes, name, args)
        marks[name] = measure(latents, scenes)
    horizon, seconds = world.TRAIN_FRAMES, args.frames / FPS
    title = f"“{args.prompt}”, seed {args.seed}"
    tracks = {name: (one.centre[0] / world.SIZE).numpy() for name, one in marks.items()}
    contact_sheet(args.out / "contact_sheet.png", pictures, title=title, fps=FPS, horizon=horizon, tracks=tracks)
    lines = {
        name: {figure: line.numpy() for figure, line in curves(one, horizon).items()} for name, one in marks.items()
    }
    title = f"Drift over {seconds:.0f} s, {args.frames / horizon:.3g} times the training horizon"
    drift_plot(args.out / "drift.png", lines, fps=FPS, horizon=horizon, window=horizon, title=title)
    write_csv(args.out / "figures.csv", marks, args.frames)
    report(marks, args.frames)
    print(f"\n{time.perf_counter() - began:.0f} s; videos, contact_sheet.png, drift.png and figures.csv in {args.out}")


if __name__ == "__main__":
    with quietly("flexkern.demo"):
        main(tyro.cli(Args, description=__doc__))
