"""Which job a worker gets next, and what becomes of a job that did not end well: decided here, without any machine.

Jobs that share a model go to a worker that has it, so that weights are loaded once a worker as far as that can be. A
job that was stopped, or whose worker was lost, is tried again, on another worker where there is one, until its retries
are used up; a try that got further than all before it uses none. A worker that ends job after job in that way is set
aside: a full disk must not eat the whole list.

Every call takes a time that does not depend on how many jobs there are.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from flexkern.checks import require

Ended = Literal["done", "stopped", "failed", "lost", "interrupted"]
"""of a try; stopped: by a lack of room or memory, say; lost: with its worker; interrupted: by whoever runs the fleet"""
Verdict = Literal["done", "failed", "stopped", "again", "waiting"]
"""of a job after a try; stopped: its retries are used up, and another run may go on with it; waiting: it was not its
turn to be judged"""
SET_ASIDE = 3  # tries in a row, without a job done or a picture gained, after which a worker gets no more


@dataclass(slots=True)
class _Trouble:
    """What is known of a job that did not end well at once."""

    tries: int = 0
    pictures: int = 0
    worker: str = ""


class Schedule:
    """Jobs by number, the workers that ask for them, and how they ended.

    Args:
        jobs: Number of each job, and a key that is equal for those that share a model.
        retries: How often a job is tried again.

    Attributes:
        running: The job of each worker that has one.
        waiting: How many jobs have no worker and no verdict.
        set_aside: Workers that get no more jobs.
    """

    def __init__(self, jobs: Iterable[tuple[int, int]], *, retries: int = 2):
        require(retries >= 0, f"retries must be at least 0, got {retries}")
        self._retries = retries
        self._queues: OrderedDict[int, deque[int]] = OrderedDict()
        for number, key in jobs:
            self._queues.setdefault(key, deque()).append(number)
        self._key_of: dict[int, int] = {}  # of jobs that run
        self._trouble: dict[int, _Trouble] = {}
        self._has: dict[str, int] = {}
        self._row: dict[str, int] = {}
        self.running: dict[str, int] = {}
        self.waiting = sum(map(len, self._queues.values()))
        self.set_aside: set[str] = set()

    def enter(self, worker: str) -> None:
        """A worker is there, and has no model yet."""
        self._row[worker] = 0

    def leave(self, worker: str) -> None:
        """A worker without a job is gone."""
        for held in (self._row, self._has):
            held.pop(worker, None)
        self.set_aside.discard(worker)

    @property
    def usable(self) -> int:
        """How many workers may get jobs."""
        return len(self._row) - len(self.set_aside)

    def remember(self, number: int, *, tries: int, pictures: int) -> None:
        """A job was tried before, and got so far."""
        self._trouble[number] = _Trouble(tries=tries, pictures=pictures)

    def take(self, worker: str) -> int | None:
        """The next job of an idle worker, which is then its; None where there is none for it.

        It is one that shares the worker's model, else one of the model whose turn it is. A job that this worker had,
        and did not finish, is left to others, as long as there are any.
        """
        if worker in self.set_aside or not self.waiting:
            return None
        has = self._has.get(worker)
        keys = [has] if has in self._queues else []
        keys += [key for key in islice(self._queues, 2) if key != has]
        for key in keys:
            assert key is not None
            if (number := self._pick(worker, key)) is not None:
                return number
        return None

    def _pick(self, worker: str, key: int) -> int | None:
        queue = self._queues[key]
        for _ in range(min(2, len(queue))):
            trouble = self._trouble.get(queue[0])
            if trouble is None or trouble.worker != worker or self.usable < 2:
                break
            queue.rotate(-1)
        else:
            return None
        number = queue.popleft()
        if queue:
            self._queues.move_to_end(key)  # the next worker without a model begins with another
        else:
            del self._queues[key]
        self.waiting -= 1
        self._has[worker], self._key_of[number], self.running[worker] = key, key, number
        return number

    def tries(self, number: int) -> int:
        """How many tries of a job count so far."""
        trouble = self._trouble.get(number)
        return 0 if trouble is None else trouble.tries

    def end(self, worker: str, ended: Ended, *, pictures: int = 0) -> Verdict:
        """A worker's job has ended; the worker is idle again, or lost.

        Args:
            worker: Whose.
            ended: How.
            pictures: That are kept of it, by all tries.
        """
        number = self.running.pop(worker)
        key = self._key_of.pop(number)
        if ended == "done":
            self._trouble.pop(number, None)
            self._row[worker] = 0
            return "done"
        if ended == "failed":
            self._row[worker] = 0  # the job's fault
            return "failed"
        if ended == "interrupted":
            self._back(number, key)
            return "waiting"
        trouble = self._trouble.setdefault(number, _Trouble())
        further = pictures > trouble.pictures
        trouble.pictures, trouble.worker = max(pictures, trouble.pictures), worker
        trouble.tries += not further
        self._row[worker] = 0 if further else self._row.get(worker, 0) + 1
        if self._row[worker] >= SET_ASIDE and ended == "stopped":
            self.set_aside.add(worker)
        if trouble.tries > self._retries:
            return "failed" if ended == "lost" else "stopped"
        self._back(number, key)
        return "again"

    def _back(self, number: int, key: int) -> None:
        self._queues.setdefault(key, deque()).append(number)
        self.waiting += 1
