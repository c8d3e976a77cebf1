"""From an order to a video file: what is ordered, the job that makes it, and the writers that it fills."""

from flexkern.render.job import Job, prepare, render, run
from flexkern.render.latents import LatentsFile, validate_latents_target
from flexkern.render.order import Order
from flexkern.render.prompts import PromptList, read_prompts
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
from flexkern.render.writer import VideoWriter, validate_target

__all__ = [
    "Job",
    "LatentsFile",
    "Order",
    "Pace",
    "PromptList",
    "PromptSwitch",
    "VideoWriter",
    "parse_script",
    "prepare",
    "read_prompts",
    "read_script",
    "render",
    "run",
    "seconds_needed",
    "spread",
    "validate_cuts",
    "validate_latents_target",
    "validate_script",
    "validate_shown",
    "validate_switches",
    "validate_target",
]
