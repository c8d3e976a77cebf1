"""Many videos by many workers: the loop that hands out jobs, and writes down what becomes of them.

Where the workers are is a ``Farm``'s business: this process (``flexkern.serve.alone``), Ray's actors
(``flexkern.serve.actors``), or a simulation's. The loop holds a job for each worker, and for the others where they
begin in their file.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol

from flexkern.checks import require
from flexkern.render import status
from flexkern.render.signals import uninterrupted
from flexkern.render.target import claim, lock_file, write_json
from flexkern.render.watch import append_line, as_line, now
from flexkern.serve.book import Jobs, Past, is_there, read_manifests, status_path
from flexkern.serve.schedule import Schedule, Verdict
from flexkern.serve.tally import Tally
from flexkern.serve.task import Result, Task, kept_pictures, note, seen

PATIENCE = 600.0  # seconds without any worker, after which there will be none
GRACE = 120.0  # seconds that workers get to stop
TURN = 1.0  # seconds that the loop waits for news


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a farm tells of a worker."""

    worker: str
    kind: Literal["ready", "ended", "lost"]
    """ready: it takes jobs; ended: its job; lost: the worker, and its job, if it had one, with it"""
    result: Result | None = None
    """of what ended"""
    why: str = ""
    """of what was lost"""


class Farm(Protocol):
    """Workers, wherever they are."""

    def start(self) -> None:
        """Begin to make workers. Raises ValueError or OSError where there can be none."""

    def give(self, worker: str, task: Task) -> None:
        """Hand a job to an idle worker."""

    def wait(self, seconds: float) -> Sequence[News]:
        """What has happened; empty where nothing has for so long."""

    def interrupt(self) -> None:
        """Ask all workers to stop at their next chunk."""

    def close(self) -> None:
        """End all workers, whatever they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Every ``of``-th job of a file, from the one of number ``index``."""

    index: int
    of: int

    def __post_init__(self) -> None:
        require(0 <= self.index < self.of, f"a shard is I/N with 0 <= I < N, got {self.index}/{self.of}")

    @property
    def suffix(self) -> str:
        """Of the files that each shard has for itself."""
        return f"-{self.index}-of-{self.of}"


@dataclass(slots=True, kw_only=True)
class Summary:
    """What became of the jobs."""

    jobs: int = 0
    done: int = 0
    """by this run"""
    skipped: int = 0
    """done before"""
    failed: int = 0
    """of them, those that failed before and were not tried again are ``left_failed``"""
    left_failed: int = 0
    stopped: int = 0
    """their retries are used up; another run goes on with them"""
    waiting: int = 0
    """not begun, or to be gone on with"""
    tries: int = 0
    again: int = 0
    """of them, those that another one follows"""
    lost: int = 0
    """workers"""
    pictures: int = 0
    seconds: float = 0.0
    interrupted: int = 0
    """number of the signal"""

    @property
    def code(self) -> int:
        """The exit status."""
        if self.interrupted:
            return status.SIGNAL + self.interrupted
        if self.failed or self.left_failed:
            return status.FAILED
        return status.CAN_RESUME if self.stopped or self.waiting else status.DONE

    def __str__(self) -> str:
        told = {"done": self.done, "skipped, done before": self.skipped, "failed": self.failed}
        told |= {"failed before (--retry-failed tries them again)": self.left_failed}
        told |= {"stopped (the same command goes on)": self.stopped, "left": self.waiting}
        counts = ", ".join(f"{count} {name}" for name, count in told.items() if count) or "nothing"
        rate = f"{self.pictures} pictures in {self.seconds:.0f} s" if self.pictures else f"{self.seconds:.0f} s"
        return f"{self.jobs} jobs: {counts}; {rate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """How far a fleet is, for whoever asks while it works."""

    summary: Summary
    workers: dict[str, int]
    """by state: idle, rendering, set_aside"""
    running: tuple[Task, ...]
    tally: Tally
    """of tries that have ended"""


class Fleet:
    """The jobs of a file, handed to the workers of a farm until each has a verdict.

    Args:
        jobs: What to make.
        farm: What makes it.
        folder: Where manifest, summary and the status of each job go.
        retries: How often a job is tried again.
        retry_failed: Whether those that failed in an earlier run are tried again.
        shard: Which of the jobs; None for all. A shard's worker is this process: a try that an earlier run did not
            end was lost with it, and counts.
        hear: Called with the summary so far, and the verdict on a job, when there is one.
        tell: Hears sentences.
        clock: Seconds.
        patience: Seconds without any worker, after which there will be none.
        statuses: Whether the status of each job is written; a simulation leaves that out.
    """

    def __init__(
        self,
        jobs: Jobs,
        farm: Farm,
        folder: Path,
        *,
        retries: int = 2,
        retry_failed: bool = False,
        shard: Shard | None = None,
        hear: Callable[[Summary, Verdict], None] = lambda *_: None,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
        statuses: bool = True,
    ):
        self._jobs, self._farm, self._folder = jobs, farm, folder
        self._shard, self._hear, self._tell, self._clock = shard, hear, tell, clock
        self._patience, self._statuses = patience, statuses
        suffix = "" if shard is None else shard.suffix
        self._manifest, self._summary = folder / f"manifest{suffix}.jsonl", folder / f"summary{suffix}.json"
        self._tasks: dict[str, Task] = {}
        self._idle: set[str] = set()
        self._stopping: float | None = None
        self._told = False
        self._guard = threading.Lock()  # what ``moment`` shows is of one moment
        self._tally = Tally()
        self.summary = Summary()
        self._schedule = self._plan(read_manifests(folder), retries=retries, retry_failed=retry_failed)

    def _plan(self, past: dict[str, Past], *, retries: int, retry_failed: bool) -> Schedule:
        """What is left to do."""
        step = range(len(self._jobs)) if self._shard is None else range(
            self._shard.index, len(self._jobs), self._shard.of
        )  # fmt: skip
        waiting: list[int] = []
        before: dict[int, Past] = {}
        for number in step:
            said = past.get(self._jobs.id(number))
            self.summary.jobs += 1
            if said is not None and said.outcome == "done" and is_there(self._target(number)):
                self.summary.skipped += 1
            elif said is not None and said.outcome == "failed" and not retry_failed:
                self.summary.left_failed += 1
            else:
                waiting.append(number)
                if said is not None and said.outcome == "started" and self._shard is not None:
                    before[number] = said
        schedule = Schedule(((number, self._jobs.keys[number]) for number in waiting), retries=retries)
        for number, said in before.items():
            pictures = kept_pictures(self._target(number))
            further = pictures > said.pictures
            schedule.remember(number, tries=said.tries + (not further), pictures=max(pictures, said.pictures))
        return schedule

    def _target(self, number: int) -> Path:
        return self._jobs[number].target

    def moment(self) -> Moment:
        """How far it is; from any thread."""
        with self._guard:
            summary = replace(self.summary, waiting=self._schedule.waiting)
            aside = len(self._schedule.set_aside)
            workers = {"idle": len(self._idle) - aside, "rendering": len(self._tasks), "set_aside": aside}
            running = tuple(self._tasks.values())
            return Moment(summary=summary, workers=workers, running=running, tally=self._tally)

    def run(self) -> Summary:
        """Hand out the jobs, and wait until each is done, has failed, or can be done by no worker.

        Ctrl-C once asks the workers to stop at their next chunk and waits for them; twice, it does not wait.
        """
        began = self._clock()
        try:
            self._farm.start()
            self._work()
        except KeyboardInterrupt:  # while the farm was being made, or once more
            self.summary.interrupted = self.summary.interrupted or signal.SIGINT
        finally:
            with suppress(KeyboardInterrupt), uninterrupted():  # whatever comes now, the books are closed
                self._close(began)
        return self.summary

    def _work(self) -> None:
        """Hand out jobs until it is over."""
        seen = self._clock()
        while True:
            try:
                with uninterrupted(), self._guard:  # a job that is written down is given, and news that came are taken
                    self._hand_out()
                if self._over(seen):
                    return
                told = self._farm.wait(TURN)
                with uninterrupted(), self._guard:
                    for news in told:
                        self._take(news)
                seen = self._clock() if self._idle or self._tasks else seen
            except KeyboardInterrupt:
                if self._stopping is not None:
                    raise
                self._stop()

    def _close(self, began: float) -> None:
        """End the workers, and write down what became of their jobs."""
        try:
            self._farm.close()
        finally:
            with self._guard:
                for worker in list(self._tasks):
                    self._end(worker, "interrupted", "the fleet was ended", kept_pictures(self._tasks[worker].target))
                self.summary.waiting = self._schedule.waiting
                self.summary.seconds = self._clock() - began
            write_json(self._summary, asdict(self.summary) | {"time": now(), "code": self.summary.code})

    def _stop(self, number: int = 0) -> None:
        if self._stopping is None:
            self._stopping = self._clock()
            self.summary.interrupted = self.summary.interrupted or number or signal.SIGINT
            self._tell("stopping: workers end their chunk and write a checkpoint; once more, and none is waited for")
            self._farm.interrupt()

    def _hand_out(self) -> None:
        if self._stopping is not None or not self._schedule.waiting:
            return
        for worker in sorted(self._idle):
            number = self._schedule.take(worker)
            if number is not None:
                self._idle.discard(worker)
                self._begin(worker, number)

    def _over(self, seen: float) -> bool:
        """Whether there is nothing to wait for."""
        if self._tasks:
            return self._stopping is not None and self._clock() - self._stopping > GRACE
        if self._stopping is not None or not self._schedule.waiting:
            return True
        if self._idle and not self._schedule.usable:
            self._tell(f"no worker is left that renders: {self._schedule.waiting} jobs wait for another run")
            return True
        if not self._idle and self._clock() - seen > self._patience:
            self._tell(f"there was no worker for {self._patience:g} seconds: {self._schedule.waiting} jobs wait")
            return True
        return False

    def _begin(self, worker: str, number: int) -> None:
        spec, tries = self._jobs[number], self._schedule.tries(number)
        said = {"job": self._jobs.line(number), "id": self._jobs.id(number), "worker": worker, "tries": tries}
        path = status_path(self._folder, number)
        task = self._tasks[worker] = Task(number=number, spec=spec, status=path, said=said, began=now())
        self.summary.tries += 1
        self._write(task, "started", kept_pictures(task.target) if tries else 0)
        self._farm.give(worker, task)

    def _take(self, news: News) -> None:
        worker = news.worker
        if news.kind == "ready":
            self._schedule.enter(worker)
            self._idle.add(worker)
        elif news.kind == "ended":
            assert news.result is not None
            self._end(worker, news.result.ended, news.result.message, news.result.pictures, news.result)
            self._idle.add(worker)
            if news.result.signal or news.result.ended == "interrupted":
                self._stop(news.result.signal)
            if worker in self._schedule.set_aside:
                self._tell(f"{worker} is set aside, its last jobs were stopped: {news.result.message}")
        else:
            self._idle.discard(worker)
            self.summary.lost += 1
            if worker in self._tasks:
                pictures = kept_pictures(self._tasks[worker].target)
                self._end(worker, "lost", f"its worker was lost: {news.why}", pictures)
            self._schedule.leave(worker)

    def _end(self, worker: str, ended: Any, message: str, pictures: int, result: Result | None = None) -> None:
        task = self._tasks.pop(worker)
        made = seen(task)[0] if result is None else result.tally
        if made is not None:
            self._tally = self._tally.plus(made)
        verdict = self._schedule.end(worker, ended, pictures=pictures)
        outcome = {"waiting": "interrupted"}.get(verdict, verdict)
        seconds = {} if result is None else {"seconds": round(result.seconds, 3)}
        tries = self._schedule.tries(task.number)
        self._write(task, outcome, pictures, tries=tries, **seconds, **({} if verdict == "done" else {"why": message}))
        if verdict != "done" and self._statuses:
            note(task, outcome, tries=tries, pictures=pictures, message=message)
        if result is not None:
            self.summary.pictures += result.made
        self.summary.again += verdict == "again"
        if verdict in ("done", "failed", "stopped"):
            setattr(self.summary, verdict, getattr(self.summary, verdict) + 1)
        if verdict in ("failed", "stopped"):
            self._tell(f"{task.target}: {outcome}: {message}")
        self._hear(self.summary, verdict)

    def _write(self, task: Task, outcome: str, pictures: int, **about: Any) -> None:
        said = {"outcome": outcome, "target": str(task.target.relative_to(self._folder))}
        try:
            append_line(self._manifest, as_line({**task.said, **said, "pictures": pictures, **about}))
        except OSError as error:  # renders go on: what they make is on disks of their own
            if not self._told:
                self._told = True
                self._tell(f"the manifest cannot be written: {error}")


@contextmanager
def holding(folder: Path, shard: Shard | None = None) -> Iterator[None]:
    """The folder is this fleet's until the block ends; shards hold it side by side, but no two the same.

    Raises:
        BlockingIOError: Another fleet works on it.
    """
    told = BlockingIOError(f"another fleet works on {folder}: its lock is held")
    held: list[FileIO] = []
    try:
        try:
            if shard is None:
                held.append(claim(folder / "fleet.lock", folder))
            else:
                opened = FileIO(os.open(folder / "fleet.lock", os.O_RDWR | os.O_CREAT, 0o666), "r+")
                held.append(opened)
                lock_file(opened, folder, shared=True)
                held.append(claim(folder / f"fleet{shard.suffix}.lock", folder))
        except BlockingIOError:
            raise told from None
        yield
    finally:
        for file in held:
            file.close()
