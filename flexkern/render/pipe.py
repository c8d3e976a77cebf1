"""A render to stdout: there is nothing to keep, and nothing to go on with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from flexkern.render.job import Stop, begin_session, begin_with
from flexkern.render.order import Order
from flexkern.render.outputs import PipeWriter
from flexkern.render.sidecar import tags
from flexkern.render.signals import uninterrupted
from flexkern.render.watch import Watch

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.session import Chunk, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeJob:
    """Stands in for a ``Job`` whose pictures go to a stream."""

    order: Order
    session: "Session"
    writer: PipeWriter
    fps: int
    start: "Chunk | None"
    can_resume: bool = False

    @property
    def kept(self) -> str:
        """What was written, in words."""
        return f"{self.writer.pictures} of {self.order.pictures} pictures were written"

    def run(
        self, *, progress: bool = True, loop: Callable[..., bool], watch: Watch | None = None, stop: Stop | None = None
    ) -> bool:
        """Write the stream. Arguments, result and errors are those of ``Job.run``."""
        try:
            return loop(
                self.session, self.writer, pictures=self.order.pictures, script=self.order.script[1:],
                progress=progress, start=self.start, fps=self.fps, watch=watch,
                stop=None if stop is None else lambda *_: stop(),
            )  # fmt: skip
        finally:
            with uninterrupted():
                self.writer.close()


def prepare_pipe(order: Order, engine: "Engine", family: "Family", stream: BinaryIO) -> PipeJob:
    """The job of an order whose target is stdout; no picture is made. Raises what ``prepare`` does.

    Args:
        order: What to make.
        engine: What makes it.
        family: How the engine's latents become pictures.
        stream: Where they go.
    """
    session = begin_session(order, engine, family)
    height, width = family.picture_size
    rate, about = order.encoding.rate(family.fps), tags(order, family.name)
    writer = PipeWriter(stream, width=width, height=height, fps=rate, encoding=order.encoding, about=about)
    return PipeJob(
        order=order, session=session, writer=writer, fps=family.fps, start=begin_with(order, session, family)
    )
