"""Videos in turn: a queue, workers in processes of their own, and what becomes of a video when one of them ends.

A worker that ends with a video, whatever the reason, is replaced, and the video goes on from its checkpoint; after as
many such ends as the limits allow, the video counts as failed. A server that stops leaves every video as one that
waits, and goes on with it when it is started again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flexkern.render.status import SIGNAL
from flexkern.serve.child import Child
from flexkern.serve.errors import ApiError
from flexkern.serve.served import Limits
from flexkern.serve.store import Store, VideoJob
from flexkern.serve.telemetry import Telemetry

PATIENCE = 20.0  # seconds that a worker has to stop
PAUSES = 0.0, 1.0, 5.0, 30.0  # seconds before a worker that does not start is tried again
CODES = {"refused": "refused", "failed": "render_failed"}  # of the API, by how a worker says it ended
CANCELLED = {"code": "cancelled", "message": "it was cancelled"}


class Runner:
    """The queue, and a thread for each worker.

    Args:
        store: The videos.
        commands: What starts each worker.
        limits: Of the server.
        telemetry: Counts.
        heard: Called with the id of a video and an event of its render.
        tell: Hears what the user should know.
    """

    def __init__(
        self,
        store: Store,
        commands: Sequence[Sequence[str]],
        *,
        limits: Limits,
        telemetry: Telemetry,
        heard: Callable[[str, Mapping[str, Any]], None],
        tell: Callable[[str], None],
    ):
        self._store, self._limits, self._telemetry = store, limits, telemetry
        self._heard, self._tell = heard, tell
        self._commands = [list(command) for command in commands]
        self._guard = threading.Condition()
        self._waiting: deque[str] = deque()
        self._running: dict[int, str] = {}
        self._children: dict[int, Child] = {}
        self._unwanted: set[str] = set()
        self._states = ["starting"] * len(self._commands)
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._took = 30.0  # seconds of the last video, for a guess

    def start(self) -> None:
        """Videos that are not finished go on, the oldest first."""
        for job in self._store.unfinished():
            if job.status == "in_progress":
                job = self._store.change(job.id, status="queued")
            self._waiting.append(job.id)
        for index in range(len(self._commands)):
            thread = threading.Thread(target=self._work, args=(index,), name=f"worker-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def reserve(self) -> None:
        """Raise ApiError where no further video may wait, with the seconds after which to come again."""
        with self._guard:
            if self._stopping:
                raise ApiError(503, "stopping", "the server is being stopped", headers={"Retry-After": "30"})
            waiting = len(self._waiting)
        if waiting >= self._limits.queued:
            after = str(max(1, round(self._took)))
            self._telemetry.refused("queue_full")
            told = f"{waiting} videos are waiting, which is as many as may: come again in {after} seconds"
            raise ApiError(429, "queue_full", told, headers={"Retry-After": after})

    def submit(self, identity: str, *, first: bool = False) -> None:
        """A video waits for a worker, as the last one or the first."""
        with self._guard:
            self._waiting.appendleft(identity) if first else self._waiting.append(identity)
            self._guard.notify()

    def position(self, identity: str) -> int | None:
        """How many videos are before it, None where it does not wait."""
        with self._guard:
            return next((i for i, one in enumerate(self._waiting) if one == identity), None)

    @property
    def states(self) -> list[str]:
        """Of each worker: starting, idle, busy, or why it does not start."""
        return list(self._states)

    def cancel(self, identity: str) -> Literal["waited", "runs", "neither"]:
        """Take a video from the queue, or have its worker stop it; says which of the two it was."""
        with self._guard:
            if identity in self._waiting:
                self._waiting.remove(identity)
                return "waited"
            found = next((index for index, one in self._running.items() if one == identity), None)
            if found is None:
                return "neither"
            child = self._children.get(found)
            self._unwanted.add(identity)
        if child is not None:
            child.send(stop=identity)
            timer = threading.Timer(PATIENCE, self._lose_patience, (identity, child))
            timer.daemon = True
            timer.start()
        return "runs"

    def _lose_patience(self, identity: str, child: Child) -> None:
        with self._guard:
            late = identity in self._running.values() and identity in self._unwanted
        if late and child.alive:
            child.kill()

    def stop(self, patience: float = PATIENCE) -> None:
        """Every worker has stopped at the end of a chunk, or is killed after so many seconds."""
        with self._guard:
            self._stopping = True
            running = dict(self._running)
            self._guard.notify_all()
        for index, identity in running.items():
            if child := self._children.get(index):
                child.send(stop=identity)
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for child in list(self._children.values()):
            child.end(patience=max(0.1, until - time.monotonic()))
        for thread in self._threads:
            thread.join(5.0)

    def _work(self, index: int) -> None:
        """The life of a worker's thread."""
        failures = 0
        while not self._stopping:
            child = self._ready_child(index)
            if child is None:
                failures = min(failures + 1, len(PAUSES) - 1)
                with self._guard:
                    self._guard.wait_for(lambda: self._stopping, PAUSES[failures])
                continue
            failures = 0
            if (identity := self._next(index)) is None:
                break
            try:
                self._carry(child, identity)
            except ApiError:  # it was deleted meanwhile
                self._settle(identity)
            finally:
                with self._guard:
                    self._running.pop(index, None)
                    self._states[index] = "idle"
        if child := self._children.get(index):
            child.end(PATIENCE)
        self._states[index] = "stopped"

    def _ready_child(self, index: int) -> Child | None:
        """The worker's process, which listens; None where it does not start."""
        child = self._children.get(index)
        if child is not None and child.alive and child.ready:
            return child
        self._states[index] = "starting"
        if child is not None:
            child.end(0.0)
        try:
            child = self._children[index] = Child(self._commands[index], self._store.root / f"worker-{index}.log")
        except OSError as error:
            self._states[index] = f"does not start: {error}"
            return None
        if child.wait_until_ready():
            self._states[index] = "idle"
            return child
        if not self._stopping:
            self._states[index] = f"does not start: it {child.epitaph}"
            self._tell(f"worker {index} does not start: it {child.epitaph}")
        return None

    def _next(self, index: int) -> str | None:
        """The video to make next, once there is one; None where the server stops."""
        with self._guard:
            self._guard.wait_for(lambda: self._stopping or self._waiting)
            if self._stopping:
                return None
            identity = self._running[index] = self._waiting.popleft()
            self._states[index] = "busy"
        return identity

    def _carry(self, child: Child, identity: str) -> None:
        """Have a video made, and say what became of it."""
        if self._settle(identity):
            return
        job = self._store.get(identity)
        began, first = time.time(), job.started is None
        self._store.change(identity, status="in_progress", started=began if first else job.started)
        self._telemetry.began(began - job.created if first else None)
        if child.send(run={"id": identity, "spec": dict(job.spec)}):
            for message in child.messages():
                if event := message.get("event"):
                    self._hear(identity, event)
                if outcome := message.get("outcome"):
                    self._end(identity, outcome, seconds=time.time() - began)
                    return
        self._crash(identity, child)

    def _hear(self, identity: str, event: Mapping[str, Any]) -> None:
        self._telemetry.write(**{"render": identity, **event})
        if isinstance(made := event.get("made"), int):
            self._store.progress(identity, made)
        self._heard(identity, event)

    def _end(self, identity: str, outcome: Mapping[str, Any], *, seconds: float) -> None:
        """A worker has said what became of a video."""
        self._telemetry.left(identity)
        if self._settle(identity):
            return
        status, now, message = outcome["status"], time.time(), self._without_paths(identity, outcome["message"])
        if status == "done":
            self._took = seconds
            job = self._store.get(identity)
            self._store.change(
                identity, status="completed", completed=now, made=job.pictures, render_seconds=round(seconds, 3)
            )
            self._telemetry.completed(now - job.created)
        elif status == "stopped":
            self._again(identity, "no_room" if outcome["code"] < SIGNAL else "interrupted", message)
        else:
            error = {"code": CODES.get(status, "render_failed"), "message": message}
            self._store.change(identity, status="failed", completed=now, error=error)

    def _crash(self, identity: str, child: Child) -> None:
        """A worker has ended with a video."""
        self._telemetry.left(identity)
        if self._settle(identity):
            return
        if not self._stopping:
            self._telemetry.crashed()
            self._tell(f"{identity}: its worker {child.epitaph}")
        self._again(identity, "worker_crashed", self._without_paths(identity, f"its worker {child.epitaph}"))

    def _again(self, identity: str, code: str, why: str) -> None:
        """A video goes on where it stopped, or counts as failed where it has stopped too often."""
        if self._stopping:  # which is no fault of the video
            self._store.change(identity, status="queued")
            return
        tries = self._store.get(identity).tries + 1
        if tries >= self._limits.tries:
            error = {"code": code, "message": f"{why} (tried {tries} times)" if tries > 1 else why}
            self._store.change(identity, status="failed", completed=time.time(), tries=tries, error=error)
            return
        self._store.change(identity, status="queued", tries=tries)
        self._telemetry.retried()
        self.submit(identity, first=True)

    def _without_paths(self, identity: str, message: str) -> str:
        """A message for clients, to whom it is no matter where files lie, and how a command would go on."""
        message = message.partition("; flexkern render --resume")[0]
        for path in (self._store.file(identity, ""), self._store.root, self._store.root.absolute()):
            message = message.replace(f"{path}/", "").replace(str(path), "its folder")
        return message

    def _settle(self, identity: str) -> bool:
        """Whether nobody wants the video any more, and it is put away."""
        with self._guard:
            unwanted = identity in self._unwanted
            self._unwanted.discard(identity)
        try:
            job: VideoJob = self._store.get(identity)
        except ApiError:  # it was deleted
            self._store.sweep(identity)
            return True
        if unwanted and not job.over:
            self._store.change(identity, status="failed", completed=time.time(), error=CANCELLED)
        return unwanted
