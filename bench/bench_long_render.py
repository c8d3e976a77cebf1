"""Show time per chunk and resident memory of the demo model as a video grows: both should stay flat.

python bench/bench_long_render.py --frames 1200
"""

import statistics
import time
from dataclasses import dataclass

import machine
import torch
import tyro

from flexkern.demo import load_engine


@dataclass(kw_only=True)
class Args:
    """What to render."""

    frames: int = 1200
    preset: str = "flex"
    prompt: str = "a red disc and a blue square on dark green, fast"
    threads: int = 2
    rows: int = 8


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    session = load_engine().session(args.prompt, preset=args.preset, frames=args.frames)
    every = -(-args.frames // (session.engine.chunk * args.rows))
    print(f"{args.preset}, {args.frames} frames, {args.threads} threads, torch {torch.__version__}")
    print("frames        ms per chunk (median)   resident MB")
    began, taken = time.perf_counter(), []
    chunks = iter(session)
    while True:
        start = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is not None:
            taken.append(1000 * (time.perf_counter() - start))
        if taken and (chunk is None or len(taken) == every):
            first = session.next_frame - len(taken) * session.engine.chunk
            figures = f"{statistics.median(taken):18.1f}   {machine.resident() / 1e6:14.1f}"
            print(f"{first:5d} - {session.next_frame - 1:5d}   {figures}")
            taken = []
        if chunk is None:
            break
    print(f"{session.next_frame / (time.perf_counter() - began):.1f} frames per second in all")


if __name__ == "__main__":
    main(tyro.cli(Args, prog=machine.program(), description=machine.described(__doc__)))
