"""From a session to a video file: the writer, the loop that feeds it, and prompts that change with time."""

from flexkern.render.job import PromptSwitch, check_cuts, check_switches, read_schedule, render
from flexkern.render.latents import LatentsFile, check_latents_target
from flexkern.render.writer import VideoWriter, check_target

__all__ = [
    "LatentsFile",
    "PromptSwitch",
    "VideoWriter",
    "check_cuts",
    "check_latents_target",
    "check_switches",
    "check_target",
    "read_schedule",
    "render",
]
