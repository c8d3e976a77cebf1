"""The process that renders for a server: one job after the other, told and answered in lines of JSON.

``flexkern.serve.child`` has the lines. It goes when the server does, in whatever way: its input ends then. A server
that was killed and is started again has its workers wait until those before them are gone.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from flexkern.render.spec import JobSpec
from flexkern.render.target import claim
from flexkern.render.watch import EventLog, Listeners
from flexkern.serve.places import LOG, PREVIEW, THUMBNAIL

PATIENCE = 60.0  # seconds that the worker before this one has to be gone
SMALL = 320  # pixels of the longer side of a thumbnail


class Line:
    """Lines of JSON to the server; from any thread."""

    def __init__(self, stream: TextIO):
        self._stream, self._guard = stream, threading.Lock()

    def say(self, **message: Any) -> None:
        """One line. Where nobody listens, this process has no more to do."""
        with self._guard:
            try:
                self._stream.write(json.dumps(message, default=str) + "\n")
                self._stream.flush()
            except OSError:
                os._exit(1)

    def write(self, event: str, **about: Any) -> None:
        """An event of a render, as a listener hears it."""
        self.say(event={"event": event, **about})


class Inbox:
    """What the server says, read by a thread of its own, which ends the process when there is no more."""

    def __init__(self, stream: TextIO):
        self.jobs: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self.stopped: set[str] = set()
        self._stream = stream
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            message = json.loads(line)
            if "run" in message:
                self.jobs.put(message["run"])
            elif "stop" in message:
                self.stopped.add(message["stop"])
        os._exit(0)


def work(run: Callable[..., Any], inbox: Inbox, line: Line) -> None:
    """Make videos for ever.

    Args:
        run: ``flexkern.render.worker.Worker.run``.
        inbox: Jobs.
        line: Answers.
    """
    line.say(ready={"pid": os.getpid()})
    while True:
        job = inbox.jobs.get()
        identity, spec = job["id"], JobSpec.from_dict(job["spec"])
        assert spec.out is not None, "the server names the file"
        folder = spec.out.parent
        outcome = run(
            spec,
            stop=lambda: identity in inbox.stopped,  # noqa: B023
            preview=folder / PREVIEW,
            log=Listeners(EventLog(folder / LOG), line),
        )
        inbox.stopped.discard(identity)
        if outcome.status == "done":
            with suppress(Exception):  # a video without a small picture is a video
                write_thumbnail(spec.out, folder / THUMBNAIL)
            with suppress(OSError):
                (folder / PREVIEW).unlink(missing_ok=True)
        line.say(outcome={"status": outcome.status, "code": outcome.code, "message": outcome.message})


def write_thumbnail(video: Path, target: Path) -> None:
    """Write a small JPEG of a video's first picture. Raises OSError, or what reads the video does."""
    from flexkern.render.writer import load_av

    with video.open("rb") as opened, load_av().open(opened) as film:
        picture = next(film.decode(video=0)).to_image()
    picture.thumbnail((SMALL, SMALL))
    growing = target.with_name(f"unfinished-{target.name}")
    picture.save(growing, quality=85)
    growing.replace(target)


def claim_place(root: Path, index: int) -> FileIO:
    """The lock of a worker, once the process that had it is gone.

    Raises:
        BlockingIOError: It does not go.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return claim(root / f"worker-{index}.lock", root)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def private_output() -> TextIO:
    """What was stdout, for lines alone; whatever else is printed goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main(root: str, index: str, device: str, threads: str, every: str) -> None:
    """Begin to work for the server of a folder, as the worker of a number."""
    line = Line(private_output())
    place = claim_place(Path(root), int(index))
    inbox = Inbox(sys.stdin)

    from flexkern.render.worker import Worker

    tell = lambda text: print(text, file=sys.stderr, flush=True)
    worker = Worker(device=device or None, threads=int(threads), every=float(every), tell=tell)
    work(worker.run, inbox, line)
    place.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
