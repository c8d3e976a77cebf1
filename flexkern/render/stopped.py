"""To go on with a render that was stopped, from its last good checkpoint, bit for bit.

What a checkpoint was made with is compared with what is there now. Where they differ, the video would not be the one
that was begun: that is refused, and said, unless it is wanted anyway.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.render.checkpoint import EVERY, Checkpoints, Damaged, read_checkpoint
from flexkern.render.identity import differences, identity
from flexkern.render.job import Job, begin_file, begin_session, begin_with
from flexkern.render.loop import Filled
from flexkern.render.order import Order
from flexkern.render.parts import Parts, checkpoints, made_at
from flexkern.render.record import Record, read_record, went_on
from flexkern.render.target import JOB, parts_name
from flexkern.state import State, within

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.families import Family
    from flexkern.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A render that was stopped, and what there is to go on with."""

    record: Record
    """what it was begun with"""
    changed: str | None = None
    """why the record in its folder is not to be trusted; ``record`` is then that of a checkpoint"""

    @property
    def done(self) -> bool:
        """Whether the file is whole, and its parts are only to be removed."""
        return bool(self.record["done"])

    @property
    def order(self) -> Order:
        """What was ordered."""
        return Order.from_dict(self.record["order"])


def find_stopped(target: str | Path) -> Stopped:
    """The render to a file that was stopped.

    Raises:
        FileNotFoundError: None was, or it is over.
        ValueError: What is left of it says nowhere what was rendered.
    """
    try:
        return Stopped(record=read_record(target))
    except (FileNotFoundError, ValueError) as error:
        for path in checkpoints(parts_name(target)):
            try:
                record = read_checkpoint(path)["record"]
            except (Damaged, KeyError):
                continue
            changed = str(error) if isinstance(error, ValueError) else f"{parts_name(target) / JOB} is not there"
            return Stopped(record=record, changed=changed)
        if isinstance(error, ValueError):
            raise ValueError(
                f"{error}; there is no checkpoint that says what it held. --overwrite begins anew"
            ) from None
        raise


def clear_parts(target: str | Path) -> None:
    """What a render that was stopped left is gone. Raises BlockingIOError where it goes on."""
    parts = Parts(target)
    parts.clear()
    parts.release()


def resume(
    target: str | Path,
    engine: "Engine",
    family: "Family",
    *,
    order: Order | None = None,
    anyway: bool = False,
    every: float = EVERY,
    tell: Callable[[str], None] = warnings.warn,
) -> Job:
    """The job that goes on with a render, from its newest checkpoint that is whole; no picture is made.

    Args:
        target: The file that was being rendered.
        engine: What made it.
        family: How the engine's latents become pictures.
        order: What is expected to have been ordered. Default: whatever was.
        anyway: Whether to go on where something is not as it was; the job's record then says what.
        every: Seconds between two checkpoints; 0 for one after every chunk.
        tell: Hears what the user should know.

    Raises:
        FileNotFoundError: There is nothing to go on with.
        FileExistsError: The file is whole.
        BlockingIOError: Another render is writing the file.
        ValueError: Says what is damaged, or not as it was, and what would go on anyway.
        OSError: A file cannot be read or written.
    """
    stopped = find_stopped(target)
    if stopped.done:
        raise FileExistsError(f"{target} is whole: there is nothing to go on with")
    ordered = replace(stopped.order, target=Path(target))
    wanted = ordered if order is None else replace(order, target=Path(target))
    wanted.validate_files()
    now = identity(engine, wanted.prompts, writes=wanted.writes)
    changed = [stopped.changed] if stopped.changed else []
    changed += differences(_flat(ordered), _flat(wanted))
    session = begin_session(wanted, engine, family)
    parts = Parts(target)
    try:
        unusable: list[str] = []
        for path in checkpoints(parts.folder):
            writer, made = begin_file(wanted, family, parts), made_at(path)
            try:
                state = _read(path, stopped.record["id"])
                record, followed = state["record"], state["followed"]
                told = [*changed, *differences(record["identity"], now)]
                _validate(told, f"{target}: {{}}; --resume-anyway goes on from picture {made}", anyway)
                _restore(session, writer, state, target)
                break
            except Damaged as error:
                writer.stop()
                unusable.append(str(error))
            except BaseException:
                writer.stop()
                raise
        else:
            writer, made, followed, record = begin_file(wanted, family, parts), 0, 0, stopped.record
            told = [*changed, *unusable, *differences(record["identity"], now)]
            _validate(told, f"{target}: {{}}; --resume-anyway begins again with the first picture", anyway)
            if session.next_frame:  # it got a state whose file was then found damaged
                del session  # one cache at a time
                session = begin_session(wanted, engine, family)
        if unusable and made:
            tell(f"{target}: {'; '.join(unusable)}: it goes on from the checkpoint before, at picture {made}")
        if not made:
            tell(f"{target}: there is no checkpoint to go on from: it begins again with the first picture")
        for path in checkpoints(parts.folder):
            if made_at(path) > made:
                path.unlink()  # it would pass for newer than those that follow
    except BaseException:
        parts.release()
        raise
    last = stopped.record if not stopped.changed else record
    return Job(
        order=wanted,
        session=session,
        writer=writer,
        fps=family.fps,
        start=None if made else begin_with(wanted, session, family),
        parts=parts,
        checkpoints=Checkpoints(parts, every=every, tell=tell, pictures=made),
        record=went_on(last | {"order": wanted.to_dict()}, picture=made, identity=now, differs=told),
        followed=followed,
    )


def _read(path: Path, render: str) -> State:
    """The state of a checkpoint. Raises Damaged where it is none, or is of another render."""
    state = read_checkpoint(path)
    try:
        own = state["record"]["id"] == render and isinstance(state["followed"], int)
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path.name} lacks {error}") from None
    if not own:
        raise Damaged(f"{path.name} is of another render")
    return state


def _validate(differs: list[str], message: str, anyway: bool) -> None:
    """Raises ValueError where something differs, unless that is wanted."""
    if differs and not anyway:
        raise ValueError(message.format("; ".join(differs)))


def _restore(session: "Session", writer: Filled, state: State, target: str | Path) -> None:
    """Raises Damaged where the file's parts are not those of the state, ValueError where the session is of another."""
    try:
        session.restore(within("session", state))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{target} cannot go on: {error}") from None
    try:
        writer.restore(within("writer", state))
    except ValueError as error:
        raise Damaged(str(error)) from None


def _flat(order: Order) -> dict[str, Any]:
    """What was ordered, by name; but not where it goes."""
    return {f"order.{name}": value for name, value in order.to_dict().items() if name != "target"}
