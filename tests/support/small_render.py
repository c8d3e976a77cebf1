"""A model so small that a render of it takes a moment, and what a job of it is made of.

As a script it renders, again and again, in processes that are killed; see ``tests/render/test_kills.py``.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from flexkern.engine import Engine
from flexkern.model.families import FAMILIES
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.render import Order, PromptSwitch, clear_parts, find_stopped, prepare, resume
from flexkern.render.target import parts_name

SIDE = 32  # pixels of a picture
CONFIG = WanConfig(
    dim=64, ffn_dim=64, num_heads=1, num_layers=1, in_dim=3, out_dim=3, freq_dim=32, text_len=4, text_dim=8
)
KNOWN = {"a cat": 1.0, "a dog": -1.0, "a fish": 0.3}
SCRIPT = (  # the re-cache and the cut fall into chunks 7 and 14 of 34
    PromptSwitch(at=0, prompt="a cat"),
    PromptSwitch(at=1.3, prompt="a dog"),
    PromptSwitch(at=2.6, prompt="a fish", cut=True),
    PromptSwitch(at=4.0, prompt="a cat"),
)
PICTURES = 100
EVERY = 0.0, 0.05  # seconds between checkpoints; with those of every chunk nothing is made while another is written


class Fading:
    """A decoder that looks back: each picture holds half of the one before."""

    def __init__(self):
        self.last = torch.zeros(3, 4, 4)

    def __call__(self, latents):
        made = []
        for latent in latents[0]:
            self.last = latent + self.last / 2
            made.append(self.last)
        pictures = torch.stack(made)[None].repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)
        return ((pictures.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).movedim(2, -1)

    def state(self):
        return {"last": self.last}

    def restore(self, state):
        self.last = state["last"]


def encode(prompts):
    return torch.stack([torch.full((4, 8), KNOWN[prompt]) for prompt in prompts])


def small_family():
    """Latents of 4x4 of three channels, each frame a picture."""
    schedule = Schedule(steps=(1000, 500))
    return replace(FAMILIES["self-forcing"], name="small", schedule=schedule, size=(4, 4), pictures_per_frame=1)


def small_engine(seed=0, **options):
    torch.manual_seed(seed)
    family = small_family()
    given = {"text_encoder": encode, "decoder": Fading} | options
    return Engine(CausalWan(CONFIG).eval(), schedule=family.schedule, size=family.size, **given)


def small_order(target, **options):
    """Prompts change, with a re-cache of the whole window each time, and once with a cut."""
    usual = {"script": SCRIPT, "pictures": PICTURES, "preset": "longlive-infinite", "seed": 3}
    return Order(**usual | {"target": Path(target)} | options)


def go_on(order, engine, family, every=0.0):
    """What a watchdog does: go on where there is something to go on with, begin where there is not."""
    given = {"every": every, "tell": lambda _: None}
    try:
        done = find_stopped(order.target).done
    except FileNotFoundError:
        if not order.target.exists():
            return prepare(order, engine, family, **given).run(progress=False)
        done = True  # it was killed when nothing but its lock was left to remove
    if done:
        return clear_parts(order.target)
    return resume(order.target, engine, family, **given).run(progress=False)


def die_at(count):
    """The process is killed at the so-many-th time that something is flushed, renamed or removed."""
    left = [count]

    def counted(call):
        def counting(*given, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return counting

    for where, name in ((os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "rmdir")):
        setattr(where, name, counted(getattr(where, name)))


def main(folder, kills):
    """Print the seconds of a whole render, then how each of those that were killed ended up: when, and by what."""
    torch.set_num_threads(1)
    engine, family, chance = small_engine(), small_family(), random.Random(7)
    began = time.monotonic()
    prepare(small_order(folder / "whole.mp4"), engine, family, every=0).run(progress=False)
    taken = time.monotonic() - began
    killed, film = 0, 0
    while killed < kills:
        target = folder / f"film{film}.mp4"
        pid = os.fork()
        if pid == 0:
            if killed % 2:
                die_at(chance.randrange(1, 60))
            go_on(small_order(target), engine, family, every=chance.choice(EVERY))
            os._exit(0)
        if killed % 2 == 0:
            time.sleep(chance.uniform(0.02, taken / 3))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status != 0:
            raise SystemExit(f"{target}: status {status}")
        film += target.exists() and not parts_name(target).exists()
    target = folder / f"film{film}.mp4"
    go_on(small_order(target), engine, family)
    print(killed, film + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
