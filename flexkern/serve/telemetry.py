"""Figures for Prometheus, counted from the events of renders (``flexkern.render.watch``) and from the queue.

    telemetry = Telemetry(model="self-forcing")
    job.run(watch=Watch(log=telemetry))
    telemetry.serve(9400)                  # or telemetry.text(), for a server of one's own

Names are those of the field: a prefix with a colon, base units, ``_total`` for what only grows. ``FIGURES`` has all.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from flexkern.serve.tally import LATENCIES

CONTENT_TYPE = CONTENT_TYPE_LATEST
WAITS = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 43200)  # seconds: to half a day
STAGES = ("prompt", "denoise", "decode", "encode", "checkpoint")
PREFIX = "flexkern:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One of the figures."""

    kind: Literal["histogram", "counter", "gauge"]
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FIGURES: dict[str, Figure] = {
    "chunk_latency_seconds": Figure(
        kind="histogram", buckets=LATENCIES, doc="From one chunk's pictures in the file to the next one's"
    ),
    "stage_latency_seconds": Figure(
        kind="histogram", labels=("stage",), buckets=LATENCIES,
        doc="Of a chunk: denoise, decode, and, while the next is made, encode; of a prompt: prompt; of a checkpoint, "
        "copied and written: checkpoint",
    ),
    "queue_time_seconds": Figure(kind="histogram", buckets=WAITS, doc="From a request to the beginning of its render"),
    "e2e_latency_seconds": Figure(kind="histogram", buckets=WAITS, doc="From a request to its finished video"),
    "frames_total": Figure(kind="counter", doc="Latent frames made"),
    "pictures_total": Figure(kind="counter", doc="Pictures made"),
    "resumes_total": Figure(kind="counter", doc="Renders that went on from a checkpoint"),
    "retries_total": Figure(kind="counter", doc="Renders begun again after their worker had ended"),
    "worker_crashes_total": Figure(kind="counter", doc="Workers that ended with a render"),
    "renders_total": Figure(kind="counter", labels=("outcome",), doc="Renders that ended: finished or failed"),
    "refused_total": Figure(kind="counter", labels=("reason",), doc="Requests that were turned away"),
    "peak_memory_bytes": Figure(
        kind="gauge", doc="Most memory that renders took: of the GPU, or of the process where there is none"
    ),
    "checkpoint_age_seconds": Figure(
        kind="gauge", doc="Age of the newest checkpoint of the render whose is oldest; of one without, since it began"
    ),
    "jobs": Figure(kind="gauge", labels=("status",), doc="Videos, by status"),
}  # fmt: skip
FLEET: dict[str, Figure] = {
    "workers": Figure(kind="gauge", labels=("state",), doc="Workers of a fleet: idle, rendering or set_aside"),
    "tries_total": Figure(kind="counter", doc="Tries of a fleet's jobs, those that others followed included"),
}  # of fleets alone, which tell some of FIGURES, too: flexkern.serve.figures


def sample_names() -> set[str]:
    """Every name that a query may use, those that a histogram is made of among them."""
    found = set()
    for name, figure in (FIGURES | FLEET).items():
        ends = ("_bucket", "_sum", "_count") if figure.kind == "histogram" else ("",)
        found |= {f"{PREFIX}{name}{end}" for end in ends}
    return found


class Telemetry:
    """Counts, and tells.

    Args:
        model: The label ``model_name`` of every figure.
        clock: Seconds, for tests.
    """

    def __init__(self, model: str, *, clock: Callable[[], float] = time.monotonic):
        self.registry = CollectorRegistry()
        self._model, self._clock = model, clock
        self._guard = threading.Lock()
        self._last: dict[str, float] = {}  # render: when its last chunk was written
        self._made: dict[str, int] = {}
        self._kept: dict[str, float] = {}  # render: when its last checkpoint was written
        self._peak = 0
        self._jobs: Callable[[], Mapping[str, int]] = lambda: {}
        self._made_of = {name: self._figure(name) for name, one in FIGURES.items() if one.kind != "gauge"}
        self.registry.register(Levels(self._levels))

    def _figure(self, name: str) -> Any:
        figure, labels = FIGURES[name], ("model_name", *FIGURES[name].labels)
        if figure.kind == "histogram":
            made: Any = Histogram(PREFIX + name, figure.doc, labels, registry=self.registry, buckets=figure.buckets)
        else:
            made = Counter(PREFIX + name, figure.doc, labels, registry=self.registry)
        if not figure.labels:
            made.labels(self._model)  # told from the beginning, as 0
        return made

    def _of(self, name: str, *labels: str) -> Any:
        return self._made_of[name].labels(self._model, *labels)

    def write(self, event: str, *, render: str = "", **about: Any) -> None:
        """Count an event of a render.

        Args:
            event: Its name, as ``flexkern.render.watch`` has it; others are passed over.
            render: Which render it is of, where there are several.
            about: What the event says.
        """
        now = self._clock()
        with self._guard:
            if event == "started":
                self._last[render] = self._kept[render] = now
                self._made[render] = about["made"]
                if about["made"]:
                    self._of("resumes_total").inc()
                self._stage("prompt", about.get("prompt_seconds"))
            elif event == "switch":
                self._stage("prompt", about.get("seconds"))
            elif event == "chunk":
                self._of("chunk_latency_seconds").observe(now - self._last.get(render, now))
                self._last[render] = now
                self._of("pictures_total").inc(max(0, about["made"] - self._made.get(render, 0)))
                self._made[render] = about["made"]
                self._of("frames_total").inc(about.get("frames", 0))
                for stage in ("denoise", "decode", "encode"):
                    self._stage(stage, about.get(f"{stage}_seconds"))
                self._peak = max(self._peak, about.get("peak_bytes", 0))
            elif event == "checkpoint":
                self._kept[render] = now
                self._stage("checkpoint", about["copy_seconds"] + about["write_seconds"])
            elif event in ("finished", "failed"):
                self._of("renders_total", event).inc()
                self._forget(render)

    def _stage(self, stage: str, seconds: float | None) -> None:
        if seconds is not None:
            self._of("stage_latency_seconds", stage).observe(seconds)

    def _forget(self, render: str) -> None:
        for known in (self._last, self._made, self._kept):
            known.pop(render, None)

    def began(self, waited: float | None) -> None:
        """A video that was asked for is begun; None where it goes on."""
        if waited is not None:
            self._of("queue_time_seconds").observe(max(0.0, waited))

    def left(self, render: str) -> None:
        """A render is not being made any more, however it ended."""
        with self._guard:
            self._forget(render)

    def completed(self, seconds: float) -> None:
        """A video is whole, so many seconds after it was asked for."""
        self._of("e2e_latency_seconds").observe(max(0.0, seconds))

    def crashed(self) -> None:
        """A worker has ended with a video."""
        self._of("worker_crashes_total").inc()

    def retried(self) -> None:
        """A video is begun again."""
        self._of("retries_total").inc()

    def refused(self, reason: str) -> None:
        """A request was turned away."""
        self._of("refused_total", reason).inc()

    def count_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Ask this for the videos by status, whenever somebody asks."""
        self._jobs = counts

    def text(self) -> bytes:
        """All figures, as Prometheus reads them; their type is ``CONTENT_TYPE``."""
        return generate_latest(self.registry)

    def serve(self, port: int, host: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
        """Answer Prometheus from a thread, on a port or, where that is 0, on one that is free.

        Returns:
            The port, and what ends it.

        Raises:
            OSError: It cannot listen there.
        """
        return answer(self.registry, port, host)

    def _levels(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """What may go down as well as up: name, labels, value."""
        with self._guard:
            now, kept, peak = self._clock(), list(self._kept.values()), self._peak
        yield "peak_memory_bytes", (self._model,), float(peak)
        yield "checkpoint_age_seconds", (self._model,), now - min(kept) if kept else 0.0
        for status, count in self._jobs().items():
            yield "jobs", (self._model, status), float(count)


def answer(registry: CollectorRegistry, port: int, host: str) -> tuple[int, Callable[[], None]]:
    """As ``Telemetry.serve``, of any figures."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"figures for Prometheus cannot be told at {host}:{port}: {why}") from error

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, end


class Levels(Collector):
    """Gauges whose values are asked for when they are told."""

    def __init__(self, values: Callable[[], Iterator[tuple[str, tuple[str, ...], float]]]):
        self._values = values

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges, each with its values."""
        made: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self._values():
            figure = FIGURES[name]
            gauge = made.setdefault(
                name, GaugeMetricFamily(PREFIX + name, figure.doc, labels=("model_name", *figure.labels))
            )
            gauge.add_metric(labels, value)
        yield from made.values()
