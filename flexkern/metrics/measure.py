"""A video's figures: curves over time, and one number for each.

    report = measure("video.mp4")
    report.summary["sharpness_drift"]        # one number
    report.curves["sharpness"]               # float64 [T]

Pictures stream through: what stays in memory is some 1.3 kB for each, and at the end some 6 kB.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flexkern.checks import shown
from flexkern.metrics import curves, vision
from flexkern.metrics.curves import Curve
from flexkern.metrics.video import as_array, as_pictures, inspect_video, read_pictures
from flexkern.metrics.vision import Grey, Picture
from flexkern.metrics.weights import BATCH, Consistency, Model, Score

SINK_PICTURES = 9  # three latent frames of Wan's VAE
CHUNK_PICTURES = 12
STILLS = 4  # pictures of the first second that structure is compared with
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure's name, unit and direction; ``measured_by`` defines it in its docstring, with the source."""

    name: str
    title: str
    unit: str
    better: Better
    measured_by: Callable[..., Any]

    @property
    def definition(self) -> str:
        """The docstring that defines the figure."""
        return inspect.getdoc(self.measured_by) or ""


def _metric(name: str, title: str, unit: str, better: Better, measured_by: Callable[..., Any]) -> tuple[str, Metric]:
    return name, Metric(name=name, title=title, unit=unit, better=better, measured_by=measured_by)


CURVES: dict[str, Metric] = dict((
    _metric("sharpness", "Sharpness", "dB", "higher", vision.sharpness),
    _metric("exposure", "Exposure", "0..1", "neither", vision.exposure),
    _metric("palette", "Palette, from the first second", "CIELAB", "lower", vision.palette_distance),
    _metric("structure", "Structure, to the first second", "SSIM", "higher", vision.structure),
    _metric("motion", "Motion (dynamic degree)", "% of diagonal per picture", "higher", vision.motion),
    _metric("flicker", "Temporal flickering", "0..1", "higher", vision.flicker),
))  # fmt: skip
"""Figures of a single picture or of neighbours: their summaries are mean, drift and change."""

LEARNED: dict[str, Metric] = dict((
    _metric("subject", "Subject consistency", "0..1", "higher", Consistency),
    _metric("background", "Background consistency", "0..1", "higher", Consistency),
    _metric("imaging", "Imaging quality", "the model's", "higher", Score),
))  # fmt: skip
"""The same, from weights that the user hands in."""

WHOLE: dict[str, Metric] = dict((
    _metric("chunk_discontinuity", "Chunk discontinuity", "of the mean motion", "lower", curves.chunk_discontinuity),
    _metric("sink_collapse", "Sink collapse", "0..1", "lower", curves.sink_collapse),
    _metric("loop", "Loop", "0..1", "lower", curves.find_loop),
))  # fmt: skip
"""Figures of a whole video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one video.

    curves: [T] each, by name; beside those of ``CURVES`` there are ``sink_distance`` and ``repeats``, which
    ``sink_collapse`` and ``loop`` are read from. summary: one number each, by name; a curve M has M (its mean), M_drift
    and M_change. events: seconds of dips to the sink, and the length of the loop, if any.
    """

    fps: float
    pictures: int
    curves: dict[str, Curve]
    summary: dict[str, float]
    events: dict[str, list[float]]

    def __repr__(self) -> str:
        figures = f"{len(self.curves)} curves, {len(self.summary)} numbers"
        return f"Report({self.pictures} pictures at {self.fps:g} a second: {figures})"


def validate_reports(reports: object) -> None:
    """Raises ValueError unless there are reports, by name."""
    if isinstance(reports, Report):
        raise ValueError('reports must be a mapping of names to reports, got one report: pass {"video": report}')
    if not isinstance(reports, Mapping) or not reports:
        raise ValueError(f"reports must be a mapping of names to reports, at least one, got {shown(reports)}")


@dataclass(slots=True)
class Meter:
    """Takes pictures as they come and keeps what the figures need; ``report`` ends it.

    fps: pictures per second. sink_pictures: the first pictures, which a sink would call back. learned: models by a name
    of ``LEARNED``.
    """

    fps: float
    sink_pictures: int = SINK_PICTURES
    learned: Mapping[str, Model] = field(default_factory=dict)
    _values: dict[str, list[float]] = field(default_factory=dict, init=False)
    _thumbnails: list[Grey] = field(default_factory=list, init=False)
    _first: list[tuple[Grey, Grey]] = field(default_factory=list, init=False)  # composition and palette
    _before: tuple[Picture, Picture] | None = field(default=None, init=False)  # a picture, and what motion sees of it
    _waiting: list[Picture] = field(default_factory=list, init=False)
    _models: dict[str, Consistency | Score] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.sink_pictures < 1:
            raise ValueError(f"sink_pictures must be at least 1, got {self.sink_pictures}")
        if unknown := [name for name in self.learned if name not in LEARNED]:
            raise ValueError(f"learned metrics are {', '.join(LEARNED)}, got {', '.join(unknown)}")
        self._values = {name: [] for name in (*CURVES, *self.learned, "sink_distance")}
        self._models = {name: LEARNED[name].measured_by(model) for name, model in self.learned.items()}

    def add(self, picture: Picture) -> None:
        """Take the next picture, uint8 [H, W, 3] in RGB. Raises ValueError where its size or dtype is another."""
        before, picture = self._before, as_array(picture)
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"a picture must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
        if before is not None and picture.shape != before[0].shape:
            raise ValueError(f"pictures must be of one size, {list(before[0].shape)}, got {list(picture.shape)}")
        grey, settled = vision.luma(picture), vision.settle(picture)
        self._note("sharpness", vision.sharpness(picture))
        self._note("exposure", vision.exposure(picture))
        self._note("motion", float("nan") if before is None else vision.motion(before[1], settled))
        self._note("flicker", float("nan") if before is None else vision.flicker(before[0], picture))
        self._thumbnails.append(vision.thumbnail(grey))
        self._compare(vision.shrink(grey, vision.COMPOSITION), vision.palette(picture))
        self._before = picture, settled
        if self._models:
            self._waiting.append(picture)
            if len(self._waiting) == BATCH:
                self._look()

    def report(self, chunk_pictures: int = CHUNK_PICTURES) -> Report:
        """Return the figures of all pictures taken.

        Args:
            chunk_pictures: pictures that a model makes at a time, which tell how many seams there are.

        Raises:
            ValueError: there are fewer than two chunks, or fewer than two pictures.
        """
        count = len(self._thumbnails)
        validate_length(count, chunk_pictures)
        self._settle_first()
        self._look()
        found = {name: np.array(values) for name, values in self._values.items()}
        sink = curves.sink_collapse(found["sink_distance"], self.fps)
        loop = curves.find_loop(np.stack(self._thumbnails), self.fps)
        summary = {}
        for name in (*CURVES, *self._models):
            summary[name] = curves.mean(found[name])
            summary[f"{name}_drift"] = curves.drift(found[name])
            summary[f"{name}_change"] = curves.change(found[name], self.fps)
        chunks = -(-count // chunk_pictures)
        summary["chunk_discontinuity"] = curves.chunk_discontinuity(found["motion"], chunks)
        summary |= {"sink_collapse": sink.collapse, "loop": loop.strength}
        events = {"sink_dips": [dip / self.fps for dip in sink.dips], "loop": [loop.lag / self.fps] * (loop.lag > 0)}
        found |= {"sink_distance": sink.distance, "repeats": loop.repeats}
        return Report(fps=self.fps, pictures=count, curves=found, summary=summary, events=events)

    def _note(self, name: str, *values: float) -> None:
        self._values[name].extend(values)

    def _compare(self, composition: Grey, palette: Grey) -> None:
        """Compare with the first second and with the sink, once both have been seen."""
        number, opening = len(self._thumbnails) - 1, max(round(self.fps), self.sink_pictures)
        if number < opening:
            self._first.append((composition, palette))
            return
        self._settle_first()
        self._note_comparison(number, composition, palette)

    def _settle_first(self) -> None:
        """Compare the first pictures, which waited until all of them were there; nothing where that is done."""
        for number in range(len(self._values["structure"]), len(self._first)):
            self._note_comparison(number, *self._first[number])

    def _note_comparison(self, number: int, composition: Grey, palette: Grey) -> None:
        second = self._first[: max(1, round(self.fps))]
        stills = [second[round(at)][0] for at in np.linspace(0, len(second) - 1, min(STILLS, len(second)))]
        self._note("structure", float(np.mean([vision.structure(still, composition) for still in stills])))
        reference = np.mean([other for _, other in second], axis=0)
        self._note("palette", vision.palette_distance(reference, palette))
        sinks = [other for other, _ in self._first[: self.sink_pictures]]
        near = min(vision.distance(other, composition) for other in sinks)
        self._note("sink_distance", float("nan") if number < self.sink_pictures else near)

    def _look(self) -> None:
        """Show the models the pictures that wait."""
        if self._waiting:
            batch = np.stack(self._waiting)
            self._waiting.clear()
            for name, model in self._models.items():
                self._note(name, *model(batch).tolist())


def validate_length(pictures: int, chunk_pictures: int) -> None:
    """Raises ValueError for a video that is too short to be measured, or chunks of nothing.

    Args:
        pictures: how many the video holds.
        chunk_pictures: pictures that a model makes at a time.
    """
    if chunk_pictures < 1:
        raise ValueError(f"a chunk must hold at least 1 picture, got {chunk_pictures}")
    if pictures < 2 * chunk_pictures:
        raise ValueError(
            f"a video must hold at least two chunks of {chunk_pictures} pictures, {2 * chunk_pictures} in all, "
            f"got {pictures}"
        )


def measure(
    video: str | Path | NDArray[np.uint8] | Iterable[Picture],
    *,
    fps: float | None = None,
    sink_pictures: int = SINK_PICTURES,
    chunk_pictures: int = CHUNK_PICTURES,
    learned: Mapping[str, Model] | None = None,
) -> Report:
    """Return the figures of a video.

    Args:
        video: a file; pictures uint8 [T, H, W, 3] in RGB, an array or a tensor; or any iterable of uint8 [H, W, 3],
            read once.
        fps: pictures per second; needed for pictures, read from a file.
        sink_pictures: the first pictures, which a sink would call back: 9 are three latent frames of Wan.
        chunk_pictures: pictures that the model makes at a time.
        learned: embedders ``subject`` and ``background`` and a scorer ``imaging``, by name: models that the user has.

    Returns:
        Curves, one number for each, and events.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video, pictures came without fps, or there are fewer than two chunks of them.
    """
    if isinstance(video, str | Path):
        fps = fps or inspect_video(video).fps
        pictures: Iterable[Picture] = read_pictures(video)
    else:
        pictures = as_pictures(video) if hasattr(video, "dtype") else video
    if fps is None:
        raise ValueError("pictures do not say how many are shown per second: pass fps")
    meter = Meter(fps, sink_pictures, learned or {})
    for picture in pictures:
        meter.add(picture)
    return meter.report(chunk_pictures)
