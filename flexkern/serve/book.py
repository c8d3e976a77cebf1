"""What a fleet keeps on disk: the jobs that it was given, and a manifest of what became of them.

The jobs stay in their file; held in memory is where each begins. The manifest is only ever appended to, a line when a
try begins and one when it ends, so that its bytes, and the time to write them, grow with the tries and no faster:

    time, job (its line), id, target, outcome (started, done, again, failed, stopped, interrupted), worker, tries,
    pictures, seconds; why, of what is not done
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flexkern.checks import require
from flexkern.render.assembly import sharing_key
from flexkern.render.encoding import STDOUT, is_sequence
from flexkern.render.spec import JobSpec, SpecError
from flexkern.render.target import write_json
from flexkern.render.texts import read_json

SHOWN = 8  # lines that an error names at most
DIGEST = 8  # bytes of a job's identity


def read_line(text: str, number: int, jobs: Path, folder: Path) -> JobSpec:
    """The job of a line, with files that it reads as its own file names them, and its output inside a folder.

    Args:
        text: The line.
        number: Of the job, from 0, which names an output that is not named.
        jobs: The file.
        folder: Where outputs go.

    Raises:
        ValueError: Says what will not do.
    """
    try:
        content = read_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', None) or error}") from None
    require(isinstance(content, dict), f"a job must be a mapping of fields, got {text.strip()[:60]!r}")
    if "out" not in content and "latents" not in content:
        content["out"] = f"{number:06}.mp4"
    for name in ("out", "latents"):
        value = content.get(name)
        if isinstance(value, str) and value:  # what is no name is refused with the other fields
            require(value != str(STDOUT), "a fleet writes files, not to stdout: give a name as out")
            inside = not Path(value).is_absolute() and ".." not in Path(value).parts
            require(inside and value[0] != "~", f"{name} must be inside the folder of --out, got {value!r}")
            content[name] = str(folder / value)
    return JobSpec.from_dict(content, jobs.parent)


def validate_job_file(path: Path) -> None:
    """Raises FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no job file {path}")


def identity(spec: JobSpec, folder: Path) -> bytes:
    """What tells a job from others: all that it says but the device and the threads."""
    said = spec.to_dict() | {
        "out": str(spec.target.relative_to(folder)),
        "latents": None,
        "device": None,
        "threads": None,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()[:DIGEST]


class Jobs:
    """The jobs of a file of JSON lines, each read when it is wanted.

    Bytes: 28 for each job, and the file stays open.

    Attributes:
        path: The file.
        keys: A number for each job, equal for those that share a model.
    """

    def __init__(self, path: Path, folder: Path, *, check: Callable[[JobSpec], None] = lambda _: None):
        """Every line has been read and checked.

        Args:
            path: The file.
            folder: Where outputs go.
            check: Raises ValueError or OSError where a job will not do.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Names the line of the first job that will not do, and those of others.
        """
        validate_job_file(path)
        self.path, self._folder = path, folder
        self._file: BinaryIO = path.open("rb")
        self._starts, self._lines, self.keys = array("q"), array("l"), array("l")
        self._identities = bytearray()
        found: dict[str, int] = {}
        targets: dict[str, int] = {}
        wrong: list[tuple[int, str]] = []
        for line, start, text in _filled(self._file):
            try:
                spec = read_line(text, len(self._starts), path, folder)
                target = str(spec.target)
                before = targets.setdefault(target, line)
                require(before == line, f"{target} is what line {before} writes, too")
                check(spec)
            except (ValueError, OSError) as error:
                said = f"{error.field}: {error}" if isinstance(error, SpecError) and error.field == "" else str(error)
                wrong.append((line, said))
                spec = None
            self._starts.append(start)
            self._lines.append(line)
            self.keys.append(-1 if spec is None else found.setdefault(sharing_key(spec), len(found)))
            self._identities += bytes(DIGEST) if spec is None else identity(spec, folder)
        if wrong:
            others = ", ".join(str(line) for line, _ in wrong[1:SHOWN])
            more = f" ({len(wrong) - 1} more will not do: line {others}{' ...' if len(wrong) > SHOWN else ''})"
            raise ValueError(f"{path}, line {wrong[0][0]}: {wrong[0][1]}{more if others else ''}")
        require(bool(self._starts), f"{path} holds no job: expected a line of JSON for each, with prompt and seconds")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> JobSpec:
        """The job of that number, from 0."""
        self._file.seek(self._starts[number])
        return read_line(self._file.readline().decode(), number, self.path, self._folder)

    def line(self, number: int) -> int:
        """The line that a job stands in, from 1."""
        return self._lines[number]

    def id(self, number: int) -> str:
        """What tells the job from others, in hexadecimal digits."""
        return self._identities[number * DIGEST : (number + 1) * DIGEST].hex()


def _filled(file: BinaryIO) -> Iterator[tuple[int, int, str]]:
    """Number from 1, start in bytes and text of each line that is not empty."""
    start = 0
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            text = "\ufffd"
        if text.strip():
            yield number, start, text
        start += len(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a manifest says last of a job."""

    time: str
    outcome: str
    tries: int
    pictures: int


def read_manifests(folder: Path) -> dict[str, Past]:
    """The last word on each job, by its id, of all manifests in a folder; torn lines are left out."""
    past: dict[str, Past] = {}
    for path in sorted(folder.glob("manifest*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    said = json.loads(line)
                    word = Past(**{name: said[name] for name in ("time", "outcome", "tries", "pictures")})
                    if said["id"] not in past or past[said["id"]].time <= word.time:
                        past[said["id"]] = word
                except (ValueError, KeyError, TypeError):
                    continue
    return past


def status_path(folder: Path, number: int) -> Path:
    """Where the status of a job is; a thousand to a folder."""
    return folder / "status" / f"{number // 1000:03}" / f"{number:06}.json"


def write_status(path: Path, **said: Any) -> None:
    """The file says this, or what it said before. Raises OSError where there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, said)


def is_there(target: Path) -> bool:
    """Whether the file of a finished job is there still; of a sequence, its sidecar."""
    return target.with_name(f"{target.name}.json").is_file() and (is_sequence(target) or target.is_file())
