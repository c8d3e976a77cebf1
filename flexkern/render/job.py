"""The loop from a session to a file, and prompts that change with time.

    - {at: 0, prompt: "a red disc and a blue square on dark green, fast"}
    - {at: 7.5, prompt: "a yellow disc and a cyan square on black, slow", cut: true}

or, shorter, a mapping ``seconds: prompt``.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from flexkern.policies import Preset
from flexkern.render.latents import LatentsFile
from flexkern.render.writer import VideoWriter

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.engine import Chunk, Session

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} pictures [{elapsed}<{remaining}, {rate_noinv_fmt}]"
SHAPE = "a list of {at: seconds, prompt: text}, or a mapping of seconds to prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSwitch:
    """From the first chunk that begins ``at`` seconds or later, the video follows ``prompt``; cut: to a new scene."""

    at: float
    prompt: str
    cut: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.at, int | float) and not isinstance(self.at, bool)
        if not number or not math.isfinite(self.at) or self.at < 0:
            raise ValueError(f"at must be a number of seconds >= 0, got {self.at!r}")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a text, got {self.prompt!r}")
        if not isinstance(self.cut, bool):
            raise ValueError(f"cut must be true or false, got {self.cut!r}")


def read_schedule(path: str | Path) -> tuple[PromptSwitch, ...]:
    """The prompts of a YAML file, in order; the first holds from second 0.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
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
        return _schedule(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _schedule(content: Any) -> tuple[PromptSwitch, ...]:
    if isinstance(content, dict):
        content = [{"at": at, "prompt": prompt} for at, prompt in content.items()]
    if not isinstance(content, list) or not content:
        raise ValueError(f"expected {SHAPE}, got {type(content).__name__ if content else 'nothing'}")
    switches = []
    for number, entry in enumerate(content, start=1):
        fields = set(entry) if isinstance(entry, dict) else set()
        if not {"at", "prompt"} <= fields <= {"at", "prompt", "cut"}:
            raise ValueError(f"entry {number}: expected {{at: seconds, prompt: text}}, optionally cut, got {entry!r}")
        try:
            switches.append(PromptSwitch(**entry))
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
    times = [switch.at for switch in switches]
    if times[0] != 0:
        raise ValueError(f"the first prompt must be at 0 seconds, got {times[0]}")
    if switches[0].cut:
        raise ValueError("the first prompt cannot cut: there is nothing before it")
    for earlier, later in zip(times, times[1:], strict=False):
        if later <= earlier:
            raise ValueError(f"times must ascend, got {later} behind {earlier}")
    return tuple(switches)


def check_switches(session: "Session", switches: Sequence[PromptSwitch]) -> None:
    """Raises ValueError, before any work, for a prompt that the model or a cut that the preset cannot follow."""
    for switch in switches:
        session.engine.encode(switch.prompt)
    check_cuts(session.preset, switches)


def check_cuts(preset: Preset, switches: Sequence[PromptSwitch]) -> None:
    """Raises ValueError for a cut that the preset cannot follow."""
    index = preset.position.index
    if index != "slot" and (cuts := [switch.at for switch in switches if switch.cut]):
        raise ValueError(f"the cut at {cuts[0]} seconds needs position.index 'slot', the preset has {index!r}")


def render(
    session: "Session", writer: VideoWriter | LatentsFile, *, pictures: int, switches: Sequence[PromptSwitch] = (),
    progress: bool = True, start: "Chunk | None" = None,
) -> bool:  # fmt: skip
    """Write ``pictures`` pictures of the session's video, wherever its chunks end; False where Ctrl-C came first.

    switches: in ascending order. progress: a bar on stderr. start: what the session was prefilled with; written first.
    Memory does not grow with the length of the video.
    """
    made, waiting = 0, list(switches)
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    options = {"bar_format": BAR, "mininterval": seconds, "disable": not progress}
    with tqdm(total=pictures, desc="chunk 0", unit=" pictures", **options) as bar:
        try:
            if start is not None:
                made += _write(writer, start, pictures)
                bar.update(made)
            while made < pictures:
                due = [switch for switch in waiting if switch.at * writer.fps <= made + 1e-6]
                if due:
                    session.switch(due[-1].prompt)
                    if any(switch.cut for switch in due):
                        session.cut()
                    waiting = waiting[len(due) :]
                chunk = session.step()
                new = _write(writer, chunk, pictures - made)
                made += new
                bar.set_description_str(f"chunk {chunk.index + 1}", refresh=False)
                bar.update(new)
        except KeyboardInterrupt:
            return False
    return True


def _write(writer: VideoWriter | LatentsFile, chunk: "Chunk", most: int) -> int:
    """Append at most so many pictures of the chunk. Returns how many."""
    before = writer.pictures
    if isinstance(writer, LatentsFile):
        writer.write(chunk.latents[0], most)
    else:
        writer.write(chunk.pixels[0, :most].cpu().numpy())
    return min(most, writer.pictures - before)
