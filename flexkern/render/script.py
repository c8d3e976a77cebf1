"""Scripts: prompts that change with time.

    - {at: 0, prompt: "a red disc and a blue square on dark green, fast"}
    - {at: 7.5, prompt: "a yellow disc and a cyan square on black, slow", cut: true}

or, shorter, a mapping ``seconds: prompt``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flexkern.checks import check_fields, require
from flexkern.policies import Preset

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.session import Session

SHAPE = "a list of {at: seconds, prompt: text}, or a mapping of seconds to prompts"


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
        require(bool(self.prompt.strip()), f"prompt must be a text, got {self.prompt!r}")


def read_script(path: str | Path) -> tuple[PromptSwitch, ...]:
    """The script in a YAML file, in order of time; its first prompt holds from second 0.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names the file and what is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not YAML: {getattr(error, 'problem', None) or error}{where}") from None
    try:
        return parse_script(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_script(content: Any) -> tuple[PromptSwitch, ...]:
    """The script that YAML or JSON was read to. Raises ValueError that names the entry and what is wrong in it."""
    if isinstance(content, dict):
        content = [{"at": at, "prompt": prompt} for at, prompt in content.items()]
    if not isinstance(content, list) or not content:
        raise ValueError(f"expected {SHAPE}, got {type(content).__name__ if content else 'nothing'}")
    script = []
    for number, entry in enumerate(content, start=1):
        fields = set(entry) if isinstance(entry, dict) else set()
        if not {"at", "prompt"} <= fields <= {"at", "prompt", "cut"}:
            raise ValueError(f"entry {number}: expected {{at: seconds, prompt: text}}, optionally cut, got {entry!r}")
        try:
            script.append(PromptSwitch(**entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"entry {number}: {error}") from None
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
