"""A video as the API tells of it, and the log of its render."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexkern.checks import json_text
from flexkern.serve import shapes
from flexkern.serve.served import as_script
from flexkern.serve.store import VideoJob


def describe(job: VideoJob, *, position: int | None) -> shapes.Video:
    """What a client reads of a video. Nothing of it is a path.

    Args:
        job: The video.
        position: How many are before it; None where it does not wait.
    """
    spec = job.spec
    script = as_script(spec)
    first = script[0]
    share = 100 if job.status == "completed" else min(99, 100 * job.made // job.pictures)
    return shapes.Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=share,
        created_at=int(job.created),
        completed_at=None if job.completed is None else int(job.completed),
        started_at=None if job.started is None else int(job.started),
        render_seconds=job.render_seconds,
        prompt=first if isinstance(first, str) else first["prompt"],
        prompts=script if len(script) > 1 else [],
        seconds=f"{job.pictures / job.rate:.6f}".rstrip("0").rstrip("."),
        size=job.size,
        error=None if job.error is None else shapes.VideoError(**job.error),
        preset=spec["preset"],
        overrides=spec.get("overrides", {}),
        seed=spec.get("seed", 0),
        fps=spec.get("encoding", {}).get("fps") or job.rate,
        frames=job.pictures,
        made=job.made,
        position=position,
    )


def read_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """The events of a log, in their order; lines that a kill has torn are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def sse(kind: str, content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json_text(content)}\n\n".encode()
