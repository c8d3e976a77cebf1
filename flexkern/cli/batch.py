"""Videos of one engine: what makes them, and how they are made one after the other."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.cli import status
from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import Flags
from flexkern.cli.jobs import Setting
from flexkern.cli.research import Research
from flexkern.cli.resume import saved_options, way_on
from flexkern.cli.videos import Video
from flexkern.policies import Preset

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.checkpoint import Checkpoint, Parts
    from flexkern.model.families import Family
    from flexkern.render import Job, Order

BAD = ValueError, OSError, NotImplementedError  # what a user can mend


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one command asks for, read and checked as far as that goes without torch."""

    setting: Setting[Any]
    research: Research | None
    base: Preset
    """the preset before the job's and the options' changes"""
    overrides: Mapping[str, object]
    videos: Sequence[Video]


@dataclass(slots=True, kw_only=True)
class Batch:
    """Videos of one engine."""

    setting: Setting[Any]
    family: "Family"
    device: str
    threads: int
    orders: "list[Order]"
    checkpoint: "Checkpoint | None"
    """None of the demo"""
    weights: Path | None
    """of the demo"""
    parts: "Parts | None" = None

    def open(self) -> "Engine":
        """The engine, with weights loaded and prompts encoded. Raises ValueError for a prompt it cannot follow."""
        import torch

        from flexkern.engine import Engine

        if self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)
        if self.parts is None:
            engine = open_demo(self.weights, self.command.backend, self.device)
        else:
            engine = Engine.from_parts(self.parts)
            if self.parts.saves_embeddings:
                note(f"{self.parts.embeddings}: embeddings of {len(self.prompts)} prompts")
        for prompt in self.prompts:  # one that the model cannot follow is told before the first video
            engine.embed(prompt)
        return engine

    @property
    def command(self) -> Flags:
        """The command of the first of them."""
        return self.setting.command

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(prompt for order in self.orders for prompt in order.prompts))

    def shares(self, other: "Batch") -> bool:
        """Whether one engine does for both."""
        alike = lambda one: (
            one.family, one.device, one.threads, one.checkpoint, one.weights, one.command.backend, one.command.image,
            one.command.latents is None,
        )  # fmt: skip
        return bool(alike(self) == alike(other))


def render_batch(batch: Batch) -> int:
    """Make the videos of one engine. Returns the exit status."""
    from flexkern.render import prepare

    command, family = batch.command, batch.family
    with refusing(*BAD):
        engine = batch.open()
        if command.output_folder is not None:
            command.output_folder.mkdir(parents=True, exist_ok=True)
    for order in batch.orders:
        with refusing(*BAD):
            options = saved_options(command)
            job = prepare(order, engine, family, overwrite=command.overwrite, options=options, tell=note)
        if (ended := carry_out(job, family, progress=command.progress)) != status.DONE:
            return ended
        del job  # one cache at a time
    return status.DONE


def carry_out(job: "Job", family: "Family", *, progress: bool) -> int:
    """Make the video of a job, and say how that ended. Returns the exit status."""
    from flexkern.finite import NotFiniteError
    from flexkern.render import is_out_of_memory, render, stoppable

    order = job.order
    try:
        with stoppable() as signals:
            finished = job.run(progress=progress, loop=render)
    except NotFiniteError as error:  # weights that overflow
        refuse(f"{error}; {job.kept}", status.FAILED)
    except Exception as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        why = str(error) if isinstance(error, OSError) else f"out of memory: {error or 'there is no more'}"
        refuse(f"{why}; {job.kept}{way_on(job)}", status.CAN_RESUME if job.can_resume else status.NOTHING_KEPT)
    if not finished:
        note(f"interrupted: {job.kept}{way_on(job)}")
        return status.SIGNAL + (signals[0] if signals else signal.SIGINT)
    made = job.writer.pictures
    length = f"{order.pictures} pictures, {order.pictures / family.fps:.1f} s"
    print(f"{order.target}: {length if order.writes == 'video' else f'{family.frames(made)} latent frames'}")
    return status.DONE


def validate_demo(weights: Path | None) -> None:
    """Raises ValueError where weights are not of the demo's form, FileNotFoundError where there are none."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    try:
        demo.validate_weights(weights or demo.WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}; for a checkpoint give --model {' | '.join(FAMILIES)}") from None


def open_demo(weights: Path | None, backend: str, device: str) -> "Engine":
    """The engine of the demo, or of weights of its form."""
    from flexkern import demo

    return demo.load_engine(weights or demo.WEIGHTS, backend=backend, device=device)
