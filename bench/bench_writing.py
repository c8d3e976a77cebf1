"""Show what writing adds to a render's time, beside the next chunk and before it, on a CPU and without a model.

python bench/bench_writing.py --form mp4

A chunk is made in a fixed time, in which the host sleeps, as it does while a GPU computes, or multiplies matrices.
Either is rendered in turn: with each chunk written while the next is made, and with each chunk waited for.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import machine
import numpy as np
import torch
import tyro

from flexkern.render import Encoding, LatentsFile, PipeWriter, SequenceWriter, Watch, render
from flexkern.render.parts import Parts
from flexkern.render.segments import SegmentWriter

SEED = 7


@dataclass(kw_only=True)
class Args:
    """What to write."""

    form: Literal["mp4", "png", "rgb24", "latents"] = "mp4"
    """a file of H.264, a picture each, the bytes of a pipe, or latents"""
    step: Literal["sleep", "compute"] = "sleep"
    """what the host does while a chunk is made"""
    seconds: float = 0.226
    """that making a chunk takes"""
    pictures: int = 12
    """of a chunk"""
    height: int = 480
    width: int = 832
    chunks: int = 20
    rounds: int = 5


class Session:
    """Stands in for a session: chunks of moving pictures, each after a fixed time."""

    def __init__(self, args: Args):
        self.args, self.chunks, self.prompt_seconds = args, 0, 0.0
        rows, columns = args.height // 8, args.width // 8
        generator = torch.Generator().manual_seed(SEED)
        coarse = torch.rand(1, 3, rows, columns, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (args.height, args.width), mode="bicubic")
        self._scene = (smooth[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
        self._latents = torch.randn(1, 3, 16, rows, columns, generator=generator).bfloat16()
        self._matrix = torch.rand(512, 512, generator=generator)

    def step(self) -> SimpleNamespace:
        args, until = self.args, time.perf_counter() + self.args.seconds
        first = self.chunks * args.pictures
        pixels = torch.stack([self._scene.roll(first + i, 1) for i in range(args.pictures)])[None]
        while (left := until - time.perf_counter()) > 0:
            time.sleep(left) if args.step == "sleep" else self._matrix @ self._matrix
        self.chunks += 1
        return SimpleNamespace(index=self.chunks - 1, frames=range(3), latents=self._latents, pixels=pixels, spent=None)

    def validate_chunks(self) -> None:
        """All of them are."""


def seconds_a_chunk(args: Args, *, waits: bool) -> float:
    """Of a render, from its beginning to its last picture."""
    session, watch = Session(args), Watch(progress=False)
    size = {"width": args.width, "height": args.height, "fps": 16}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "wb", buffering=0) as nowhere:
        path = Path(folder)
        if args.form == "mp4":
            writer = SegmentWriter(Parts(path / "v.mp4"), **size)
        elif args.form == "png":
            writer = SequenceWriter(path / "%06d.png", **size)
        elif args.form == "rgb24":
            writer = PipeWriter(nowhere, encoding=Encoding(format="rgb24"), **size)
        else:
            writer = LatentsFile(path / "l.safetensors", fps=16, per_frame=4, about={})
        after = (lambda _, written: written()) if waits else None
        render(session, writer, pictures=args.chunks * args.pictures, watch=watch, after=after)
        if args.form in ("mp4", "latents"):
            writer.stop()
    return watch.timings()["seconds"] / session.chunks


def main(args: Args) -> None:
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.rounds):
        for waits in (True, False) if number % 2 == 0 else (False, True):
            found[waits].append(1000 * seconds_a_chunk(args, waits=waits))
    print(f"{args.form}, {args.pictures} pictures of {args.width}x{args.height}, made in {1000 * args.seconds:.0f} ms")
    for waits, name in ((True, "waited for"), (False, "beside the next chunk")):
        ms = found[waits]
        print(f"written {name:22} {statistics.median(ms):7.1f} ms a chunk ({min(ms):.1f} to {max(ms):.1f})")
    gains = np.array(found[True]) / np.array(found[False])
    print(f"of {args.rounds} pairs the gain is {np.median(gains):.2f} ({gains.min():.2f} to {gains.max():.2f})")


if __name__ == "__main__":
    main(tyro.cli(Args, prog=machine.program(), description=machine.described(__doc__)))
