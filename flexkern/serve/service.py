"""Between HTTP and the queue: from a request to a video that waits, and from what happens to who follows it."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flexkern.render.spec import JobSpec
from flexkern.serve import shapes
from flexkern.serve.describe import describe, read_log
from flexkern.serve.errors import ApiError
from flexkern.serve.hub import Hub
from flexkern.serve.places import JOBS, LOG, VIDEO
from flexkern.serve.runner import CANCELLED, Runner
from flexkern.serve.served import Served, problem_of
from flexkern.serve.store import Store, VideoJob
from flexkern.serve.telemetry import Telemetry

KEPT = (
    "chunk", "made", "pictures", "denoise_seconds", "decode_seconds", "encode_seconds", "waited_seconds",
    "left_seconds", "time",
)  # fmt: skip


class Service:
    """Everything behind the handlers.

    Args:
        served: The model, and the limits.
        store: The videos.
        check: Raises ValueError, OSError, NotImplementedError or ImportError for a job that cannot be made.
        commands: What starts each worker.
        tell: Hears what the user should know.
    """

    def __init__(
        self,
        served: Served,
        store: Store,
        *,
        check: Callable[[JobSpec], None],
        commands: list[list[str]],
        tell: Callable[[str], None],
    ):
        self.served, self.store, self.limits = served, store, served.limits
        self._check, self._checking = check, threading.Lock()
        self.telemetry, self.hub = Telemetry(served.name), Hub()
        self.streams = 0  # connections that go on
        self.telemetry.count_jobs(store.counts)
        store.changed = self._changed
        self.runner = Runner(
            store, commands, limits=self.limits, telemetry=self.telemetry, heard=self._heard, tell=tell
        )

    def create(self, request: shapes.VideoRequest) -> shapes.Video:
        """A video that waits. Raises ApiError where it cannot be made, or too many wait."""
        self.runner.reserve()
        # of the name that it will have, in the folder that is there
        spec = self.served.spec(request, self.store.root / JOBS / VIDEO)
        with self._checking:
            try:
                self._check(spec)
            except (ValueError, NotImplementedError) as error:
                raise problem_of(error) from None
            self.runner.reserve()  # others may have come while this one was checked
            try:
                job = self.store.add(
                    spec=lambda out: replace(spec, out=out).to_dict(),
                    model=self.served.name,
                    size=self.served.size,
                    pictures=spec.frames,
                    rate=float(self.served.family.fps),
                )
            except OSError as error:
                told = f"the disk does not take the job: {error.strerror or 'it cannot be written'}"
                raise ApiError(507, "no_room", told) from None
            self.runner.submit(job.id)
        return self.told(job)

    def told(self, job: VideoJob) -> shapes.Video:
        """A video, as the API tells of it."""
        return describe(job, position=self.runner.position(job.id) if job.status == "queued" else None)

    def cancel(self, identity: str) -> shapes.Video:
        """The video is not made any further. Raises ApiError where it is over."""
        job = self.store.get(identity)
        if job.over:
            raise ApiError(409, "over", f"the video is {job.status} already", param="video_id")
        if self.runner.cancel(identity) == "waited":
            self.store.change(identity, status="failed", completed=time.time(), error=CANCELLED)
        return self.told(self.store.get(identity))

    def delete(self, identity: str) -> shapes.VideoDeleted:
        """The video is gone, and is not made any further."""
        self.store.forget(identity)
        if self.runner.cancel(identity) != "runs":  # else it is put away once its worker has stopped
            self.store.sweep(identity)
        return shapes.VideoDeleted(id=identity)

    def _changed(self, job: VideoJob) -> None:
        if job.deleted:
            self.hub.publish("deleted", {"id": job.id})
        else:
            self.hub.publish("video", self.told(job).model_dump())

    def _heard(self, identity: str, event: Mapping[str, Any]) -> None:
        if event.get("event") == "chunk":
            self.hub.publish("chunk", {"id": identity} | {name: event[name] for name in KEPT if name in event})

    def history(self, identity: str) -> list[dict[str, Any]]:
        """What the log of a video's render says of its chunks, those of a process before this one too."""
        found = []
        for event in read_log(self.store.file(identity, LOG)):
            if event.get("event") == "chunk":
                found.append({"id": identity} | {name: event[name] for name in KEPT if name in event})
        return found
