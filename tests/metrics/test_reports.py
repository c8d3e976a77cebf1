"""Files in, tables, curves and sheets out; and the two commands."""

import csv
import json
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

for package in ("av", "cv2", "matplotlib", "tyro", "tqdm"):
    pytest.importorskip(package, reason='needs pip install "flexkern[metrics]"')

import matplotlib.figure
import matplotlib.image
import tyro
from footage import CHUNK, FPS, clean, repeat
from matplotlib.text import Text

from flexkern.cli.metrics import Metrics, aligned
from flexkern.cli.sheet import Sheet
from flexkern.metrics import (
    contact_sheet,
    inspect_video,
    measure,
    pictures_at,
    read_pictures,
    table,
    write_curves,
    write_json,
    write_summary,
)
from flexkern.metrics.plot import clock, plot_curves
from flexkern.metrics.sheet import moments
from flexkern.policies import PRESETS, get_preset
from flexkern.render import VideoWriter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two videos of 12 and of 4 seconds."""
    folder = tmp_path_factory.mktemp("videos")
    for name, pictures in (("long", repeat()), ("short", clean()[: 4 * FPS])):
        with VideoWriter(folder / f"{name}.mp4", 96, 64, fps=FPS) as writer:
            writer.write(pictures)
    return folder / "long.mp4", folder / "short.mp4"


def test_tensors_are_pictures_too():
    """A session's chunks are: what measures their array measures them, and the error names what is wrong."""
    torch, pictures = pytest.importorskip("torch"), clean()[: 2 * CHUNK]
    found = measure(pictures, fps=FPS)
    for given in (torch.from_numpy(pictures), list(torch.from_numpy(pictures))):
        assert measure(given, fps=FPS).summary == pytest.approx(found.summary, nan_ok=True)
    for wrong in (torch.from_numpy(pictures)[None], torch.from_numpy(pictures).float(), torch.zeros(24, 3, 64, 96)):
        with pytest.raises(ValueError, match=r"pictures must be uint8 \[T, H, W, 3\], got (torch.float32|uint8) \["):
            measure(wrong, fps=FPS)


def test_reports_come_by_name(tmp_path):
    report = measure(clean()[: 2 * CHUNK], fps=FPS)
    shown = (
        f"Report({2 * CHUNK} pictures at {FPS} a second: {len(report.curves)} curves, {len(report.summary)} numbers)"
    )
    assert repr(report) == shown
    writers = [partial(write, tmp_path / "a") for write in (plot_curves, write_curves, write_json, write_summary)]
    for use in (*writers, table):
        with pytest.raises(ValueError, match='got one report: pass {"video": report}'):
            use(report)
        for wrong in ({}, [report], None):
            with pytest.raises(ValueError, match="reports must be a mapping of names to reports, at least one, got"):
                use(wrong)
    assert not any(tmp_path.iterdir())


def run(command, *words, capsys):
    """Runs a command: (status, stdout, stderr)."""
    try:
        status = tyro.cli(command, args=[str(word) for word in words]).run()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_a_file_is_read_as_it_was_written(files):
    file = inspect_video(files[0])
    assert (file.fps, file.width, file.height, file.seconds, file.pictures) == (FPS, 96, 64, 12, 144)
    read = np.stack(list(read_pictures(files[0])))
    assert read.shape == (144, 64, 96, 3) and np.abs(read.astype(int) - repeat()).mean() < 5


def test_pictures_at_moments_are_those_of_the_file(files):
    whole = list(read_pictures(files[1]))
    at = [0, 1 / FPS, 2.5, 47 / FPS, 1.0]
    for moment, picture in zip(at, pictures_at(files[1], at), strict=True):
        assert np.array_equal(picture, whole[round(moment * FPS)]), moment
    assert pictures_at(files[1], [4.2, 100]) == [None, None]


def test_pictures_stream_through():
    """No more than two are held: the one at hand and the one before."""
    alive, most = weakref.WeakSet(), []

    class Picture(np.ndarray):
        __hash__ = object.__hash__

    def stream():
        for number in range(60):
            picture = np.full((16, 24, 3), number, np.uint8).view(Picture)
            alive.add(picture)
            most.append(len(alive))
            yield picture
            del picture

    measure(stream(), fps=10)
    assert len(most) == 60 and max(most) <= 2


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        (
            clean()[:23],
            {"fps": 12},
            f"at least two chunks of {CHUNK} pictures, {2 * CHUNK} in all, got 23",
        ),
        (clean()[:30], {}, "pictures do not say how many are shown per second: pass fps"),
        (clean()[:30], {"fps": 0}, "pictures do not|fps must be above 0"),
        (clean()[:30, ..., 0], {"fps": 12}, r"pictures must be uint8 \[T, H, W, 3\], got uint8 \[30, 64, 96\]"),
        (clean()[:30] / 255, {"fps": 12}, r"got float64 \[30, 64, 96, 3\]"),
        ([clean()[0], clean()[0, :32]], {"fps": 12}, r"of one size, \[64, 96, 3\], got \[32, 96, 3\]"),
        (clean()[:30], {"fps": 12, "sink_pictures": 0}, "sink_pictures must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        measure(pictures, **options)


def test_metrics_of_two_videos(files, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, wrong = run(Metrics, *files, "--out", out, "--preset", "flex", "--horizon", 5, capsys=capsys)
    assert status == 0 and not wrong
    lines = said.splitlines()
    assert lines[0].split() == ["long", "short"] and "loop lasts" in said and "2.33" in said

    summary = list(csv.DictReader((out / "summary.csv").open()))
    loops = {row["video"]: float(row["value"]) for row in summary if row["metric"] == "loop"}
    assert loops["long"] > 0.5 > loops["short"] and len(summary) == 2 * (len(lines) - 5)
    curves = list(csv.DictReader((out / "curves.csv").open()))
    assert [row["video"] for row in curves].count("short") == 48 and len(curves) == 192
    assert curves[0]["motion"] == "" and float(curves[1]["motion"]) > 0 and float(curves[0]["sink_alignment"]) == 1
    told = json.loads((out / "metrics.json").read_text())
    assert told["videos"]["long"]["summary"]["loop"] == pytest.approx(loops["long"], rel=1e-5)
    assert told["metrics"]["flicker"]["better"] == "higher" and "VBench" in told["metrics"]["flicker"]["definition"]
    assert matplotlib.image.imread(out / "curves.png").shape[:2] > (600, 600)


def test_models_reach_the_command(files, capsys):
    status, said, _ = run(Metrics, files[1], "--models", "imaging", f"{__name__}:missing", capsys=capsys)
    assert status == 2 and said == ""
    status, said, _ = run(Metrics, files[1], "--models", "imaging", "flexkern.metrics.vision:nothing", capsys=capsys)
    assert status == 2
    status, said, _ = run(Metrics, files[1], "--models", "imaging", "builtins:len", capsys=capsys)
    assert status == 2  # one number for a batch is no score of each


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.mp4"], "there is no video missing.mp4"),
        ([__file__], "is no video that FFmpeg reads"),
        ([], "expected at least one video, got none"),
        (["a.mp4", "b.mp4", "--names", "one"], "names must be 2 different ones, one per video, got one"),
        (["a.mp4", "--preset", "flux"], "no preset 'flux'"),
        (["a.mp4", "--preset", "self-forcing"], "preset 'self-forcing' keeps no sink"),
    ],
)
def test_metrics_refuses_in_one_line(words, message, capsys):
    status, said, wrong = run(Metrics, *words, capsys=capsys)
    assert status == 2 and said == "" and wrong.startswith("flexkern: error:") and message in wrong
    assert wrong.count("\n") == 1


def test_a_video_that_cannot_be_measured_is_named_before_the_others_are(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flexkern.metrics.measure", lambda *_, **__: pytest.fail("a video was measured"))
    out, short = tmp_path / "out", tmp_path / "brief.mp4"
    with VideoWriter(short, 96, 64, fps=FPS) as writer:
        writer.write(clean()[:10])
    for words, message in (
        ([short], "brief.mp4: a video must hold at least two chunks of 12 pictures, 24 in all, got 10"),
        (["--chunk", 0], f"{files[0]}: a chunk must hold at least 1 picture, got 0"),
        (["--horizon", "nan"], "--horizon must be seconds above 0, got nan"),
        (["--sink", 0], "--sink must be at least 1 picture, got 0"),
        ([tmp_path], f"{tmp_path} is a folder, not a video"),
    ):
        status, said, wrong = run(Metrics, files[0], *words, "--out", out, capsys=capsys)
        assert status == 2 and said == "" and message in wrong and not out.exists()
    status, _, wrong = run(Metrics, files[0], "--out", short, capsys=capsys)
    assert status == 2 and f"cannot write to {short}: it is a file" in wrong


def test_names_and_titles_are_text_in_pictures(files, tmp_path, monkeypatch):
    """matplotlib hides labels that begin with an underscore, and reads mathematics between dollars."""
    shown = []

    def keep(figure, *_, **__):
        figure.canvas.draw()  # mathematics is parsed here, and labels of ticks are written
        shown.append([text.get_text() for text in figure.findobj(Text) if text.get_text()])

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    names, title = ("_under", "$x^2$"), r"$\frac{$ and _x_"
    report = measure(clean()[:30], fps=12)
    plot_curves(tmp_path / "curves.png", dict.fromkeys(names, report), title=title)
    contact_sheet(tmp_path / "sheet.png", dict(zip(names, files, strict=True)), title=title)
    for texts in shown:
        assert {*names, title} <= set(texts)
    assert len(shown) == 2


def test_a_sheet_has_a_row_per_video_and_a_column_per_moment(files, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    status, said, wrong = run(Sheet, *files, "--out", out, "--columns", 5, "--tile", 96, capsys=capsys)
    assert status == 0 and said.strip() == str(out) and not wrong
    sheet = np.rint(255 * matplotlib.image.imread(out)[..., :3]).astype(int)
    left, top = sheet.shape[1] - 14 - (5 * 104 - 8), 46
    shown = pictures_at(files[0], moments(143 / FPS, 5))
    for column, picture in enumerate(shown):
        tile = sheet[top : top + 64, left + 104 * column : left + 104 * column + 96]
        assert np.array_equal(tile, picture)
    assert (sheet[top : top + 64, : left - 4] < 128).any() and (sheet[top + 72 : top + 136, : left - 4] < 128).any()
    second = sheet[top + 72 : top + 136, left:]
    assert np.array_equal(second[:, :96], pictures_at(files[1], [0])[0])
    assert (second[:10, 4 * 104 : 4 * 104 + 96] == 242).all()  # the short video is over


def test_a_sheet_refuses_in_one_line(files, tmp_path, capsys):
    for words, message in (
        ([files[0], "--out", tmp_path / "sheet.jpg"], "the sheet must be named .png, got 'sheet.jpg'"),
        ([files[0], "--out", tmp_path / "no" / "sheet.png"], "there is no folder"),
        ([files[0], "--out", tmp_path / "s.png", "--columns", 0], "columns must be at least 1"),
        (["missing.mp4", "--out", tmp_path / "s.png"], "there is no video missing.mp4"),
    ):
        status, _, wrong = run(Sheet, *words, capsys=capsys)
        assert status == 2 and message in wrong and wrong.count("\n") == 1
    with pytest.raises(ValueError, match="at must list seconds of at least 0"):
        contact_sheet(tmp_path / "s.png", {"a": files[0]}, at=[-1])


def test_moments_are_round_where_they_can_be():
    assert moments(60.9, 7) == [0, 10, 20, 30, 40, 50, 60]
    assert moments(3599.9, 7) == pytest.approx([599.98 * number for number in range(7)], rel=1e-3)
    assert moments(11.9, 8) == pytest.approx(np.arange(8) * 1.7) and moments(5, 1) == [0]
    assert [clock(t) for t in (0, 7.5, 12, 185, 3600)] == ["0 s", "7.5 s", "12 s", "3:05", "1:00:00"]
    assert [clock(t, minutes_from=60) for t in (59.5, 61.7, 122.4)] == ["59.5 s", "1:02", "2:02"]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.retention.pinned])
def test_every_preset_with_a_sink_says_how_near_it_is(name):
    values = aligned(get_preset(name), SimpleNamespace(pictures=200))
    assert values.shape == (200,) and values[0] == 1 and (values >= 0).all() and (values <= 1 + 1e-9).all()
