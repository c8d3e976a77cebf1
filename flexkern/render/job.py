"""A job: an order that an engine has begun, with the file that waits for it, and what is kept where it stops."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexkern.checks import require
from flexkern.render.checkpoint import EVERY, Checkpoints
from flexkern.render.encoding import is_sequence
from flexkern.render.identity import identity
from flexkern.render.latents import LatentsFile
from flexkern.render.loop import Filled, Written, render
from flexkern.render.order import Order
from flexkern.render.outputs import SequenceWriter, validate_form
from flexkern.render.parts import Parts
from flexkern.render.record import Record, new_record, write_record
from flexkern.render.script import Pace, validate_shown, validate_switches
from flexkern.render.segments import SegmentWriter
from flexkern.render.sidecar import describe, tags, write_sidecar
from flexkern.render.signals import uninterrupted
from flexkern.render.target import validate_new
from flexkern.render.watch import Watch
from flexkern.state import State, nest, stateful

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.session import Chunk, Session


Stop = Callable[[], bool]
"""asked before each chunk, from the thread that renders: whether to stop there"""


class Writer(Protocol):
    """What a render fills, and can go on with after a stop."""

    pictures: int
    """written so far; of a file that could not be finished, those that are kept"""
    kept: Path
    """what holds them"""

    def finish(self) -> None:
        """The file is whole and has its name. Raises OSError where there is no room."""

    def stop(self) -> None:
        """What was written so far is kept, as far as there is room; nothing where it is finished."""

    def state(self) -> State:
        """What must be there to go on."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``. Raises ValueError where what it needs is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An order with everything at hand: the session that makes it, and the file that waits for it."""

    order: Order
    session: "Session"
    writer: Filled
    fps: int
    """pictures per second of the model, by which the script counts"""
    start: "Chunk | None"
    """what the session was begun with, where there is an image"""
    parts: Parts
    """what the render needs to go on after a stop"""
    checkpoints: Checkpoints
    record: Record
    """what is rendered, with what, and when it went on; its entry ``history`` says what was not as it had been"""
    followed: int = 0
    """changes of prompt that the session has made"""

    @property
    def kept(self) -> str:
        """What of the video is on disk, in words."""
        made, kept = self.writer.pictures, self.order.target.with_name(self.writer.kept.name)
        told = f"{kept} holds the first {made}" if made else "nothing was written"
        return f"{told} of {self.order.pictures} pictures"

    @property
    def can_resume(self) -> bool:
        """Whether ``resume`` would go on with it: there was a first picture, and its folder is there."""
        return self.parts.job.is_file()

    def run(
        self,
        *,
        progress: bool = True,
        loop: "Callable[..., bool] | None" = None,
        watch: Watch | None = None,
        stop: Stop | None = None,
    ) -> bool:
        """Write the video and finish its file; where that fails, keep what was made, and what is needed to go on.

        Args:
            progress: Show a bar on stderr.
            loop: Takes the place of ``render``, for a caller that wraps it.
            watch: Follows it, in place of the bar.
            stop: Asked before each chunk; where it says True a checkpoint is written, and the render stops.

        Returns:
            True, or False where Ctrl-C or ``stop`` came first.

        Raises:
            OSError: The file, or its sidecar, cannot be written to its end.
            NotFiniteError: A chunk is not finite.
            MemoryError, torch.OutOfMemoryError: There is not enough memory.
        """
        watch = watch or Watch(progress=progress)
        self.checkpoints.kept = watch.kept
        try:
            if not self.writer.pictures:
                self.parts.clear()  # of a render that was stopped, and is not wanted
            self._keep_record(self.record)
            finished = (loop or render)(
                self.session,
                self.writer,
                pictures=self.order.pictures,
                script=self.order.script[1:],
                progress=progress,
                start=self.start,
                followed=self.followed,
                after=self._after,
                fps=self.fps,
                watch=watch,
                stop=None if stop is None else lambda followed, written: stop() and self._stopping(followed, written),
            )
            self.checkpoints.wait()
            if finished:
                self.writer.finish()
                write_sidecar(self.order.target, describe(self.record, self.order, self.writer.fps, watch.timings()))
                self._keep_record(self.record | {"done": True})  # a kill leaves nothing to do but clear
                self.parts.clear()
            return finished
        finally:
            with uninterrupted():
                self.checkpoints.wait()
                self.writer.stop()
                if not self.writer.pictures:
                    self.parts.clear()
                self.parts.release()

    def close(self) -> None:
        """Let others write to the file. Of a job that was not run nothing is left, and nothing is lost."""
        self.writer.stop()
        self.parts.release()

    def _keep_record(self, record: Record) -> None:
        try:
            write_record(self.parts.folder, record)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.order.target)) from None

    def _after(self, followed: int, written: Written, *, now: bool = False) -> None:
        if not self.checkpoints.is_due(now=now):
            return
        written()  # a checkpoint knows what the file holds
        state = lambda: {
            **nest("session", self.session.state()), **nest("writer", self.writer.state()),
            "followed": followed, "record": self.record,
        }  # fmt: skip
        with uninterrupted():
            self.checkpoints.take(self.writer.pictures, state, now=now)

    def _stopping(self, followed: int, written: Written) -> bool:
        written()
        if self.session.chunks and self.checkpoints.pictures < self.writer.pictures:
            self._after(followed, written, now=True)
        return True


def prepare(
    order: Order,
    engine: "Engine",
    family: "Family",
    *,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    every: float = EVERY,
    tell: Callable[[str], None] = warnings.warn,
) -> Job:
    """The job of an order: pages are allocated, prompts encoded, and the file can be written; no picture is made.

    Args:
        order: What to make.
        engine: What makes it.
        family: How the engine's latents become pictures: their size, number and rate.
        overwrite: Whether an existing file is replaced, and what is left of a render that was stopped is dropped.
        options: What whoever resumes the render makes the engine of; fits JSON.
        about: What the sidecar says besides, such as the job and the files that were read; fits JSON.
        every: Seconds between two checkpoints; 0 for one after every chunk.
        tell: Hears what the user should know.

    Raises:
        ValueError: Model, preset, prompts, length, image and file do not fit each other.
        FileExistsError: The file exists, or was begun.
        BlockingIOError: Another render is writing it.
        OSError: A file cannot be read or written.
    """
    order.validate_files()
    validate_new(order.target, overwrite=overwrite)
    session = begin_session(order, engine, family)
    start = begin_with(order, session, family)
    record = new_record(order, identity(engine, order.prompts, writes=order.writes), options or {}, about or {})
    if is_sequence(order.target):
        order.target.parent.mkdir(exist_ok=True)
    parts = Parts(order.target)
    return Job(
        order=order,
        session=session,
        writer=begin_file(order, family, parts),
        fps=family.fps,
        start=start,
        parts=parts,
        checkpoints=Checkpoints(parts, every=every, tell=tell),
        record=record,
    )


def begin_session(order: Order, engine: "Engine", family: "Family") -> "Session":
    """The session of an order, of which nothing is made.

    Raises:
        ValueError: Model, preset, prompts and length do not fit each other.
        TypeError: A noise or a decoder of one's own has no ``state``.
    """
    decodes = order.writes == "latents" or engine.decoder is not None
    require(decodes, "this engine has no decoder: an order for it must write latents")
    if order.writes == "video":
        height, width = family.picture_size
        validate_form(width, height, family.fps, order.encoding, order.target)
    first, *later = order.script
    frames = family.frames(order.pictures)
    session = engine.session(first.prompt, preset=order.method, seed=order.seed, frames=frames)
    for thing, name in ((session.noise, "noise"), (session.decode, "decoder")):
        if thing is not None:
            stateful(thing, name)
    validate_switches(session, later)
    pace = Pace(chunk=engine.chunk, first_chunk=engine.first_chunk, per_frame=family.pictures_per_frame, fps=family.fps)
    validate_shown(order.script, order.pictures, pace)
    return session


def begin_with(order: Order, session: "Session", family: "Family") -> "Chunk | None":
    """What the session has been begun with, where an image was ordered."""
    from flexkern.model.image import read_image

    return None if order.image is None else session.prefill(read_image(order.image, *family.picture_size))


def begin_file(order: Order, family: "Family", parts: Parts) -> Filled:
    """What an order's pictures or latents go to; nothing is written yet."""
    if order.writes == "video":
        height, width = family.picture_size
        if is_sequence(order.target):
            return SequenceWriter(order.target, width=width, height=height, fps=order.encoding.rate(family.fps))
        rate, crf, about = order.encoding.rate(family.fps), order.encoding.crf, tags(order, family.name)
        return SegmentWriter(parts, width=width, height=height, fps=rate, crf=crf, about=about)
    about = {
        "prompt": order.script[0].prompt, "seed": str(order.seed), "preset": order.preset, "model": family.name,
        "pictures": str(order.pictures), "fps": str(family.fps), **tags(order, family.name),
    }  # fmt: skip
    return LatentsFile(order.target, fps=family.fps, per_frame=family.pictures_per_frame, about=about)


def run(order: Order, engine: "Engine", family: "Family", *, progress: bool = True, overwrite: bool = False) -> bool:
    """Make the video of an order; ``prepare`` and ``Job.run`` in one.

    Args:
        order: What to make.
        engine: What makes it.
        family: How the engine's latents become pictures.
        progress: Show a bar on stderr.
        overwrite: Whether an existing file is replaced.

    Returns:
        True, or False where Ctrl-C came first.
    """
    return prepare(order, engine, family, overwrite=overwrite).run(progress=progress)
