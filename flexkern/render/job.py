"""A job: an order that an engine has begun, and the loop that carries it to its file."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from flexkern.checks import require
from flexkern.render.latents import LatentsFile
from flexkern.render.order import Order
from flexkern.render.script import Pace, PromptSwitch, validate_shown, validate_switches
from flexkern.render.writer import VideoWriter, validate_encoder

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.session import Chunk, Session

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} pictures [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An order with everything at hand: the session that makes it, and the file that waits for it."""

    order: Order
    session: "Session"
    writer: VideoWriter | LatentsFile
    start: "Chunk | None"
    """what the session was begun with, where there is an image"""

    @property
    def kept(self) -> str:
        """What of the video is on disk, in words."""
        made = self.writer.pictures
        kept = f"{self.order.target} holds the first {made}" if made else "nothing was written"
        return f"{kept} of {self.order.pictures} pictures"

    def run(self, *, progress: bool = True, loop: "Callable[..., bool] | None" = None) -> bool:
        """Write the video and close its file, however that ends.

        Args:
            progress: Show a bar on stderr.
            loop: Takes the place of ``render``, for a caller that wraps it.

        Returns:
            True, or False where Ctrl-C came first; the file then holds what was made.

        Raises:
            OSError: The file cannot be written to its end; ``kept`` says what it holds.
            NotFiniteError: A chunk is not finite; the file holds those before it.
        """
        with self.writer:
            return (loop or render)(
                self.session,
                self.writer,
                pictures=self.order.pictures,
                script=self.order.script[1:],
                progress=progress,
                start=self.start,
            )


def prepare(order: Order, engine: "Engine", family: "Family") -> Job:
    """The job of an order: pages are allocated, prompts encoded, and the file can be written; no picture is made.

    Args:
        order: What to make.
        engine: What makes it.
        family: How the engine's latents become pictures: their size, number and rate.

    Raises:
        ValueError: Model, preset, prompts, length, image and file do not fit each other.
        OSError: A file cannot be read or written.
    """
    from flexkern.model.image import read_image

    decodes = order.writes == "latents" or engine.decoder is not None
    require(decodes, "this engine has no decoder: an order for it must write latents")
    order.validate_files()
    if order.writes == "video":
        validate_encoder(*reversed(family.picture_size), family.fps)
    first, *later = order.script
    frames = family.frames(order.pictures)
    session = engine.session(first.prompt, preset=order.method, seed=order.seed, frames=frames)
    validate_switches(session, later)
    pace = Pace(chunk=engine.chunk, first_chunk=engine.first_chunk, per_frame=family.pictures_per_frame, fps=family.fps)
    validate_shown(order.script, order.pictures, pace)
    start = None if order.image is None else session.prefill(read_image(order.image, *family.picture_size))
    return Job(order=order, session=session, writer=_writer(order, family), start=start)


def run(order: Order, engine: "Engine", family: "Family", *, progress: bool = True) -> bool:
    """Make the video of an order; ``prepare`` and ``Job.run`` in one.

    Args:
        order: What to make.
        engine: What makes it.
        family: How the engine's latents become pictures.
        progress: Show a bar on stderr.

    Returns:
        True, or False where Ctrl-C came first.
    """
    return prepare(order, engine, family).run(progress=progress)


def _writer(order: Order, family: "Family") -> VideoWriter | LatentsFile:
    if order.writes == "video":
        height, width = family.picture_size
        return VideoWriter(order.target, width, height, family.fps)
    about = {"prompt": order.script[0].prompt, "seed": str(order.seed), "preset": order.preset, "model": family.name}
    return LatentsFile(order.target, fps=family.fps, per_frame=family.pictures_per_frame, about=about)


def render(
    session: "Session",
    writer: VideoWriter | LatentsFile,
    *,
    pictures: int,
    script: Sequence[PromptSwitch] = (),
    progress: bool = True,
    start: "Chunk | None" = None,
) -> bool:
    """Write the first pictures of the session's video, wherever its chunks end.

    Memory does not grow with the length of the video.

    Args:
        session: What makes it.
        writer: An open file.
        pictures: How many to write.
        script: Prompts that follow the session's own, in ascending order.
        progress: Show a bar on stderr.
        start: What the session was prefilled with; written first.

    Returns:
        True, or False where Ctrl-C came first.

    Raises:
        OSError: The file has no room.
        NotFiniteError: A chunk is not finite; it is not written.
    """
    made, waiting = 0, list(script)
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    bar: tqdm[NoReturn] = tqdm(
        total=pictures,
        desc=first_wait(session) if progress else "",
        unit=" pictures",
        bar_format=BAR,
        mininterval=seconds,
        disable=not progress,
    )
    with bar:
        try:
            if start is not None:
                made += _write(writer, start, pictures)
                bar.update(made)
            while made < pictures:
                due = [switch for switch in waiting if switch.at * writer.fps <= made + 1e-6]
                if due:
                    session.switch(due[-1].prompt)
                    if any(switch.cut for switch in due):
                        session.cut()
                    waiting = waiting[len(due) :]
                chunk = session.step()
                session.validate_chunks()  # the pictures are about to be waited for
                new = _write(writer, chunk, pictures - made)
                made += new
                bar.set_description_str(f"chunk {chunk.index + 1}", refresh=False)
                bar.update(new)
        except KeyboardInterrupt:
            return False
    return True


def first_wait(session: "Session") -> str:
    """What the first chunk waits for: kernels are compiled at their first launch, unless Triton's cache has them."""
    engine = session.engine
    is_compiled = engine.backend_name == "triton" and engine.model.device.type == "cuda"
    return "compiling or loading kernels" if is_compiled else "chunk 0"


def _write(writer: VideoWriter | LatentsFile, chunk: "Chunk", most: int) -> int:
    """Append at most so many pictures of the chunk. Returns how many."""
    before = writer.pictures
    if isinstance(writer, LatentsFile):
        writer.write(chunk.latents[0], most)
    elif chunk.pixels is None:
        raise ValueError("the session's engine has no decoder: write its latents to a LatentsFile")
    else:
        writer.write(chunk.pixels[0, :most].cpu().numpy())
    return min(most, writer.pictures - before)
