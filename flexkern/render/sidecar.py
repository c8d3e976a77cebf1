"""What a finished video says of itself: ``film.mp4.json`` beside ``film.mp4``, and two tags inside it.

flexkern      version                         job      the job, to be rendered again; files: what it read
order         what was ordered                video    name, bytes, sha256, pictures, rate
decided_by    what decides the bits: device, backend, versions, weights
timings       of the process that finished it
history       where it went on after a stop, and what then was not as it had been
"""

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from flexkern import __version__
from flexkern.render.encoding import is_sequence
from flexkern.render.order import Order
from flexkern.render.target import beside, sequence, write_json
from flexkern.render.watch import now

FORMAT = 1
SAMPLES = 64  # of a file
SAMPLE = 1 << 16  # bytes
TITLE = 200  # characters


def sidecar_path(target: Path) -> Path:
    """Where the sidecar of a video is: film.mp4.json beside film.mp4, shots/%06d.png.json beside shots/000000.png.

    A name that leaves no room for those five bytes is shortened, as those of unfinished files are.
    """
    return beside(target, target.name, ".json")


def describe(
    record: Mapping[str, Any],
    order: Order,
    fps: int | Fraction,
    timings: Mapping[str, float],
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a sidecar; the video is there.

    Args:
        record: Of the render, see ``flexkern.render.record``.
        order: What was ordered.
        fps: Pictures per second of the file.
        timings: Of this process, in seconds.
        notes: What else there is to say, by name.

    Bytes: reads the video once.
    """
    target, history = order.target, list(record["history"])
    return {
        "format": FORMAT,
        "flexkern": __version__,
        **record["about"],
        "order": record["order"],
        "video": describe_video(target, order.pictures, fps),
        "decided_by": record["identity"],
        "timings": {"ended": now(), **timings},
        "history": history,
        "resumed_anyway": any(entry["anyway"] for entry in history),
        **(notes or {}),
    }


def describe_video(target: Path, pictures: int, fps: int | Fraction) -> dict[str, Any]:
    """What a sidecar says of the file itself, or of all files of a sequence.

    Args:
        target: The video; it is there.
        pictures: How many it has.
        fps: How many of them a second.

    Bytes: reads the video once.
    """
    files = files_of(target)
    size = sum(path.stat().st_size for path in files)
    return {
        "name": target.name, "bytes": size, "sha256": file_hash(*files), "pictures": pictures, "fps": str(fps),
    }  # fmt: skip


def write_sidecar(target: Path, content: Mapping[str, Any]) -> None:
    """The sidecar of a video holds this, or what it held before. Raises OSError where there is no room."""
    write_json(sidecar_path(target), content)


def read_sidecar(target: Path) -> dict[str, Any] | None:
    """What the sidecar of a video says, None where there is none that can be read."""
    try:
        content = json.loads(sidecar_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def is_done(order: Order, about: Mapping[str, Any]) -> bool:
    """Whether the target of an order is a finished video of just this order, unchanged since.

    What decides the bits besides, such as the device, does not count: the video is what was asked for.

    Args:
        order: What is wanted.
        about: What the sidecar would say besides: ``model`` and ``files`` count, paths do not.

    Bytes: reads the video once.
    """
    said = read_sidecar(order.target)
    if said is None:
        return False
    try:
        wanted, had = order.to_dict(), said["order"]
        same = {**had, "target": None, "image": None} == {**_as_json(wanted), "target": None, "image": None}
        same = same and said.get("model") == _as_json(about.get("model"))
        same = same and _contents(said.get("files")) == _contents(about.get("files"))
    except (KeyError, TypeError, AttributeError):
        return False
    return bool(same) and is_whole(order.target)


def is_whole(target: Path) -> bool:
    """Whether a video is there and has the bytes that its sidecar tells.

    Bytes: reads the video once.
    """
    said, files = read_sidecar(target), files_of(target)
    if said is None or not files or not all(path.is_file() for path in files):
        return False
    try:
        size, video = sum(path.stat().st_size for path in files), said["video"]
        return bool(size == video["bytes"] and file_hash(*files) == video["sha256"])
    except (KeyError, TypeError):
        return False


def tags(order: Order, model: str) -> dict[str, str]:
    """Prompt, seed and preset as tags of an MP4: no date, no version, so that equal renders have equal bytes."""
    first, *later = (switch.prompt for switch in order.script)
    more = f" (and {len(later)} more prompts)" if later else ""
    title = first if len(first) <= TITLE else f"{first[: TITLE - 4]} ..."
    changed = "".join(f", {name} {value}" for name, value in sorted(order.overrides.items()))
    return {"title": f"{title}{more}", "comment": f"seed {order.seed}, preset {order.preset}{changed}, model {model}"}


def fingerprint(path: Path) -> dict[str, Any]:
    """Path, size and a hash of samples of a file, or of all files of a folder: cheap, and no proof of each byte."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    found, size = hashlib.sha256(), 0
    for file in files:
        length = file.stat().st_size
        size += length
        found.update(f"{file.relative_to(path)} {length}\n".encode())
        with file.open("rb") as opened:
            for number in range(SAMPLES):
                at = max(0, length - SAMPLE) * number // (SAMPLES - 1)
                opened.seek(at)
                found.update(opened.read(SAMPLE))
                if length <= SAMPLE:
                    break
    return {"path": str(path.absolute()), "bytes": size, "samples_sha256": found.hexdigest()}


def files_of(target: Path) -> list[Path]:
    """The files of a video: itself, or every picture of a sequence."""
    return sequence(target) if is_sequence(target) else [target]


def file_hash(*paths: Path) -> str:
    """The SHA-256 of a file, or of several as if they were one."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _contents(files: Any) -> Any:
    """Files without their paths."""
    return {name: {**one, "path": None} for name, one in (files or {}).items()}


def _as_json(content: Any) -> Any:
    return json.loads(json.dumps(content))
