"""The pictures of rooms: which frames are shown, and what is written."""

import csv

import pytest
import torch
from PIL import Image

from flexkern.demo import rooms, show_rooms
from flexkern.demo.film_rooms import Case
from flexkern.demo.measure_rooms import measure


@pytest.fixture(scope="module")
def case():
    return Case.random(scenes=2, frames=63, seed=1)


def test_a_sheet_shows_every_light_and_one_dark():
    at = show_rooms.shown(rooms.script(252))
    assert at == [0, 20, 33, 51, 87, 123, 159, 195, 231]
    assert [bool(rooms.script(252)[frame]) for frame in at] == [frame != 33 for frame in at]
    assert show_rooms.dark_seconds(rooms.script(63)) == [(21 / 16, 45 / 16), (57 / 16, 63 / 16)]


def test_methods_differ_as_their_names_say():
    found = show_rooms.methods()
    assert [found[name].retention.sink for name in found] == [0, 3, 3, 3]
    assert [found[name].position.mode for name in found] == ["none", "none", "pi", "by_parts"]
    assert {one.retention.window for one in found.values()} == {21}


def test_everything_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show_rooms, "load_engine", lambda weights, device: None)
    monkeypatch.setattr(show_rooms, "film", lambda engine, case, preset: case.truth().roll(1, 0))  # the other's room
    args = show_rooms.Args(weights=tmp_path / "none", out=tmp_path, videos=2, frames=63, seed=1)
    show_rooms.main(args, chosen=("plain window",))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (128 + 4 * 102 - 6, 40 + 2 * 102 - 6)
    # the first row, second column: the truth at frame 20
    expected = show_rooms.tiles(case.truth()[0, 20:21], 96)[0].getpixel((48, 48))
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
    found = show_rooms.lines({"truth": measure(case.truth(), case)}, 21)
    assert all(found["truth"][name].shape == (2, 63) for name, *_ in show_rooms.PANELS)
    assert torch.tensor(found["truth"]["palette"]).nan_to_num(1).min() > 0.6
