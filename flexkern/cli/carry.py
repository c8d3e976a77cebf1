"""Videos one after the other: made, told, and, where there are several, entered into a manifest.

Of several videos each is tried. One that is finished already, by the very same job, is skipped; one that was stopped
goes on; one that fails does not end the others. The manifest has a line of JSON for each:

    time       UTC                         target     the file
    outcome    finished, skipped, failed or interrupted
    error      why it failed               status     the exit status that it would have had alone
    seed, preset, prompt, pictures         of the order
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.cli import status
from flexkern.cli.batch import BAD, Batch
from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import Flags
from flexkern.cli.resume import saved_options, way_on
from flexkern.render.encoding import STDOUT, is_sequence

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.render import EventLog, Job, Order, PipeJob, Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a render ended."""

    status: int
    message: str = ""
    """why, where it is not done"""


def render_all(batches: Sequence[Batch], command: Flags) -> int:
    """Make the videos of all batches. Returns the exit status.

    Raises SystemExit with one line where there is one video, and it fails.
    """
    several, manifest = is_several(batches, command), manifest_path(batches, command)
    with refusing(*BAD):
        log = open_log(command)
        done = {id(order) for batch in batches for order in batch.orders if several and skips(order, batch)}
    failed: list[int] = []
    for batch in batches:
        waiting = []
        for order in batch.orders:
            if id(order) in done:
                note(f"{order.target}: is finished already, nothing of it has changed: skipped")
                enter(manifest, order, "skipped")
            else:
                waiting.append(order)
        if not waiting:
            continue
        try:
            engine = batch.open()
        except BAD as error:
            if len(batches) == 1:
                with refusing(*BAD):
                    raise
            for order in waiting:
                note(f"{order.target}: {error}")
                enter(manifest, order, "failed", str(error), status.REFUSED)
                failed.append(status.REFUSED)
            continue
        if command.output_folder is not None:
            with refusing(*BAD):
                command.output_folder.mkdir(parents=True, exist_ok=True)
        for order in waiting:
            ending = render_one(order, batch, engine, log, goes_on=several and not command.overwrite)
            if ending.status == status.DONE:
                enter(manifest, order, "finished")
                continue
            if ending.status >= status.SIGNAL:
                note(ending.message)
                enter(manifest, order, "interrupted", ending.message, ending.status)
                return ending.status
            if not several:
                refuse(ending.message, ending.status)
            note(f"{order.target}: {ending.message}")
            enter(manifest, order, "failed", ending.message, ending.status)
            failed.append(ending.status)
    if failed:
        count = sum(len(batch.orders) for batch in batches)
        note(f"{len(failed)} of {count} videos failed{f', see {manifest}' if manifest else ''}")
    return status.DONE if not failed else failed[0] if len(set(failed)) == 1 else status.FAILED


def is_several(batches: Sequence[Batch], command: Flags) -> bool:
    """Whether what is done is skipped, and what fails survived: for several videos, lists of prompts and job files."""
    return command.job is not None or command.data_path is not None or sum(len(batch.orders) for batch in batches) > 1


def skips(order: "Order", batch: Batch) -> bool:
    """Whether an order is done already. Raises FileExistsError where its target is something else."""
    from flexkern.render import is_done, validate_new
    from flexkern.render.target import JOB, parts_name, taken

    if batch.command.overwrite or order.target == STDOUT:
        return False
    if is_done(order, batch.about(order)):
        return True
    begun = (parts_name(order.target) / JOB).is_file()  # and stopped: it goes on
    if not begun or (taken(order.target) and not is_sequence(order.target)):
        validate_new(order.target)
    return False


def render_one(order: "Order", batch: Batch, engine: "Engine", log: "EventLog | None", *, goes_on: bool) -> Ending:
    """Make one video.

    goes_on: whether a render of it that was stopped is continued.
    """
    from flexkern.render import prepare, prepare_pipe, resume
    from flexkern.render.target import JOB, parts_name

    command, family = batch.command, batch.family
    watch = make_watch(command, log, order)

    def tell(text: str) -> None:
        note(text)
        watch.warn(text)

    try:
        job: Job | PipeJob
        if order.target == STDOUT:
            job = prepare_pipe(order, engine, family, sys.stdout.buffer)
        elif goes_on and (parts_name(order.target) / JOB).is_file():
            job = resume(order.target, engine, family, order=order, tell=tell)
        else:
            job = prepare(
                order,
                engine,
                family,
                overwrite=command.overwrite,
                options=saved_options(command),
                about=batch.about(order),
                tell=tell,
            )
    except BAD as error:
        watch.failed(order.target, str(error))
        return Ending(status=status.REFUSED, message=str(error))
    if batch.parts is None and not batch.told:  # of a checkpoint it was told before the weights were read
        note(str(engine.backend_choice))
        batch.told = True
    if command.progress:
        note(header(order, engine, family))
    return carry_out(job, family, watch)


def carry_out(job: "Job | PipeJob", family: "Family", watch: "Watch") -> Ending:
    """Make the video of a job, and tell what was made."""
    ending = run(job, watch)
    if ending.status != status.DONE:
        watch.failed(job.order.target, ending.message)
        return ending
    order, made = job.order, job.writer.pictures
    watch.finished(order.target)
    pictures = f"{order.pictures} pictures, {order.pictures / family.fps:.1f} s"
    length = pictures if order.writes == "video" else f"{family.frames(made)} latent frames"
    print(f"{order.target}: {length}", file=sys.stderr if order.target == STDOUT else sys.stdout, flush=True)
    return ending


def run(job: "Job | PipeJob", watch: "Watch") -> Ending:
    """Make the video of a job, and say how that ended."""
    from flexkern.finite import NotFiniteError
    from flexkern.render import is_out_of_memory, render, stoppable

    try:
        with stoppable() as signals:
            finished = job.run(progress=watch.progress, loop=render, watch=watch)
    except NotFiniteError as error:  # weights that overflow
        return Ending(status=status.FAILED, message=f"{error}; {job.kept}")
    except BrokenPipeError:  # who reads stdout has seen enough
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        why = str(error) if isinstance(error, OSError) else f"out of memory: {error or 'there is no more'}"
        ended = status.CAN_RESUME if job.can_resume else status.NOTHING_KEPT
        return Ending(status=ended, message=f"{why}; {job.kept}{way_on(job)}")
    if not finished:
        number = signals[0] if signals else signal.SIGINT
        return Ending(status=status.SIGNAL + number, message=f"interrupted: {job.kept}{way_on(job)}")
    return Ending(status=status.DONE)


def header(order: "Order", engine: "Engine", family: "Family") -> str:
    """One line that says what is rendered."""
    height, width = family.picture_size
    length = f"{order.pictures} pictures ({order.pictures / family.fps:g} s)"
    changed = "".join(f", {name} {value}" for name, value in order.overrides.items())
    prompts = f", {len(order.script)} prompts" if len(order.script) > 1 else ""
    what = f"{family.name}, preset {order.preset}{changed}, {width}x{height}, {length}{prompts}, seed {order.seed}"
    return f"{order.target}: {what}; backend {engine.backend_name} on {device_name(engine)}"


def device_name(engine: "Engine") -> str:
    """The device of an engine, with the model of a GPU."""
    import torch

    device = engine.model.device
    ranks = "" if engine.ranks is None else f"{engine.ranks.count} ranks, of which the first is on "
    return ranks + (f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device))


def open_log(command: Flags) -> "EventLog | None":
    """The log of --log. Raises OSError where it cannot be written."""
    from flexkern.render import EventLog

    return None if command.log is None else EventLog(command.log)


def make_watch(command: Flags, log: "EventLog | None", order: "Order") -> "Watch":
    """What follows the render of an order. Raises ValueError for a preview that cannot be written."""
    from flexkern.render import Watch

    about = {"target": str(order.target), "seed": order.seed, "preset": order.preset, "prompt": order.script[0].prompt}
    return Watch(progress=command.progress, preview=command.preview, log=log, about=about)


def manifest_path(batches: Sequence[Batch], command: Flags) -> Path | None:
    """Where the manifest goes: to --manifest, the folder of --data-path, or beside the job file; None for one video."""
    if command.manifest is not None:
        return command.manifest
    if sum(len(batch.orders) for batch in batches) == 1:
        return None
    if command.output_folder is not None:
        return command.output_folder / "manifest.jsonl"
    if command.job is not None and command.job.is_file():
        return command.job.with_name(f"{command.job.name}.manifest.jsonl")
    return Path("manifest.jsonl")


def enter(manifest: Path | None, order: "Order", outcome: str, error: str = "", ended: int = status.DONE) -> None:
    """Append a line to the manifest; where that fails, a line on stderr says so, and renders go on."""
    from flexkern.render.watch import append_line, as_line

    if manifest is None:
        return
    said: dict[str, Any] = {"target": str(order.target), "outcome": outcome}
    said |= {"error": " ".join(error.split()), "status": ended} if error else {}
    said |= {"seed": order.seed, "preset": order.preset, "prompt": order.script[0].prompt, "pictures": order.pictures}
    try:
        append_line(manifest, as_line(said))
    except OSError as failure:
        note(f"the manifest cannot be written: {failure}")
