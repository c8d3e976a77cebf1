"""A farm on Ray: an actor for each worker, with a GPU of its own where there are any.

Nothing is decided here. An actor runs one try at a time and says how it ended; one that dies, or fails in a way that
nobody foresaw, is reported lost and replaced. Ray neither restarts actors nor repeats calls by itself: what a job's try
costs is counted in one place, the schedule.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from flexkern.checks import require
from flexkern.render.signals import STOPS, uninterrupted
from flexkern.serve.fleet import News
from flexkern.serve.task import Result, Task, carry_out

STORE = 80 * 2**20  # bytes of Ray's object store: jobs and results are small, and videos never pass through it
STARTS = 3  # of Ray on this machine, until it is given up
NEEDED = 'flexkern fleet needs Ray: pip install "flexkern[cluster]"; --shard I/N does without'


def load_ray() -> Any:
    """Ray. Raises ImportError that says what to install, where it is not there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError(NEEDED) from None
    return ray


def ranks_of(gpus_per_job: float | None) -> int:
    """How many processes compute a job together. Raises ValueError where a worker cannot have so many GPUs."""
    if gpus_per_job is None:
        return 1
    fits = 0 <= gpus_per_job <= 1 or gpus_per_job == int(gpus_per_job) > 1
    require(fits, f"gpus-per-job must be 0, a share of 1, or a whole number, got {gpus_per_job:g}")
    return max(1, int(gpus_per_job))


class Renderer:
    """What an actor is: a worker, made with the first job, and asked to stop by another thread.

    Args:
        options: Of ``flexkern.render.Worker``.
    """

    def __init__(self, **options: Any):
        self._options, self._stop = options, threading.Event()
        self._worker: Any = None

    def ready(self) -> int:
        """The process; the actor is there."""
        return os.getpid()

    def run(self, task: Task) -> Result:
        """One try of a job."""
        from flexkern.render.worker import Worker

        if self._worker is None:
            self._worker = Worker(**self._options)
        return carry_out(self._worker, task, stop=self._stop.is_set)

    def stop(self) -> None:
        """The job that runs stops at its next chunk."""
        self._stop.set()


class RayFarm:
    """Workers that are Ray's actors.

    Args:
        address: Of a cluster; None for one on this machine, which ends with the farm.
        workers: How many; 0 for one on each GPU, or one where there is none.
        gpus_per_job: GPUs of one machine, or a share of one, that an actor reserves, and renders each job on together;
            0 for workers on CPUs; None for 1 where there are GPUs, else 0.
        cpus_per_job: CPUs that an actor reserves.
        options: Of ``flexkern.render.Worker``.
        tell: Hears sentences.

    Raises:
        ImportError: Ray is not installed.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int = 0,
        gpus_per_job: float | None = None,
        cpus_per_job: float = 1.0,
        options: dict[str, Any] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ):
        require(workers >= 0, f"workers must be at least 0, got {workers}")
        ranks = ranks_of(gpus_per_job)
        self._ray = load_ray()
        self._address, self._workers, self._gpus, self._cpus = address, workers, gpus_per_job, cpus_per_job
        self._options, self._tell = dict(options or {}) | ({"ranks": ranks} if ranks > 1 else {}), tell
        self._actors: dict[str, Any] = {}
        self._refs: dict[Any, tuple[str, str]] = {}
        self._pids: dict[str, int] = {}
        self._news: list[News] = []
        self._count = 0
        self._ours = False

    def start(self) -> None:
        """Ray runs, and actors are being made. Raises ConnectionError for an address where there is no cluster."""
        ray = self._ray
        if not ray.is_initialized():
            self._ours = True
            self._init_beside_our_signals()
        there = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
        self._gpus = (1.0 if any(there) else 0.0) if self._gpus is None else self._gpus
        most = max(there, default=0.0)
        require(most >= self._gpus, f"gpus-per-job {self._gpus:g} cannot be had: Ray sees {most:g} GPUs on a machine")
        count = self._workers or (sum(int(gpus / self._gpus) for gpus in there) if self._gpus else 1)
        if not self._gpus:
            self._options["device"] = "cpu"
        where = "this machine" if self._address is None else f"the cluster at {self._address}"
        self._tell(f"{count} workers on {where}, {self._gpus:g} GPUs each")
        for _ in range(count):
            self._make()

    def _init_beside_our_signals(self) -> None:
        """As ``_init``; Ray's own handlers, which end the process with a status of their own, do not stay."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in STOPS if main}
        ended = False
        try:
            self._init()
        except SystemExit:  # what Ray does at SIGTERM
            ended = True
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if ended:
            signal.raise_signal(signal.SIGTERM)

    def _init(self) -> None:
        local: dict[str, Any] = {}
        if self._address is None:
            wanted = max(self._workers, os.cpu_count() or 1)  # workers of CPUs may be more than processors
            local = {"num_cpus": wanted, "include_dashboard": False, "object_store_memory": STORE}
        for left in reversed(range(STARTS)):
            try:
                self._ray.init(
                    address=self._address or "local",
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    configure_logging=False,
                    **local,
                )
                return
            except Exception as error:  # Ray gives itself 30 seconds, which a busy machine may need more than once
                self._ray.shutdown()
                if not left or "timed out during startup" not in str(error):
                    raise
                self._tell("Ray did not start in time on this machine: once more")

    def _make(self) -> None:
        name = f"worker-{self._count}"
        self._count += 1
        actor = self._ray.remote(Renderer).options(
            num_gpus=self._gpus, num_cpus=self._cpus, max_restarts=0, max_task_retries=0, max_concurrency=2
        )
        self._actors[name] = actor.remote(**self._options)
        self._refs[self._actors[name].ready.remote()] = name, "ready"

    def give(self, worker: str, task: Task) -> None:
        """Hand a job to an idle actor."""
        self._refs[self._actors[worker].run.remote(task)] = worker, "ended"

    def wait(self, seconds: float) -> Sequence[News]:
        """What has happened, all of it."""
        if self._refs and not self._news:
            self._ray.wait(list(self._refs), num_returns=1, timeout=seconds)
            with uninterrupted():  # what is heard here is not heard again
                done, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
                self._news += map(self._hear, done)
        found, self._news = self._news, []
        return found

    def _hear(self, ref: Any) -> News:
        worker, kind = self._refs.pop(ref)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._lost(worker, error)
        if kind == "ready":
            self._pids[worker] = result
            return News(worker=worker, kind="ready")
        return News(worker=worker, kind="ended", result=result)

    def _lost(self, worker: str, error: Any) -> News:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):
            why = f"{type(cause).__name__}: {cause}"
        else:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        self._kill(self._actors.pop(worker))
        self._pids.pop(worker, None)
        self._make()
        return News(worker=worker, kind="lost", why=why)

    def _kill(self, actor: Any) -> None:
        self._ray.kill(actor, no_restart=True)

    def interrupt(self) -> None:
        """Each actor's job stops at its next chunk."""
        for actor in self._actors.values():
            actor.stop.remote()

    def close(self) -> None:
        """End the actors, and the Ray that ``start`` began."""
        for actor in self._actors.values():
            self._kill(actor)
        self._actors.clear()
        self._refs.clear()
        if self._ours:
            self._ray.shutdown()
            self._ours = False
