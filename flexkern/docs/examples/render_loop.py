"""A video chunk by chunk, from Python: another prompt half-way, pictures on disk as they are made.

    python render_loop.py --frames 48 --out loop.mp4

With a checkpoint of your own, ``load_engine()`` becomes ``flexkern.Engine.from_pretrained(...)``.
"""

import argparse
from pathlib import Path

from flexkern.demo import FPS, load_engine
from flexkern.render import VideoWriter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--frames", type=int, default=96, help="latent frames; the demo's model makes one picture of each")
parser.add_argument("--preset", default="flex")
parser.add_argument("--out", type=Path, default=Path("loop.mp4"))
args = parser.parse_args()

prompt, later = "a red disc and a blue square on dark green, fast", "a yellow disc and a cyan square on black, slow"
session = load_engine().session(prompt, preset=args.preset, seed=0, frames=args.frames)
first = session.step()
assert first.pixels is not None  # they are None where an engine has no decoder
height, width = first.pixels.shape[2:4]
with VideoWriter(args.out, width, height, FPS) as writer:
    writer.write(first.pixels[0].numpy())
    switched = False
    for chunk in session:  # ends after the frames that the session was made for
        assert chunk.pixels is not None
        writer.write(chunk.pixels[0].numpy())
        if not switched and session.next_frame >= args.frames // 2:
            session.switch(later)
            switched = True
print(f"{args.out}: {writer.pictures} pictures of {width}x{height}")
