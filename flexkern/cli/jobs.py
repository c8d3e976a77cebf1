"""From a job file to commands: one for each of its jobs, with the options that stand beside the file in their place."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from flexkern.checks import require
from flexkern.cli.errors import note
from flexkern.cli.flags import OUTPUTS, Flags
from flexkern.render.assembly import Shown, in_fields
from flexkern.render.choices import flag
from flexkern.render.encoding import Encoding
from flexkern.render.jobfile import JobEntry, read_jobs
from flexkern.render.research import LENGTHS, SHOWN
from flexkern.render.spec import JobSpec

C = TypeVar("C", bound=Flags)
GROUPS = (LENGTHS, SHOWN, OUTPUTS, ("ema", "no_ema"))  # of options that exclude each other: one takes the place of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting(Generic[C]):
    """One command, and what options cannot say of it."""

    command: C
    inline: Shown | None = None
    """prompts that stand in a job file"""
    overrides: Mapping[str, object] | None = None
    """fields of the preset, where a job says them"""
    where: str | None = None
    """file and line of the job"""

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Errors of the block name the job, and its fields in place of options."""
        try:
            yield
        except (ValueError, OSError, NotImplementedError) as error:
            if self.where is None or isinstance(error, BrokenPipeError):
                raise
            said = in_fields(str(error))
            file = self.where.partition(", line")[0]
            prefix = "" if said.startswith(f"{file}, line") else f"{self.where}: "
            raise ValueError(f"{prefix}{said}") from None


def read_settings(command: C) -> list[Setting[C]]:
    """The commands of the job file, or the one that the options are where there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names file and line of what is wrong in it.
    """
    if command.job is None:
        return [Setting(command=command)]
    entries = read_jobs(command.job)
    beside = sorted(name for name in command.named if name in JOBS or "." in name)
    if beside:
        note(f"{command.job}: options take the place of what it says: {', '.join(map(flag, beside))}")
    return [_setting(command, entry) for entry in entries]


JOBS = {f.name for f in fields(JobSpec)} | {"no_ema"} | {f.name for f in fields(Encoding)}


def _setting(command: C, entry: JobEntry) -> Setting[C]:
    """The command of one job."""
    spec, made = entry.spec, copy.copy(command)
    taken = {name for group in GROUPS if set(group) & command.named for name in group} | command.named
    said = {f.name: getattr(spec, f.name) for f in fields(spec)}
    said |= {"ema": spec.ema is True, "no_ema": spec.ema is False}
    said |= {f.name: getattr(spec.encoding, f.name) for f in fields(spec.encoding)}
    for name in ("prompts", "overrides", "encoding"):
        del said[name]
    for name, value in said.items():
        if name not in taken:
            setattr(made, name, value)
    made.job = None
    inline = None
    if spec.prompts and not set(SHOWN) & command.named:
        inline = Shown(source=entry.where("prompts"), script=spec.script, prompts=spec.texts)
        made.prompts = command.job  # it is what is read
    require(bool(made.out or made.latents), f"{entry.where()}: a job needs out or latents, the file to write")
    return Setting(command=made, inline=inline, overrides=spec.overrides, where=entry.where())
