"""The pictures of rooms: which frames are shown, and what is written."""

import csv

import pytest
import torch
from PIL import Image

from flexkern.demo import __main__ as shown
from flexkern.demo import picture, rooms
from flexkern.demo.film_rooms import Case
from flexkern.demo.measure_rooms import measure


@pytest.fixture(scope="module")
def case():
    return Case.random(scenes=2, frames=63, seed=1)


def test_a_sheet_shows_every_light_and_one_dark():
    at = picture.shown(rooms.script(252))
    assert at == [0, 20, 33, 51, 87, 123, 159, 195, 231]
    assert [bool(rooms.script(252)[frame]) for frame in at] == [frame != 33 for frame in at]
    long = picture.shown(rooms.script(2520))
    assert len(long) == 9 and long[:3] == [0, 20, 33] and long[-1] > 2450
    assert picture.dark_seconds(rooms.script(63)) == [(21 / 16, 45 / 16), (57 / 16, 63 / 16)]


def test_methods_differ_as_their_names_say():
    found = {name: shown.method(name) for name in shown.METHODS}
    assert [found[name].retention.sink for name in found] == [0, 3, 3, 3]
    assert [found[name].position.mode for name in found] == ["none", "none", "pi", "by_parts"]
    assert {one.retention.window for one in found.values()} == {21}


def test_everything_is_written(case, tmp_path, monkeypatch, capsys):
    other = lambda args, case, presets: {name: case.truth().roll(1, 0) for name in presets}  # the other's room
    monkeypatch.setattr(shown, "film_all", other)
    shown.main(shown.Args(out=tmp_path, methods=["plain window"], videos=2, frames=63, seed=1))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (128 + 4 * 102 - 6, 40 + 2 * 102 - 6)
    # the first row, second column: the truth at frame 20
    expected = picture.tiles(case.truth()[0, 20:21], 96)[0].getpixel((48, 48))
    assert sheet.getpixel((128 + 102 + 48, 40 + 48)) == expected
    moving = Image.open(tmp_path / "films.webp")
    assert moving.n_frames == 32 and moving.size == (2 * 158 - 6, 176)
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    ground = {row["method"]: float(row["mean"]) for row in rows if row["figure"] == "ground"}
    assert ground["truth"] < 1e-4 < 0.1 < ground["plain window"]
    assert {(row["first_frame"], row["last_frame"]) for row in rows} == {("21", "62")}
    assert "frames 21 to 62" in capsys.readouterr().out


def test_curves_have_a_panel_for_each_figure(case):
    found = shown.lines({"truth": measure(case.truth(), case)}, 21)
    assert all(found["truth"][name].shape == (2, 63) for name, *_ in picture.PANELS)
    assert torch.tensor(found["truth"]["palette"]).nan_to_num(1).min() > 0.6
