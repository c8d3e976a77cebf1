"""From an order to a video file: what is ordered, the job that makes it, and the writers that it fills."""

from flexkern.render.job import Job, prepare, render, run
from flexkern.render.latents import LatentsFile, validate_latents_target
from flexkern.render.order import Order
from flexkern.render.script import (
    PromptSwitch,
    parse_script,
    read_script,
    validate_cuts,
    validate_script,
    validate_switches,
)
from flexkern.render.signals import stoppable
from flexkern.render.writer import VideoWriter, validate_encoder, validate_target

__all__ = [
    "Job",
    "LatentsFile",
    "Order",
    "PromptSwitch",
    "VideoWriter",
    "parse_script",
    "prepare",
    "read_script",
    "render",
    "run",
    "stoppable",
    "validate_cuts",
    "validate_encoder",
    "validate_latents_target",
    "validate_script",
    "validate_switches",
    "validate_target",
]
