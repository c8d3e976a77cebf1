"""How a render ended: one exit status, and one sentence that says what is kept and how to go on."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flexkern.finite import NotFiniteError
from flexkern.render import status
from flexkern.render.checkpoint import is_out_of_memory, memory_words
from flexkern.render.job import Job, Stop
from flexkern.render.loop import render
from flexkern.render.pipe import PipeJob
from flexkern.render.signals import stoppable
from flexkern.render.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a render ended."""

    status: int
    """one of ``flexkern.render.status``"""
    message: str = ""
    """why, where it is not done"""
    cause: Exception | None = None
    """what was raised, where something was"""
    signal: int = 0
    """number of the signal that came while it was made, 0 for none; where it is done all the same, it came late"""


def carry_out(
    job: Job | PipeJob, watch: Watch, *, stop: Stop | None = None, loop: Callable[..., bool] = render
) -> Ending:
    """Make the video of a job, and say how that ended; what is not a matter of room, memory or numbers is raised.

    At a signal the chunk that is being made is ended and a checkpoint written, where a chunk was made before it; else
    there is nothing to keep, and nothing is waited for. Nor is anything for a second signal.

    Args:
        job: What is rendered.
        watch: Follows it, and hears of a failure; of success when the caller has told it.
        stop: Asked before each chunk whether to stop there.
        loop: Takes the place of ``render``, for a caller that wraps it.
    """
    begun = job.session.chunks

    def waits() -> bool:
        keeps = isinstance(job, Job) and job.session.chunks > begun
        if keeps:
            watch.stopping()
        return keeps

    with stoppable(waits) as signals:
        ending = _run(job, watch, stop, loop, signals)
    ending = replace(ending, signal=signals[0] if signals else 0)
    if ending.status != status.DONE:
        watch.failed(job.order.target, ending.message)
    return ending


def _run(
    job: Job | PipeJob, watch: Watch, stop: Stop | None, loop: Callable[..., bool], signals: Sequence[int]
) -> Ending:
    said = [False]

    def asked() -> bool:
        said[0] = stop is not None and stop()
        return said[0] or bool(signals)

    try:
        finished = job.run(progress=watch.progress, loop=loop, watch=watch, stop=asked)
    except NotFiniteError as error:  # weights that overflow
        return Ending(status=status.FAILED, message=f"{error}; {job.kept}", cause=error)
    except BrokenPipeError:  # who reads stdout has seen enough
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        why = str(error) if isinstance(error, OSError) else memory_words(error)
        ended = status.CAN_RESUME if job.can_resume else status.NOTHING_KEPT
        return Ending(status=ended, message=f"{why}; {job.kept}{way_on(job)}", cause=error)
    if finished:
        return Ending(status=status.DONE)
    if not said[0]:
        number = signals[0] if signals else signal.SIGINT
        return Ending(status=status.SIGNAL + number, message=f"interrupted: {job.kept}{way_on(job)}")
    return Ending(status=status.CAN_RESUME, message=f"stopped: {job.kept}{way_on(job)}")


def way_on(job: Job | PipeJob) -> str:
    """How to go on with a job that was stopped, as the end of a sentence; empty where nothing is left of it."""
    if isinstance(job, PipeJob) or not job.can_resume:
        return ""
    made = job.checkpoints.pictures
    where = f"from picture {made}" if made else "from the start, there is no checkpoint yet"
    return f"; flexkern render --resume {job.order.target} goes on {where}"
