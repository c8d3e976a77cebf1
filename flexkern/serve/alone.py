"""A farm of one worker: this process. What a Slurm array runs of each shard."""

from collections.abc import Callable, Sequence

from flexkern.render.worker import Worker
from flexkern.serve.fleet import News
from flexkern.serve.task import Result, Task, carry_out, kept_pictures


class Alone:
    """One worker, in this thread; a signal that stops a render stops the fleet.

    Args:
        make: Makes the worker; again where the first one failed in a way that nobody foresaw.
    """

    def __init__(self, make: Callable[[], Worker]):
        self._make, self._count = make, 0
        self._worker: Worker | None = None
        self._task: Task | None = None
        self._interrupted = False

    @property
    def _name(self) -> str:
        return f"worker-{self._count}"

    def start(self) -> None:
        """The worker is made when the first job comes."""

    def give(self, worker: str, task: Task) -> None:
        """The job is rendered by ``wait``."""
        self._task = task

    def wait(self, seconds: float) -> Sequence[News]:
        """Render the job that was given."""
        if self._worker is None:
            self._worker = self._make()
            return [News(worker=self._name, kind="ready")]
        assert self._task is not None, "a worker without a job is waited for by nobody"
        if self._interrupted:  # while weights were loaded
            kept = kept_pictures(self._task.target)
            told = Result(ended="interrupted", message="interrupted", pictures=kept, made=0, seconds=0.0)
            return [News(worker=self._name, kind="ended", result=told)]
        try:
            return [News(worker=self._name, kind="ended", result=carry_out(self._worker, self._task))]
        except Exception as error:
            lost = News(worker=self._name, kind="lost", why=f"{type(error).__name__}: {error}")
            self._worker, self._count = None, self._count + 1
            return [lost]

    def interrupt(self) -> None:
        """Nothing runs beside this, and no other job begins."""
        self._interrupted = True

    def close(self) -> None:
        """Let the weights go."""
        self._worker = None
