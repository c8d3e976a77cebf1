"""How good the demo model is, on prompts that training never saw, beside the world's own clips as the ceiling.

    python -m flexkern.demo.evaluate --clips 64                                            # inside the training horizon
    python -m flexkern.demo.evaluate --clips 24 --frames 252 --presets self-forcing flex   # beyond it

Prints figures as mean ± 95 % confidence interval of the mean (10th to 90th percentile of the clips) and writes a CSV.
"""

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexkern.render.signals import leave_at_once, quietly

if __name__ == "__main__":  # before anything heavy is loaded
    leave_at_once("flexkern.demo.evaluate")

import torch
import tyro
from torch import Tensor

from flexkern.demo import WEIGHTS, load_engine, world
from flexkern.demo.measure import FIGURES, Marks, measure, summary
from flexkern.engine import Engine
from flexkern.policies import get_preset
from flexkern.session import Chunk

WORLD = "world"  # the ceiling's name, where presets have theirs


def held_out_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """``count`` different scenes that training never saw. Raises ValueError where there are not as many."""
    scenes = [scene for scene in world.all_scenes() if world.held_out(scene)]
    if not 1 <= count <= len(scenes):
        raise ValueError(f"expected 1 to {len(scenes)} clips, one for each prompt held out from training, got {count}")
    return random.Random(seed).sample(scenes, count)


def render_chunks(
    engine: Engine, scenes: Sequence[world.Scene], preset: str, frames: int, seed: int
) -> Iterator[Chunk]:
    """The chunks of one video per scene, all in one batch; the last may go beyond ``frames``."""
    yield from engine.session([str(scene) for scene in scenes], preset=preset, frames=frames, seed=seed)


def render_clips(
    engine: Engine, scenes: Sequence[world.Scene], preset: str, frames: int, seed: int, batch: int = 16
) -> Tensor:
    """Latents [B, frames, 3, SIZE, SIZE] of one video per scene; video b has seed + b, however they are batched."""
    clips = []
    for i in range(0, len(scenes), batch):
        chunks = render_chunks(engine, scenes[i : i + batch], preset, frames, seed + i)
        clips.append(torch.cat([chunk.latents.cpu() for chunk in chunks], dim=1)[:, :frames])
    return torch.cat(clips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over many videos."""

    mean: float
    interval: float
    """half the 95 % confidence interval of the mean"""
    low: float
    """10th percentile"""
    high: float
    """90th percentile"""
    count: int
    """videos that have the figure"""

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        """The spread of values [B], of which NaN do not count."""
        values = values[~values.isnan()].double()
        count = len(values)
        if count == 0:
            return cls(mean=math.nan, interval=math.nan, low=math.nan, high=math.nan, count=0)
        interval = 1.96 * values.std().item() / math.sqrt(count) if count > 1 else math.nan
        low, high = values.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        return cls(mean=values.mean().item(), interval=interval, low=low, high=high, count=count)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f} ({self.low:.2f} to {self.high:.2f})"


def windows(frames: int, length: int = world.TRAIN_FRAMES) -> list[tuple[int, int]]:
    """First frame and end of windows of ``length`` frames over a video; the last may overlap the one before."""
    starts = [*range(0, frames - length, length), max(0, frames - length)]
    return [(start, min(start + length, frames)) for start in starts]


def write_csv(path: Path, marks: dict[str, Marks], frames: int) -> None:
    """One row per source, window (the whole video last) and figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("source", "first_frame", "last_frame", "figure", "mean", "interval95", "p10", "p90", "clips"))
        for source, all_marks in marks.items():
            for start, stop in dict.fromkeys((*windows(frames), (0, frames))):
                for name, values in summary(all_marks.between(start, stop)).items():
                    s = Spread.of(values)
                    numbers = (f"{x:.4f}" for x in (s.mean, s.interval, s.low, s.high))
                    writer.writerow((source, start, stop - 1, name, *numbers, s.count))


def table(marks: dict[str, Marks], start: int, stop: int) -> str:
    """Markdown: figures down, sources to the right."""
    found = {source: summary(one.between(start, stop)) for source, one in marks.items()}
    lines = [f"| frames {start} to {stop - 1} | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in FIGURES:
        cells = (str(Spread.of(values[name])) for values in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(marks: dict[str, Marks], start: int, stop: int) -> str:
    """Markdown: how the presets differ from the first, prompt by prompt; empty where there is only one."""
    base, *others = [source for source in marks if source != WORLD]
    if not others:
        return ""
    found = {source: summary(marks[source].between(start, stop)) for source in (base, *others)}
    lines = [f"| difference to {base} | {' | '.join(others)} |", "|---" * (len(others) + 1) + "|"]
    for name in ("identity", "speed", "course", "ground", "surplus"):
        spreads = (Spread.of(found[other][name] - found[base][name]) for other in others)
        lines.append(f"| {name} | {' | '.join(f'{s.mean:+.3f} ± {s.interval:.3f}' for s in spreads)} |")
    return "\n".join(lines)


@dataclass(kw_only=True)
class Args:
    """What to render and measure."""

    clips: int = 64  # prompts, all held out from training
    frames: int = world.TRAIN_FRAMES
    presets: list[str] = field(default_factory=lambda: ["self-forcing"])
    seed: int = 0  # of prompts and noise
    batch: int = 16  # videos rendered at a time
    weights: Path = WEIGHTS
    out: Path = Path("evaluation.csv")
    device: str = "cpu"


def evaluate(args: Args) -> dict[str, Marks]:
    """Render, measure, print and write; returns the marks of every preset, and of the world's own clips."""
    scenes = held_out_scenes(args.clips, args.seed)
    presets = [get_preset(name).name for name in args.presets]  # a misspelt one fails before the work
    engine = load_engine(args.weights, device=args.device)
    truth = world.clips(scenes, args.frames, torch.Generator().manual_seed(args.seed))
    marks = {WORLD: measure(truth, scenes)}
    for name in presets:
        marks[name] = measure(render_clips(engine, scenes, name, args.frames, args.seed, args.batch), scenes)
    print(f"{args.clips} prompts held out from training: mean ± 95 % interval of the mean (10th to 90th percentile)")
    for start, stop in dict.fromkeys((windows(args.frames)[0], windows(args.frames)[-1], (0, args.frames))):
        print("", table(marks, start, stop), differences(marks, start, stop), sep="\n")
    write_csv(args.out, marks, args.frames)
    return marks


if __name__ == "__main__":
    with quietly("flexkern.demo.evaluate"):
        evaluate(tyro.cli(Args, description=__doc__))
