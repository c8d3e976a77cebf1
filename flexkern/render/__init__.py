"""From an order to a video file: what is ordered, the job that makes it, and the writers that it fills.

A name is imported from its module when it is first asked for: a script is read without the encoder, and without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkern.render.checkpoint import is_out_of_memory
    from flexkern.render.encoding import Encoding
    from flexkern.render.job import Job, prepare, run
    from flexkern.render.jobfile import JobEntry, read_jobs
    from flexkern.render.latents import LatentsFile, validate_latents_target
    from flexkern.render.loop import render
    from flexkern.render.order import Order
    from flexkern.render.outputs import PipeWriter, SequenceWriter, validate_form, validate_output
    from flexkern.render.pipe import PipeJob, prepare_pipe
    from flexkern.render.prompts import PromptList, read_prompts
    from flexkern.render.schema import job_schema
    from flexkern.render.script import (
        Pace,
        PromptSwitch,
        parse_script,
        read_script,
        seconds_needed,
        spread,
        validate_cuts,
        validate_script,
        validate_shown,
        validate_switches,
    )
    from flexkern.render.sidecar import is_done, is_whole, read_sidecar, sidecar_path
    from flexkern.render.signals import stoppable
    from flexkern.render.spec import JobSpec, SpecError
    from flexkern.render.stopped import Stopped, clear_parts, find_stopped, resume
    from flexkern.render.target import validate_new
    from flexkern.render.watch import EventLog, Watch, validate_preview
    from flexkern.render.worker import Outcome, Progress, Worker
    from flexkern.render.writer import VideoWriter, validate_encoder, validate_target

__all__ = [
    "Encoding",
    "EventLog",
    "Job",
    "JobEntry",
    "JobSpec",
    "LatentsFile",
    "Order",
    "Outcome",
    "Pace",
    "PipeJob",
    "PipeWriter",
    "Progress",
    "PromptList",
    "PromptSwitch",
    "SequenceWriter",
    "SpecError",
    "Stopped",
    "VideoWriter",
    "Watch",
    "Worker",
    "clear_parts",
    "find_stopped",
    "is_done",
    "is_whole",
    "is_out_of_memory",
    "job_schema",
    "parse_script",
    "prepare",
    "prepare_pipe",
    "read_jobs",
    "read_prompts",
    "read_script",
    "read_sidecar",
    "render",
    "resume",
    "run",
    "seconds_needed",
    "sidecar_path",
    "spread",
    "stoppable",
    "validate_cuts",
    "validate_encoder",
    "validate_form",
    "validate_latents_target",
    "validate_new",
    "validate_output",
    "validate_preview",
    "validate_script",
    "validate_shown",
    "validate_switches",
    "validate_target",
]

_HOMES = {  # module: what it holds
    "checkpoint": ("is_out_of_memory",),
    "encoding": ("Encoding",),
    "job": ("Job", "prepare", "run"),
    "jobfile": ("JobEntry", "read_jobs"),
    "latents": ("LatentsFile", "validate_latents_target"),
    "loop": ("render",),
    "order": ("Order",),
    "outputs": ("PipeWriter", "SequenceWriter", "validate_form", "validate_output"),
    "pipe": ("PipeJob", "prepare_pipe"),
    "prompts": ("PromptList", "read_prompts"),
    "schema": ("job_schema",),
    "script": (
        "Pace",
        "PromptSwitch",
        "parse_script",
        "read_script",
        "seconds_needed",
        "spread",
        "validate_cuts",
        "validate_script",
        "validate_shown",
        "validate_switches",
    ),
    "sidecar": ("is_done", "is_whole", "read_sidecar", "sidecar_path"),
    "signals": ("stoppable",),
    "spec": ("JobSpec", "SpecError"),
    "stopped": ("Stopped", "clear_parts", "find_stopped", "resume"),
    "target": ("validate_new",),
    "watch": ("EventLog", "Watch", "validate_preview"),
    "worker": ("Outcome", "Progress", "Worker"),
    "writer": ("VideoWriter", "validate_encoder", "validate_target"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"flexkern.render.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
