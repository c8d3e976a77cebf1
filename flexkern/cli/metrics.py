"""``flexkern metrics``: figures of videos over time, side by side."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flexkern.cli.errors import refusing
from flexkern.policies import Preset, get_preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flexkern.metrics import Report, VideoFile
    from flexkern.metrics.vision import Picture


def option(metavar: str) -> Any:
    """An option that may be left out; its help says what then holds."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(kw_only=True)
class Metrics:
    """Measure videos: sharpness, exposure, palette, structure, motion, flicker; drift, jumps, sink collapse, loops.

    Prints one number per figure and video. With --out, a folder gets summary.csv, curves.csv, metrics.json, curves.png.
    """

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, option("VIDEO...")]
    """files that FFmpeg reads, one or more"""

    out: Annotated[Path | None, option("FOLDER")] = None
    """where tables and curves go, made if it is not there; default: nowhere"""

    names: Annotated[tuple[str, ...], option("NAME...")] = ()
    """one per video, for tables and legend; default: the files' names"""

    preset: Annotated[str | None, option("NAME")] = None
    """adds where its positions call the model back to the sink, and takes its sink's length"""

    horizon: Annotated[float | None, option("SECONDS")] = None
    """training horizon, which the plot marks"""

    chunk: Annotated[int, option("PICTURES")] = 12
    """pictures that the model makes at a time; default: 12"""

    sink: Annotated[int | None, option("PICTURES")] = None
    """first pictures, to which a video may fall back; default: the preset's, else 9"""

    title: Annotated[str, option("TEXT")] = ""
    """above the plot"""

    models: Annotated[dict[str, str], option("METRIC WHERE")] = field(default_factory=dict)
    """subject, background or imaging, each with a folder of transformers or module:name; nothing is downloaded"""

    def run(self) -> int:
        with refusing(ValueError, OSError):
            from flexkern.metrics import inspect_video, load_model, measure, table
            from flexkern.metrics.measure import validate_length

            named = label(self.videos, self.names)
            if self.horizon is not None and not (0 < self.horizon < math.inf):
                raise ValueError(f"--horizon must be seconds above 0, got {self.horizon}")
            if self.sink is not None and self.sink < 1:
                raise ValueError(f"--sink must be at least 1 picture, got {self.sink}")
            preset = preset_with_sink(self.preset) if self.preset else None
            files = {name: inspect_video(path) for name, path in named.items()}
            for file in files.values():
                with naming(file.path):
                    validate_length(file.pictures or 2 * self.chunk, self.chunk)  # some files do not say it
            own = 9 if preset is None else 1 + 4 * (preset.retention.pinned - 1)
            sink = own if self.sink is None else self.sink
            if self.out is not None:
                from flexkern.render.target import make_folder

                make_folder(self.out)
            learned = {name: load_model(where) for name, where in self.models.items()}
            reports = {}
            for name, file in files.items():
                with naming(file.path):
                    reports[name] = measure(
                        followed(file, name), fps=file.fps, sink_pictures=sink, chunk_pictures=self.chunk,
                        learned=learned,
                    )  # fmt: skip
                if preset is not None:
                    reports[name].curves["sink_alignment"] = aligned(preset, reports[name])
            print("\n".join(table(reports)))
            if self.out is not None:
                self._write(self.out, reports)
        return 0

    def _write(self, folder: Path, reports: "dict[str, Report]") -> None:
        from flexkern.metrics import plot_curves, write_curves, write_json, write_summary

        write_summary(folder / "summary.csv", reports)
        write_curves(folder / "curves.csv", reports)
        write_json(folder / "metrics.json", reports)
        plot_curves(folder / "curves.png", reports, horizon=self.horizon, title=self.title)
        print(f"\n{folder}: summary.csv, curves.csv, metrics.json, curves.png")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file before what a ValueError says of its video."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def label(videos: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """Files by the names given, or by their own without ending, or by their paths where those are alike.

    Raises ValueError where there is no video, names are not one per video, or two are the same.
    """
    if not videos:
        raise ValueError("expected at least one video, got none")
    stems = [path.stem for path in videos]
    chosen = list(names) or (stems if len(set(stems)) == len(stems) else [str(path) for path in videos])
    if len(chosen) != len(videos) or len(set(chosen)) != len(chosen):
        raise ValueError(f"names must be {len(videos)} different ones, one per video, got {', '.join(chosen)}")
    return dict(zip(chosen, videos, strict=True))


def followed(file: "VideoFile", name: str) -> "Iterator[Picture]":
    """The pictures of a file, with a bar on a terminal that says how far they are."""
    from tqdm import tqdm

    from flexkern.metrics import read_pictures

    yield from tqdm(read_pictures(file.path), name, file.pictures, leave=False, disable=None, unit=" pictures")


def preset_with_sink(name: str) -> Preset:
    """The preset. Raises ValueError for an unknown one, or one without a sink."""
    preset = get_preset(name)
    if preset.retention.pinned < 1:
        raise ValueError(f"preset {name!r} keeps no sink, so there is nothing that it could be called back to")
    return preset


def aligned(preset: Preset, report: "Report") -> "NDArray[np.float64]":
    """The alignment of the sink that the preset's positions predict, per picture of the video."""
    from flexkern.metrics import latent_frames, per_picture, sink_alignment

    frames = latent_frames(report.pictures)
    return per_picture(sink_alignment(preset, frames), report.pictures)
