"""Figures of a fleet for Prometheus, read from its driver, and from the status of each job that runs, when asked for.

They have the names of ``flexkern.serve.telemetry``, and what runs is as new as its status: 30 seconds old at most.
"""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flexkern.serve.fleet import Fleet, Moment
from flexkern.serve.tally import LATENCIES, Tally
from flexkern.serve.task import Task, seen
from flexkern.serve.telemetry import FIGURES, FLEET, PREFIX, answer


class FleetFigures(Collector):
    """Tells the figures of a fleet, as soon as it follows one.

    Args:
        wall: The time of day, in seconds.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time):
        self._wall = wall
        self._fleet: Fleet | None = None
        self._model = ""
        self._last: dict[str, Tally] = {}  # of each try that runs: what was seen last

    def follow(self, fleet: Fleet, model: str) -> None:
        """Tell of this fleet. model: the label ``model_name`` of every figure."""
        self._fleet, self._model = fleet, model

    def serve(self, port: int, host: str) -> tuple[int, Callable[[], None]]:
        """As ``Telemetry.serve``."""
        registry = CollectorRegistry()
        registry.register(self)
        return answer(registry, port, host)

    def collect(self) -> Iterator[Metric]:
        """All figures, of one moment."""
        if self._fleet is None:
            return
        moment = self._fleet.moment()
        made, kept = moment.tally, list[float]()
        last, self._last = self._last, {}
        for task in moment.running:
            tally, since = self._seen(task, last)
            made = made.plus(tally)
            kept += [] if since is None else [since]
        yield self._latencies(made)
        for name, labels in self._counts(moment, made).items():
            yield self._figure(CounterMetricFamily, name.removesuffix("_total"), name, labels)
        age = max(0.0, self._wall() - min(kept)) if kept else 0.0
        yield self._figure(GaugeMetricFamily, "checkpoint_age_seconds", "checkpoint_age_seconds", {"": age})
        for name, labels in {"workers": moment.workers, "jobs": self._jobs(moment)}.items():
            yield self._figure(GaugeMetricFamily, name, name, labels)

    def _seen(self, task: Task, last: dict[str, Tally]) -> tuple[Tally, float | None]:
        """What a try has made, which does not become less where its status cannot be read."""
        tally, since = seen(task)
        key = f"{task.number} {task.began}"
        self._last[key] = tally or last.get(key) or Tally()
        return self._last[key], since

    def _counts(self, moment: Moment, made: Tally) -> dict[str, dict[str, int]]:
        """What only grows: by name, then by label."""
        told = moment.summary
        return {
            "frames_total": {"": made.frames},
            "pictures_total": {"": made.pictures},
            "resumes_total": {"": made.resumes},
            "retries_total": {"": told.again},
            "tries_total": {"": told.tries},
            "worker_crashes_total": {"": told.lost},
            "renders_total": {"finished": told.done, "failed": told.failed, "stopped": told.stopped},
        }

    def _jobs(self, moment: Moment) -> dict[str, int]:
        """By status, in the words of the server; those of earlier runs are counted, too."""
        told = moment.summary
        return {
            "queued": told.waiting,
            "in_progress": len(moment.running),
            "completed": told.done + told.skipped,
            "failed": told.failed + told.left_failed,
            "stopped": told.stopped,
        }

    def _latencies(self, made: Tally) -> HistogramMetricFamily:
        name = "chunk_latency_seconds"
        told = HistogramMetricFamily(PREFIX + name, FIGURES[name].doc, labels=("model_name",))
        bounds = [*map(str, map(float, LATENCIES)), "+Inf"]
        told.add_metric((self._model,), list(zip(bounds, accumulate(made.chunks), strict=True)), made.seconds)
        return told

    def _figure(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        called: str,
        name: str,
        values: dict[str, int] | dict[str, float],
    ) -> Metric:
        figure = (FIGURES | FLEET)[name]
        told = kind(PREFIX + called, figure.doc, labels=("model_name", *figure.labels))
        for label, value in values.items():
            told.add_metric((self._model, *([label] if figure.labels else [])), value)
        return told
