"""A worker of the server that needs no model: what it does with a job is said by the job's prompt.

"... waits"      goes on until it is told to stop         "... crashes"   the process ends
"... fails"      ends as a render does that cannot be     "... is full"   ends as without room on the disk
"... hangs"      does not hear that it should stop        anything else   a small video, at once

python stand_in_worker.py ROOT INDEX [never-ready]
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from flexkern.render.watch import write_preview
from flexkern.render.writer import VideoWriter
from flexkern.serve.work import Inbox, Line, claim_place, private_output, work

CHUNK = 8  # pictures


def run(spec, *, stop, preview, log):
    prompt = spec.prompt or spec.prompts[0]
    prompt = prompt if isinstance(prompt, str) else prompt.prompt
    log.write("started", target=str(spec.out), pictures=spec.frames, made=0, prompt_seconds=0.01)
    if prompt.endswith("fails"):
        return SimpleNamespace(status="failed", code=1, message=f"{spec.out}: a layer is not finite")
    if prompt.endswith("is full"):
        return SimpleNamespace(status="stopped", code=75, message=f"no space left on device: {spec.out}")
    with VideoWriter(spec.out, 32, 32, 16) as writer:
        while writer.pictures < spec.frames:
            if stop() and not prompt.endswith("hangs"):
                writer.discard()
                return SimpleNamespace(status="stopped", code=75, message="stopped")
            count = min(CHUNK, spec.frames - writer.pictures)
            pixels = np.full((count, 32, 32, 3), (spec.seed * 40) % 255, dtype=np.uint8)
            pixels[:, :, : 4 + writer.pictures % 28] = 200
            writer.write(pixels)
            write_preview(preview, pixels[-1])
            log.write(
                "chunk", chunk=writer.pictures // CHUNK, made=writer.pictures, pictures=spec.frames, frames=count,
                denoise_seconds=0.02, decode_seconds=0.01, encode_seconds=0.5, waited_seconds=0.001, left_seconds=1.0,
                peak_bytes=1000,
            )  # fmt: skip
            if prompt.endswith("crashes"):
                print("the worker says something before it ends", file=sys.stderr, flush=True)
                os._exit(7)
            while prompt.endswith(("waits", "hangs")) and not (stop() and prompt.endswith("waits")):
                time.sleep(0.01)
    log.write("finished", target=str(spec.out), made=spec.frames)
    return SimpleNamespace(status="done", code=0, message="done")


if __name__ == "__main__":
    if sys.argv[3:] == ["never-ready"]:
        print("no module named torch", file=sys.stderr)
        sys.exit(3)
    line = Line(private_output())
    place = claim_place(Path(sys.argv[1]), int(sys.argv[2]))
    work(run, Inbox(sys.stdin), line)
