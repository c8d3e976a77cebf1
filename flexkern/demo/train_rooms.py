"""Train the model of rooms: teacher forcing on clips in which the lights go off and on; stops and resumes at any time.

    python -m flexkern.demo.train_rooms --out run
    python -m flexkern.demo.train_rooms --out run        # again: goes on where the first one stopped

As ``flexkern.demo.train``, with these differences. Each chunk has the prompt of its own lights, as each has in the loop
after a switch. ``--steps`` counts those of all legs, and the learning rate falls to zero over the last quarter of them;
``--minutes`` ends a leg early. run/checkpoint.pt holds all that the next leg needs,
run/rooms.safetensors the average that is kept, run/training.csv the log of all legs, run/commands.txt their commands.
"""

import csv
import json
import math
import random
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from flexkern.render.signals import leave_at_once, quietly

if __name__ == "__main__":  # before anything heavy is loaded
    leave_at_once("flexkern.demo.train_rooms")

import torch
import tyro
from torch import Tensor, nn

from flexkern.demo import rooms
from flexkern.demo.train import SHIFT, TeacherForcing, Trainer
from flexkern.model.wan import Block, CausalWan, WanConfig

CHUNK = rooms.CHUNK
SIZES = {"demo": WanConfig(
    dim=192, ffn_dim=512, num_heads=3, num_layers=6, in_dim=3, out_dim=3, patch_size=(1, 8, 8),
    text_len=rooms.TEXT_LEN, text_dim=rooms.TEXT_DIM, freq_dim=128, prediction="x0",
)}  # fmt: skip
SIZES["small"] = replace(
    SIZES["demo"], dim=128, ffn_dim=384, num_heads=2, num_layers=4, patch_size=(1, 16, 16)
)  # fmt: skip
CLIPS = {3: 32, 9: 16, rooms.TRAIN_FRAMES: 8}  # clips of a batch by their length in frames
GROWTH = (  # until this share of the steps: odds of each length
    (0.08, (1, 0, 0)),
    (0.4, (0.1, 0.9, 0)),
    (1.0, (0.1, 0.3, 0.6)),
)
BEGINS_LIT, GOES_OFF, GOES_ON = 0.85, 0.25, 0.4  # odds of the lights, from chunk to chunk
CACHED = 0.1  # noise on the clean past, at most: the loop feeds back what the model made


class ScriptedBlock(Block):
    """A block that reads another prompt for every chunk: of B clips of n chunks, text has B * n entries."""

    def attend_text(self, x: Tensor, text: tuple[Tensor, ...], ops: object) -> Tensor:
        chunks = text[0].shape[0] // x.shape[0]
        folded = x.unflatten(1, (chunks, -1)).flatten(0, 1)
        return super().attend_text(folded, text, ops).view_as(x)  # type: ignore[arg-type]


class ScriptedWan(CausalWan):
    """``CausalWan`` with a prompt for every chunk; the same weights."""

    def __init__(self, config: WanConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(ScriptedBlock(config, index) for index in range(config.num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Clips to learn from."""

    clip: Tensor
    """[B, F, 3, SIZE, SIZE]"""
    text: Tensor
    """[B, 2 (off, on), TEXT_LEN, TEXT_DIM]"""
    lights: Tensor
    """int64 [B, chunks]: which of the two prompts a chunk has"""
    noise: Tensor
    """as clip"""
    level: Tensor
    """[B, F] in 0..1, one value a chunk"""

    @classmethod
    def random(cls, frames: int, count: int) -> "Batch":
        """Random scenes, rooms, lights and noise levels."""
        scenes, chunks = random.choices(rooms.all_scenes(), k=count), frames // CHUNK
        on = torch.rand(count) < BEGINS_LIT
        lights = [on]
        for _ in range(chunks - 1):
            flips = torch.rand(count) < torch.where(lights[-1], GOES_OFF, GOES_ON)
            lights.append(lights[-1] ^ flips)
        script = torch.stack(lights, dim=1)
        clip = rooms.clip(scenes, rooms.Rooms.random(count), script.repeat_interleave(CHUNK, dim=1))
        u = torch.rand(count, chunks)
        level = (SHIFT * u / (1 + (SHIFT - 1) * u)).repeat_interleave(CHUNK, dim=1)
        text = torch.stack([torch.stack([rooms.embed(scene.lit(on)) for on in (False, True)]) for scene in scenes])
        return cls(clip=clip, text=text, lights=script.long(), noise=torch.randn_like(clip), level=level)


def denoise_loss(
    model: CausalWan, memory: TeacherForcing, clip: Tensor, text: Tensor, lights: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Mean of (x0 - clip)^2 / t over the fields of a ``Batch``, of a ``ScriptedWan``."""
    level = t[:, :, None, None, None]
    noisy = (1 - level) * clip + level * noise
    # as much noise on the past as the chunk after it has, up to a little: what the loop will feed back
    history = clip[:, :-CHUNK] + CACHED * noise[:, :-CHUNK] * t[:, CHUNK:, None, None, None]
    timesteps = 1000 * torch.cat((torch.zeros_like(t[:, CHUNK:]), t), dim=1)
    script = torch.cat((lights[:, :-1], lights), dim=1)  # of clean and noisy chunks
    at = (torch.arange(len(clip), device=clip.device)[:, None] * 2 + script).flatten()
    keys = [tuple(x[at] for x in pair) for pair in model.text_keys(text.flatten(0, 1), memory.ops)]
    out = model(torch.cat((history, noisy), dim=1), timesteps, keys, memory)
    return ((out[:, -clip.shape[1] :].float() - clip).square() / level.clamp_min(0.08)).mean()


class Run:
    """A training run in a folder: model and optimizers, how long it went, how far it came."""

    def __init__(self, folder: Path, config: WanConfig, device: str):
        """Begins afresh, or with the folder's checkpoint.

        Raises ValueError where that is of a model of other sizes.
        """
        self.folder, self.config, self.device = folder, config, device
        self.trainer = Trainer(config, device, kind=ScriptedWan)
        self.seconds, self.clips, self.smooth = 0.0, 0, math.nan
        if self.checkpoint.exists():
            self._restore(torch.load(self.checkpoint, map_location=device, weights_only=True))

    @property
    def checkpoint(self) -> Path:
        """What the next leg starts from."""
        return self.folder / "checkpoint.pt"

    def _restore(self, state: dict) -> None:  # type: ignore[type-arg]
        if state["config"] != json.dumps(self.config.to_dict()):
            raise ValueError(f"{self.checkpoint} is of a model of other sizes: {state['config']}; use another folder")
        trainer = self.trainer
        with torch.no_grad():
            for name, p in trainer.master.items():
                p.copy_(state["master"][name])
                trainer.average[name].copy_(state["average"][name])
                trainer.working[name].copy_(p)
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        trainer.steps = state["steps"]
        self.seconds, self.clips, self.smooth = state["seconds"], state["clips"], state["smooth"]

    def save(self) -> None:
        """Checkpoint and weights on disk, each replaced at once."""
        trainer = self.trainer
        state = {
            "config": json.dumps(self.config.to_dict()),
            "master": {name: p.detach() for name, p in trainer.master.items()},
            "average": trainer.average,
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "steps": trainer.steps, "seconds": self.seconds, "clips": self.clips, "smooth": self.smooth,
        }  # fmt: skip
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)
        trainer.save(self.folder / "rooms.safetensors")


@dataclass(kw_only=True)
class Args:
    """How to train."""

    size: Literal["demo", "small"] = "demo"  # small: the proof's
    steps: int = 2700  # of training, in all legs together
    minutes: float | None = None  # stop this leg after so many
    seed: int = 0
    rate: float = 2e-3  # peak learning rate
    out: Path = Path("rooms_run")  # folder of the run; one that has a checkpoint is continued
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = True
    save_every: float = 120.0  # seconds


def train(args: Args) -> None:
    """Train until the run has all its steps, or this leg its time; interrupted, it loses ``save_every`` seconds.

    Raises NotImplementedError where torch has no Muon yet.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    config = SIZES[args.size]
    run = Run(args.out, config, args.device)
    trainer = run.trainer
    random.seed(args.seed + trainer.steps)
    torch.manual_seed(args.seed + trainer.steps)
    loss_of = torch.compile(denoise_loss, dynamic=False) if args.compile else denoise_loss
    grid = trainer.model.grid(rooms.SIZE, rooms.SIZE)
    memories = {frames: TeacherForcing(frames, *grid, config.head_dim, args.device) for frames in CLIPS}
    with (args.out / "commands.txt").open("a", encoding="utf-8") as file:
        file.write(f"step {trainer.steps}: {shlex.join(sys.argv)}  ({asdict(args)})\n")
    log_path = args.out / "training.csv"
    fresh = not log_path.exists()
    began = saved = before = time.time()
    with log_path.open("a", newline="", buffering=1, encoding="utf-8") as file:
        log = csv.writer(file)
        if fresh:
            log.writerow(("step", "clips", "frames", "seconds", "rate", "loss"))
        while trainer.steps < args.steps and (args.minutes is None or time.time() - began < 60 * args.minutes):
            share = trainer.steps / args.steps
            odds = next(odds for until, odds in GROWTH if share < until)
            frames = random.choices(list(CLIPS), odds)[0]
            batch = Batch.random(frames, CLIPS[frames])
            fields = (x.to(args.device) for x in (batch.clip, batch.text, batch.lights, batch.noise, batch.level))
            loss = loss_of(trainer.model, memories[frames], *fields)
            rate = args.rate * min(1, (trainer.steps + 1) / 100) * min(1, 4 * (1 - share) + 0.01)
            trainer.step(loss, rate)
            run.clips += CLIPS[frames]
            run.smooth = loss.item() if math.isnan(run.smooth) else 0.97 * run.smooth + 0.03 * loss.item()
            now = time.time()
            run.seconds, before = run.seconds + now - before, now
            if trainer.steps % 25 == 0:
                log.writerow(
                    (trainer.steps, run.clips, frames, f"{run.seconds:.0f}", f"{rate:.6f}", f"{run.smooth:.5f}")
                )
                print(f"step {trainer.steps}  {frames} frames  {run.seconds:.0f} s  loss {run.smooth:.5f}", flush=True)
            if now - saved > args.save_every:
                run.save()
                saved = now
    run.save()


if __name__ == "__main__":
    with quietly("flexkern.demo.train_rooms"):
        train(tyro.cli(Args, description=__doc__))
