"""Scripts: prompts that change with time.

    - {at: 0, prompt: "a red disc and a blue square on dark green, fast"}
    - {at: 7.5, prompt: "a yellow disc and a cyan square on black, slow", cut: true}

or, shorter, a mapping ``seconds: prompt``; or JSON, or JSON lines of the same entries. Times are seconds, or text such
as 1:30, 60s and 1m30s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.checks import check_fields, is_unicode, require
from flexkern.policies import Preset
from flexkern.render.texts import parse_time, read_data

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.session import Session

SHAPE = "a list of {at: seconds, prompt: text}, or a mapping of seconds to prompts"


class EntryError(ValueError):
    """An entry of a script that will not do; entries count from 1 in the message, from 0 in ``entry``."""

    def __init__(self, number: int, message: str):
        super().__init__(f"entry {number}: {message}")
        self.entry = number - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSwitch:
    """From the first chunk that begins ``at`` seconds or later, the video follows ``prompt``."""

    at: float
    """seconds"""
    prompt: str
    cut: bool = False
    """whether a new scene begins there"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.at >= 0, f"at must be a number of seconds >= 0, got {self.at!r}")
        validate_prompt(self.prompt)


def validate_prompt(prompt: str) -> None:
    """Raises ValueError for a prompt without words, or with half of a character, which no file and no encoder takes."""
    require(bool(prompt.strip()), f"prompt must be a text, got {prompt!r}")
    require(is_unicode(prompt), f"prompt must be text in UTF-8, got {prompt!r:.200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When a video's chunks begin, counted in pictures; a prompt takes effect with the next chunk."""

    chunk: int
    """latent frames made together"""
    first_chunk: int
    """latent frames of the first chunk"""
    per_frame: int
    """pictures that a latent frame gives, but for the first, which gives one"""
    fps: int
    """pictures per second"""

    def start(self, chunk: int) -> int:
        """The pictures that are made when a chunk begins; chunks count from 0."""
        frames = self.first_chunk + (chunk - 1) * self.chunk
        return 1 + (frames - 1) * self.per_frame if chunk else 0

    def chunk_at(self, seconds: float) -> int:
        """The first chunk that begins then or later."""
        frames = (seconds * self.fps - 1e-6 - 1) / self.per_frame + 1  # that must be made
        later = max(0, math.ceil((frames - self.first_chunk) / self.chunk - 1e-9)) + 1
        return 0 if seconds * self.fps <= 1e-6 else later

    def chunks(self, pictures: int) -> int:
        """How many chunks it takes to make so many pictures."""
        frames = 1 + -(-(pictures - 1) // self.per_frame)
        return 1 + max(0, -(-(frames - self.first_chunk) // self.chunk))


def read_script(path: str | Path) -> tuple[PromptSwitch, ...]:
    """The script in a file of YAML, JSON or JSON lines, in order of time; its first prompt holds from second 0.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names the file and what is wrong in it.
    """
    content = read_data(path, "prompt file")
    try:
        return parse_script(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_script(content: Any) -> tuple[PromptSwitch, ...]:
    """The script that YAML or JSON was read to. Raises ValueError that names the entry and what is wrong in it."""
    if isinstance(content, dict) and {"at", "prompt"} <= content.keys():
        content = [content]
    if isinstance(content, dict):
        content = [{"at": at, "prompt": prompt} for at, prompt in content.items()]
    if not isinstance(content, list) or not content:
        raise ValueError(f"expected {SHAPE}, got {type(content).__name__ if content else 'nothing'}")
    script = []
    for number, entry in enumerate(content, start=1):
        fields = set(entry) if isinstance(entry, dict) else set()
        if not {"at", "prompt"} <= fields <= {"at", "prompt", "cut"}:
            raise EntryError(number, f"expected {{at: seconds, prompt: text}}, optionally cut, got {entry!r}")
        try:
            script.append(PromptSwitch(**{**entry, "at": parse_time(entry["at"])}))
        except (TypeError, ValueError) as error:
            raise EntryError(number, str(error)) from None
    validate_script(script)
    return tuple(script)


def validate_script(script: Sequence[PromptSwitch]) -> None:
    """Raises ValueError where the first prompt is not at 0 seconds, or times do not ascend."""
    require(len(script) > 0, "a script needs at least one prompt, got none")
    times = [switch.at for switch in script]
    require(times[0] == 0, f"the first prompt must be at 0 seconds, got {times[0]}")
    require(not script[0].cut, "the first prompt cannot cut: there is nothing before it")
    for earlier, later in zip(times, times[1:], strict=False):
        require(later > earlier, f"times must ascend, got {later} after {earlier}")


def validate_cuts(preset: Preset, script: Sequence[PromptSwitch]) -> None:
    """Raises ValueError for a cut that the preset cannot follow."""
    index = preset.position.index
    if index != "slot" and (cuts := [switch.at for switch in script if switch.cut]):
        raise ValueError(f"the cut at {cuts[0]} seconds needs position.index 'slot', the preset has {index!r}")


def validate_switches(session: "Session", script: Sequence[PromptSwitch]) -> None:
    """Raises ValueError, before any work, for a prompt that the model or a cut that the preset cannot follow."""
    for switch in script:
        session.engine.encode(switch.prompt)
    validate_cuts(session.preset, script)


def validate_shown(script: Sequence[PromptSwitch], pictures: int, pace: Pace) -> None:
    """Raises ValueError for a prompt that is never shown in a video of that length, at that pace."""
    last = pace.chunks(pictures) - 1
    for switch, after in zip(script, [*script[1:], None], strict=True):
        chunk = pace.chunk_at(switch.at)
        never = f"the prompt at {switch.at:g} seconds is never shown"
        if chunk > last:
            begins = pace.start(last) / pace.fps
            length = f"{pictures} pictures, {pictures / pace.fps:g} seconds"
            raise ValueError(f"{never}: the video has {length}, and its last chunk begins at {begins:g}")
        if after is not None and pace.chunk_at(after.at) == chunk:
            takes = (pace.start(chunk + 1) - pace.start(chunk)) / pace.fps
            both = f"that at {after.at:g} begins with the same chunk"
            raise ValueError(f"{never}: {both}; a chunk takes {takes:g} seconds")


def spread(
    prompts: Sequence[str], pictures: int, pace: Pace, switches: Sequence[int] | None = None
) -> tuple[PromptSwitch, ...]:
    """The script of prompts without times.

    Args:
        prompts: In their order.
        pictures: Length of the video.
        pace: Its chunks.
        switches: The latent frames at which all but the first begin. Default: evenly, each with a chunk.

    Raises:
        ValueError: There are more prompts than chunks, or not one prompt more than switches.
    """
    if switches is None:
        chunks = pace.chunks(pictures)
        require(chunks >= len(prompts), f"{len(prompts)} prompts need as many chunks, the video has {chunks}")
        starts = [pace.start(round(i * chunks / len(prompts))) for i in range(len(prompts))]
    else:
        told = f"{len(switches)} switches are for {len(switches) + 1} prompts, got {len(prompts)}"
        require(len(switches) + 1 == len(prompts), told)
        starts = [0, *(1 + (frame - 1) * pace.per_frame for frame in switches)]
    return tuple(PromptSwitch(at=at / pace.fps, prompt=text) for at, text in zip(starts, prompts, strict=True))


def seconds_needed(script: Sequence[PromptSwitch]) -> float:
    """A length that shows the last prompt as long as the one before it; 0 where there is one prompt."""
    times = [switch.at for switch in script]
    return 2 * times[-1] - times[-2] if len(times) > 1 else 0.0
