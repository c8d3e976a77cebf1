"""Videos one after the other: made, told, and, where there are several, entered into a manifest.

Of several videos each is tried. One that is finished already, by the very same job, is skipped; one that was stopped
goes on; one that fails does not end the others. The manifest has a line of JSON for each:

    time       UTC                         target     the file
    outcome    finished, skipped, failed or interrupted
    error      why it failed               status     the exit status that it would have had alone
    seed, preset, prompt, pictures         of the order
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import Flags
from flexkern.cli.lots import Lot
from flexkern.cli.resume import saved_options
from flexkern.render import status
from flexkern.render.encoding import STDOUT

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.render import Job, Order, PipeJob, Watch
    from flexkern.render.ending import Ending
    from flexkern.render.watch import Listener


def render_all(lots: Sequence[Lot], command: Flags) -> int:
    """Make the videos of all lots. Returns the exit status.

    Raises SystemExit with one line where there is one video, and it fails.
    """
    with ExitStack() as ends:
        return _render_all(lots, command, ends)


def _render_all(lots: Sequence[Lot], command: Flags, ends: ExitStack) -> int:
    several, manifest = is_several(lots, command), manifest_path(lots, command)
    with refusing(*status.BAD):
        log = open_log(command, lots[0].batch.family.name, ends)
        skipped = several and not command.overwrite
        done = {id(order) for lot in lots for order in lot.batch.orders if skipped and lot.batch.skips(order)}
    failed: list[int] = []

    def fail(order: "Order", ending: "Ending") -> None:
        note(f"{order.target}: {ending.message}")
        enter(manifest, order, "failed", ending.message, ending.status)
        failed.append(ending.status)

    left = sum(len(lot.batch.orders) for lot in lots)
    for lot in lots:
        waiting = []
        left -= len(lot.batch.orders)
        for order in lot.batch.orders:
            if id(order) in done:
                note(f"{order.target}: is finished already, nothing of it has changed: skipped")
                enter(manifest, order, "skipped")
            else:
                waiting.append(order)
        if not waiting:
            continue
        try:
            engine = open_engine(lot)
        except Exception as error:
            ending = refusal(error)
            if len(lots) == 1:
                refuse(ending.message, ending.status)
            for order in waiting:
                fail(order, ending)
            continue
        if command.output_folder is not None:
            with refusing(*status.BAD):
                command.output_folder.mkdir(parents=True, exist_ok=True)
        for order in waiting:
            ending = render_one(order, lot, engine, log, goes_on=several and not command.overwrite)
            if ending.status >= status.SIGNAL:
                note(ending.message)
                enter(manifest, order, "interrupted", ending.message, ending.status)
                return ending.status
            if ending.status == status.DONE:
                enter(manifest, order, "finished")
            elif several:
                fail(order, ending)
            else:
                refuse(ending.message, ending.status)
            if ending.signal and (left or order is not waiting[-1]):
                note(f"interrupted: {order.target} was the last one that was tried")
                return status.SIGNAL + ending.signal
    if failed:
        count = sum(len(lot.batch.orders) for lot in lots)
        note(f"{len(failed)} of {count} videos failed{f', see {manifest}' if manifest else ''}")
    return status.DONE if not failed else failed[0] if len(set(failed)) == 1 else status.FAILED


def is_several(lots: Sequence[Lot], command: Flags) -> bool:
    """Whether what is done is skipped, and what fails survived: for several videos, lists of prompts and job files."""
    return command.job is not None or command.data_path is not None or sum(len(lot.batch.orders) for lot in lots) > 1


def open_engine(lot: Lot) -> "Engine":
    """The engine of a lot, with weights loaded and prompts encoded."""
    engine = lot.batch.open(tell=note if lot.command.progress else lambda _: None)
    if (parts := lot.batch.parts) is not None and parts.saves_embeddings:
        note(f"{parts.embeddings}: embeddings of {len(lot.batch.prompts)} prompts")
    return engine


def render_one(order: "Order", lot: Lot, engine: "Engine", log: "Listener | None", *, goes_on: bool) -> "Ending":
    """Make one video.

    goes_on: whether a render of it that was stopped is continued.
    """
    from flexkern.render import prepare, prepare_pipe, resume
    from flexkern.render.batch import begun

    command, batch, family = lot.command, lot.batch, lot.batch.family
    watch = make_watch(command, log, order)

    def tell(text: str) -> None:
        note(text)
        watch.warn(text)

    try:
        job: Job | PipeJob
        if order.target == STDOUT:
            job = prepare_pipe(order, engine, family, sys.stdout.buffer)
        elif goes_on and begun(order.target):
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
    except Exception as error:
        ending = refusal(error, begun=begun(order.target))
        watch.failed(order.target, ending.message)
        return ending
    if batch.parts is None and not lot.told:  # of a checkpoint it was told before the weights were read
        note(str(engine.backend_choice))
        lot.told = True
    if command.progress:
        note(header(order, engine, family))
    return finish_one(job, family, watch)


def refusal(error: Exception, *, begun: bool = False) -> "Ending":
    """How a render ended that could not begin; raises the error again where it is a fault of ours.

    Args:
        error: What was raised before a picture was made.
        begun: Whether an earlier render is kept that could be gone on with.
    """
    from flexkern.render.checkpoint import is_out_of_memory, memory_words
    from flexkern.render.ending import Ending

    if is_out_of_memory(error):
        why = " ".join(memory_words(error).split())
        return Ending(status=status.CAN_RESUME if begun else status.NOTHING_KEPT, message=why, cause=error)
    if isinstance(error, BrokenPipeError) or not isinstance(error, status.BAD):
        raise error
    return Ending(status=status.REFUSED, message=str(error), cause=error)


def finish_one(job: "Job | PipeJob", family: "Family", watch: "Watch") -> "Ending":
    """Make the video of a job, and tell what was made."""
    from flexkern.render import render  # now, so that who wraps it there is heard
    from flexkern.render.ending import carry_out

    ending = carry_out(job, watch, loop=render)
    if ending.status != status.DONE:
        return ending
    order, made = job.order, job.writer.pictures
    watch.finished(order.target)
    pictures = f"{order.pictures} pictures, {order.pictures / family.fps:.1f} s"
    length = pictures if order.writes == "video" else f"{family.frames(made)} latent frames"
    print(f"{order.target}: {length}", file=sys.stderr if order.target == STDOUT else sys.stdout, flush=True)
    return ending


def header(order: "Order", engine: "Engine", family: "Family") -> str:
    """One line that says what is rendered; the size as --size has it, height first."""
    height, width = family.picture_size
    length = f"{order.pictures} pictures ({order.pictures / family.fps:g} s)"
    changed = "".join(f", {name} {value}" for name, value in order.overrides.items())
    prompts = f", {len(order.script)} prompts" if len(order.script) > 1 else ""
    what = f"{family.name}, preset {order.preset}{changed}, {height}x{width}, {length}{prompts}, seed {order.seed}"
    return f"{order.target}: {what}; backend {engine.backend_name} on {device_name(engine)}"


def device_name(engine: "Engine") -> str:
    """The device of an engine, with the model of a GPU."""
    import torch

    device = engine.model.device
    ranks = "" if engine.ranks is None else f"{engine.ranks.count} ranks, of which the first is on "
    return ranks + (f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device))


def open_log(command: Flags, model: str, ends: ExitStack) -> "Listener | None":
    """What hears of renders: the log of --log, and the figures of --metrics-port.

    Args:
        command: The flags.
        model: Its name.
        ends: Gets what closes the port.

    Raises:
        OSError: The log cannot be written, or the port is taken.
    """
    from flexkern.render import EventLog
    from flexkern.render.watch import Listeners

    found: list[Listener] = [] if command.log is None else [EventLog(command.log)]
    if command.metrics_port is not None:
        from flexkern.serve.telemetry import Telemetry

        telemetry = Telemetry(model)
        port, end = telemetry.serve(command.metrics_port)
        ends.callback(end)
        note(f"figures for Prometheus at http://127.0.0.1:{port}/metrics")
        found.append(telemetry)
    return Listeners(*found) if found else None


def make_watch(command: Flags, log: "Listener | None", order: "Order") -> "Watch":
    """What follows the render of an order. Raises ValueError for a preview that cannot be written."""
    from flexkern.render import Watch

    about = {"target": str(order.target), "seed": order.seed, "preset": order.preset, "prompt": order.script[0].prompt}
    return Watch(progress=command.progress, preview=command.preview, log=log, about=about)


def manifest_path(lots: Sequence[Lot], command: Flags) -> Path | None:
    """Where the manifest goes: to --manifest, the folder of --data-path, or beside the job file; None for one video."""
    if command.manifest is not None:
        return command.manifest
    if sum(len(lot.batch.orders) for lot in lots) == 1:
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
