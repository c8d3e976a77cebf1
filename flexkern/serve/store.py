"""The videos of a server, each a folder; what is said of them outlives the process.

    lock                         held by the server
    jobs/video_0123.../job.json  what is asked for, and what became of it; written whole
    jobs/video_0123.../          the video, its sidecar, its log, and what a render needs to go on

Ids are made here and have one form; what is not of that form names nothing. A video that is deleted is marked first, so
that a process that is killed between the two leaves nothing that comes back.
"""

import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexkern.render.target import claim, write_json
from flexkern.serve.errors import not_found
from flexkern.serve.places import JOBS, LOCK, RECORD, VIDEO
from flexkern.serve.shapes import STATUSES, Status

FORMAT = 1
FORM = re.compile(r"video_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoJob:
    """A video that was asked for."""

    id: str
    created: float
    """seconds since 1970"""
    spec: Mapping[str, Any]
    """the job, as ``JobSpec.to_dict`` gives it"""
    model: str
    size: str
    """WIDTHxHEIGHT"""
    pictures: int
    rate: float
    """pictures per second of the model"""
    status: Status = "queued"
    made: int = 0
    """pictures"""
    started: float | None = None
    completed: float | None = None
    render_seconds: float | None = None
    """of the process that finished it"""
    error: Mapping[str, str] | None = None
    """code and message, where it failed"""
    tries: int = 0
    """that ended otherwise than they should: with their worker, or without room"""
    deleted: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in ("completed", "failed")


@dataclass(kw_only=True, eq=False)
class Store:
    """All videos of a folder; safe to use from several threads.

    Attributes:
        root: The folder.
        changed: Called with a video whenever something is said of it that was not before, and with one that is gone.
    """

    root: Path
    tell: Callable[[str], None]
    """hears what a user should know"""
    changed: Callable[[VideoJob], None] = lambda _: None

    def __post_init__(self) -> None:
        """The folder is this process's.

        Raises:
            BlockingIOError: Another server has it.
            OSError: It cannot be made.
        """
        self._jobs: dict[str, VideoJob] = {}
        self._guard = threading.RLock()
        (self.root / JOBS).mkdir(parents=True, exist_ok=True)
        try:
            self._lock = claim(self.root / LOCK, self.root)
        except BlockingIOError:
            raise BlockingIOError(f"another server has the folder {self.root}") from None
        found = [job for path in sorted((self.root / JOBS).iterdir()) if (job := self._read(path)) is not None]
        self._jobs = {job.id: job for job in sorted(found, key=lambda job: (job.created, job.id))}

    def close(self) -> None:
        """Others may have the folder."""
        self._lock.close()

    def folder(self, identity: str) -> Path:
        """Where the files of a video are. Raises ApiError where the id is of another form."""
        if FORM.fullmatch(identity) is None:
            raise not_found(identity)
        return self.root / JOBS / identity

    def file(self, identity: str, name: str) -> Path:
        """Where a file of a video is."""
        return self.folder(identity) / name

    def add(self, *, spec: Callable[[Path], Mapping[str, Any]], **about: Any) -> VideoJob:
        """A new video, which waits.

        Args:
            spec: Gives the job for the file that it is to write.
            about: Fields of ``VideoJob``.

        Raises:
            OSError: The disk has no room; nothing is left.
        """
        identity = f"video_{uuid.uuid4().hex}"
        folder = self.folder(identity)
        folder.mkdir()
        try:
            job = VideoJob(id=identity, created=time.time(), spec=dict(spec(folder / VIDEO)), **about)
            self._write(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._guard:
            self._jobs[identity] = job
        self.changed(job)
        return job

    def get(self, identity: str) -> VideoJob:
        """The video of an id. Raises ApiError where there is none."""
        with self._guard:
            job = self._jobs.get(identity)
        if job is None:
            raise not_found(identity)
        return job

    def change(self, identity: str, **what: Any) -> VideoJob:
        """Say something of a video. Raises ApiError where there is none.

        Where the disk has no room it holds while this process lives, and is told: a server that begins again then finds
        the video as it was before, and goes on with it.
        """
        with self._guard:
            job = self._jobs[identity] = replace(self.get(identity), **what)
            try:
                self._write(job)
            except OSError as error:
                self.tell(f"what became of {identity} cannot be written: {error}")
        self.changed(job)
        return job

    def progress(self, identity: str, made: int) -> None:
        """So many pictures are made; kept in memory alone."""
        with self._guard:
            if identity not in self._jobs:
                return
            job = self._jobs[identity] = replace(self._jobs[identity], made=made)
        self.changed(job)

    def forget(self, identity: str) -> VideoJob:
        """The video is not listed any more, nor will be; its files are still there."""
        with self._guard:
            job = self.change(identity, deleted=True)
            del self._jobs[identity]
        return job

    def sweep(self, identity: str) -> None:
        """The files of a video that was forgotten are gone."""
        shutil.rmtree(self.folder(identity), ignore_errors=True)

    def page(
        self, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[VideoJob], bool]:
        """Some videos in order of their creation, and whether there are more. Raises ApiError for an unknown id."""
        with self._guard:
            order = list(self._jobs.values())
        if newest_first:
            order.reverse()
        start = 0
        if after is not None:
            start = next((i + 1 for i, job in enumerate(order) if job.id == after), -1)
            if start < 0:
                raise not_found(after)
        return order[start : start + limit], len(order) > start + limit

    def unfinished(self) -> Iterator[VideoJob]:
        """The videos that are still to be made, the oldest first."""
        with self._guard:
            yield from [job for job in self._jobs.values() if not job.over]

    def counts(self) -> dict[str, int]:
        """How many videos there are, by status."""
        with self._guard:
            found = [job.status for job in self._jobs.values()]
        return {status: found.count(status) for status in STATUSES}

    def _write(self, job: VideoJob) -> None:
        write_json(self.folder(job.id) / RECORD, {"format": FORMAT, **asdict(job)})

    def _read(self, folder: Path) -> VideoJob | None:
        """The video of a folder; None where it is none, was deleted, or was never asked for to the end."""
        if FORM.fullmatch(folder.name) is None or folder.is_symlink() or not folder.is_dir():
            return None
        path = folder / RECORD
        if not path.is_file():  # killed before anybody was told of it
            shutil.rmtree(folder, ignore_errors=True)
            return None
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT or content["id"] != folder.name:
                raise ValueError("it is of another format or id")
            known = {f.name for f in fields(VideoJob)}
            job = VideoJob(**{name: value for name, value in content.items() if name in known})
            if job.status not in STATUSES:
                raise ValueError(f"it has the status {job.status!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.tell(f"{path} is damaged, and its video is left out: {error}")
            return None
        if job.deleted:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return job
