"""One try of a job, in the process that renders it: what a farm hands to a worker, and what comes back."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexkern.render import status
from flexkern.render.job import Stop
from flexkern.render.spec import JobSpec
from flexkern.render.target import parts_name
from flexkern.render.worker import Progress, Worker
from flexkern.serve.book import write_status
from flexkern.serve.tally import Counting, Tally

EVERY = 30.0  # seconds between two writes of a job's status: a thousand workers write 33 times a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A job to render, in types that travel."""

    number: int
    spec: JobSpec
    status: Path
    """where the job's status goes"""
    said: Mapping[str, Any]
    """what the status says besides: line, id, worker, tries"""
    began: str = ""
    """when the try began, which tells its status from that of another"""

    @property
    def target(self) -> Path:
        """The file to make."""
        return self.spec.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a try ended."""

    ended: str
    """done, stopped, failed or interrupted"""
    message: str
    pictures: int
    """kept so far"""
    made: int
    """by this try"""
    seconds: float
    tally: Tally = field(default_factory=Tally)
    """what this try made, chunk by chunk"""
    signal: int = 0
    """number of a signal that its process heard, 0 for none"""


def carry_out(worker: Worker, task: Task, *, stop: Stop = lambda: False) -> Result:
    """Render the job, and keep its status file. Raises what is not known to be a matter of the job, room or memory.

    Args:
        worker: What renders.
        task: The job.
        stop: Whether whoever runs the fleet wants to end it.
    """
    began = time.monotonic()
    written = began - EVERY
    counted = Counting()

    def tell(progress: Progress) -> None:
        nonlocal written
        if (now := time.monotonic()) - written < EVERY:
            return
        written = now
        how: dict[str, Any] = {"stage": progress.stage, "pictures": progress.pictures, "of": progress.of}
        how |= {"chunk_seconds": progress.chunk_seconds, "seconds_left": progress.seconds_left}
        note(task, "running", **how, tally=asdict(counted.tally), kept=counted.kept)

    with suppress(OSError):  # the worker tells what is wrong with the folder
        task.target.parent.mkdir(parents=True, exist_ok=True)
    outcome = worker.run(task.spec, on_progress=tell, stop=stop, log=counted)
    ended: str = outcome.status
    if ended == "stopped" and (outcome.code >= status.SIGNAL or stop()):
        ended = "interrupted"
    ended = "failed" if ended == "refused" else ended
    seconds = time.monotonic() - began
    if ended == "done":
        about = {"pictures": outcome.pictures, "message": outcome.message, "seconds": round(seconds, 3)}
        note(task, "done", **about, tally=asdict(counted.tally))
    return Result(
        ended=ended,
        message=outcome.message,
        pictures=outcome.pictures,
        made=max(0, outcome.pictures - (outcome.resumed_from or 0)),
        seconds=seconds,
        tally=counted.tally,
        signal=outcome.signal,
    )


def note(task: Task, state: str, **about: Any) -> None:
    """Write a job's status; where there is no room for it, none is written: the manifest is what counts."""
    from flexkern.render.watch import now

    said = {"state": state, "time": now(), "began": task.began, "target": str(task.target), **task.said, **about}
    with suppress(OSError):
        write_status(task.status, **said)


def seen(task: Task) -> tuple[Tally | None, float | None]:
    """What the status of a try says that it has made, and the time of day of its newest checkpoint, as far as known."""
    try:
        said = json.loads(task.status.read_bytes())
        if said["began"] != task.began:  # of an earlier one
            return None, None
        return Tally(**said["tally"]), said.get("kept")
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def kept_pictures(target: Path) -> int:
    """How far the newest checkpoint of a render is, in pictures."""
    from flexkern.render.parts import checkpoints, made_at

    found = checkpoints(parts_name(target))
    return made_at(found[0]) if found else 0
