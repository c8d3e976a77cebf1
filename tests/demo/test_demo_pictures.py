"""The demo's pictures, its figures over many prompts, and the whole of it at a tiny size with an untrained model."""

import csv
import dataclasses
import json
import math
import os
import runpy
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flexkern import demo
from flexkern.demo import __main__ as demo_main
from flexkern.demo import evaluate, film_rooms, world
from flexkern.demo.__main__ import Args, film_all, main, method, threads_of_torch
from flexkern.demo.evaluate import WORLD, Spread, held_out_scenes, windows
from flexkern.demo.film_rooms import Case, film
from flexkern.demo.film_rooms import load_engine as load_rooms
from flexkern.demo.picture import drift_plot, mean_and_error
from flexkern.demo.train import CONFIG
from flexkern.model.wan import CausalWan


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model that is small and paints noise: what the demo does with it is the same."""
    path = tmp_path_factory.mktemp("model") / "untrained.safetensors"
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_layers=1, ffn_dim=64)
    save_file(CausalWan(config).state_dict(), path, {"flexkern_config": json.dumps(config.to_dict())})
    return path


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def shares(path, colour):
    """Share of a picture's pixels near a colour, column by column."""
    return (np.abs(pixels(path) - np.array(colour)).max(-1) < 12).mean(0)


def test_drift_plot_draws_every_line(tmp_path):
    frames = 30
    level = lambda value: {name: np.full((3, frames), value) for name in ("ground", "palette", "course", "speed")}
    colours = [(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)]
    path = tmp_path / "drift.png"
    drift_plot(path, {"a": level(0.2), "b": level(0.7)}, fps=16, horizon=21, window=5, title="t")
    both = [shares(path, colour).sum() for colour in colours]
    drift_plot(path, {"a": level(0.2)}, fps=16, horizon=21, window=5, title="t")
    one = [shares(path, colour).sum() for colour in colours]
    assert min(both) > 1 and one[0] > 1 and one[1] == 0
    with pytest.raises(ValueError, match="at least one line"):
        drift_plot(path, {}, fps=16, horizon=21, window=5, title="t")


def test_mean_and_error_leave_out_what_is_unknown():
    mean, error = mean_and_error(np.array([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan]]))
    assert mean[:2].tolist() == [2, 2] and math.isnan(mean[2])
    assert error.tolist() == [pytest.approx(1), 0, 0]  # sqrt(2) / sqrt(2)


def test_spread_is_that_of_the_known_values():
    spread = Spread.of(torch.tensor([0.0, 1.0, 0.0, 1.0, math.nan]))
    assert (spread.mean, spread.count) == (0.5, 4)
    assert spread.interval == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert Spread.of(torch.tensor([math.nan])).count == 0 and "nan" in str(Spread.of(torch.tensor([])))


def test_windows_cover_the_video():
    assert windows(21) == [(0, 21)] and windows(63) == [(0, 21), (21, 42), (42, 63)]
    assert windows(50) == [(0, 21), (21, 42), (29, 50)] and windows(6) == [(0, 6)]


def test_scenes_to_evaluate_are_held_out_and_differ():
    scenes = held_out_scenes(64)
    assert all(map(world.held_out, scenes)) and len(set(map(str, scenes))) == 64
    assert list(map(str, scenes)) == list(map(str, held_out_scenes(64)))
    with pytest.raises(ValueError, match="1 to 511 clips.*got 9999"):
        held_out_scenes(9999)


def test_a_clip_does_not_depend_on_its_batch(weights):
    engine = evaluate.load_engine(weights)
    scenes = held_out_scenes(3)
    alone, together = (evaluate.render_clips(engine, scenes, "flex", 4, 7, batch=batch) for batch in (1, 3))
    assert alone.shape == (3, 4, 3, world.SIZE, world.SIZE)
    assert torch.allclose(alone, together, atol=1e-4)


def test_evaluate_prints_and_writes_the_same_figures(weights, tmp_path, capsys):
    out = tmp_path / "figures.csv"
    marks = evaluate.evaluate(
        evaluate.Args(clips=3, frames=24, presets=["self-forcing", "flex"], weights=weights, out=out)
    )
    assert list(marks) == [WORLD, "self-forcing", "flex"]
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    spans = {(int(row["first_frame"]), int(row["last_frame"])) for row in rows}
    assert spans == {(0, 20), (3, 23), (0, 23)}
    ceiling = {row["figure"]: row for row in rows if row["source"] == WORLD and row["last_frame"] == "20"}
    assert float(ceiling["identity"]["mean"]) > 0.95 and ceiling["identity"]["clips"] == "3"
    assert "| frames 0 to 20 | world | self-forcing | flex |" in printed
    assert "| difference to self-forcing | flex |" in printed


def test_make_demo_writes_everything(tmp_path, capsys):
    """The shipped model, a few frames: two methods at a time, the second from another thread."""
    out = tmp_path / "deep" / "demo"
    before = torch.get_num_threads()
    main(Args(out=out, frames=25, methods=["plain window", "lol"], videos=1))
    names = {"plain-window.mp4", "lol.mp4", "truth.mp4", "sheet.png", "films.webp", "curves.png", "figures.csv"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("truth", "lol"):
        with av.open(str(out / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 25
    assert "frames 21 to 24" in capsys.readouterr().out and torch.get_num_threads() == before


def test_films_of_several_threads_are_those_of_one(capsys):
    case = Case.random(scenes=2, frames=9, seed=5)
    presets = {name: method(name) for name in ("sink", "flex")}
    found = film_all(Args(frames=9), case, presets)
    assert "18 of 18 frames (100 %)" in capsys.readouterr().err
    with threads_of_torch(1):
        for name, preset in presets.items():
            assert torch.equal(found[name], film(load_rooms(), case, preset))


def test_a_fault_in_one_method_ends_the_others(monkeypatch):
    def chunks(engine, case, preset):
        if preset.retention.sink:
            raise ValueError("a fault")
        yield from film_chunks(engine, case, preset)

    film_chunks = demo_main.film_chunks
    monkeypatch.setattr(demo_main, "film_chunks", chunks)
    case = Case.random(scenes=1, frames=2520, seed=5)
    with pytest.raises(ValueError, match="a fault"):  # at once: 2520 frames take minutes
        film_all(Args(frames=2520), case, {name: method(name) for name in ("flex", "plain window")})


@pytest.mark.parametrize("name", ["flux", "plain"])
def test_an_unknown_method_is_refused_before_any_work(name, tmp_path):
    with pytest.raises(ValueError, match=f"no preset '{name}'"):
        main(Args(out=tmp_path / "none", methods=["flex", name]))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("module", ["flexkern.demo", "flexkern.demo.evaluate", "flexkern.demo.train"])
def test_ctrl_c_ends_with_one_quiet_line(module, monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(demo, "load_engine", interrupted)
    monkeypatch.setattr(film_rooms, "load_engine", interrupted)
    monkeypatch.setattr(torch, "manual_seed", interrupted)
    for name in [name for name in sys.modules if name == module or name == f"{module}.__main__"]:
        if name != "flexkern.demo":
            monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith(f"{module}: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


WHILE_LOADING = """
import importlib.abc, os, runpy, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module", ["flexkern.demo", "flexkern.demo.evaluate", "flexkern.demo.train", "flexkern.demo.train_rooms"]
)
def test_ctrl_c_while_torch_is_imported_is_one_quiet_line(module):
    done = subprocess.run([sys.executable, "-c", WHILE_LOADING.format(module=module)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{module}: interrupted\n")


def run_demo(*words, cwd, code="", **environment):
    """``python -m flexkern.demo``, after some code."""
    code += "\nimport runpy, sys; sys.argv[0] = 'demo'; runpy.run_module('flexkern.demo', run_name='__main__')"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out file/demo", "cannot write to file/demo: Not a directory\n"),
        ("--methods flx", "no preset 'flx': expected one of"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_film(tmp_path, words, said):
    (tmp_path / "file").write_text("")
    done = run_demo(*words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr
    assert done.stderr.startswith("flexkern.demo: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, package):
    done = run_demo("--help", cwd=tmp_path, code=f"import sys; sys.modules[{package!r}] = None")
    assert (done.returncode, done.stdout) == (2, "")
    told = 'is not installed: pip install "flexkern[video]"\n'
    assert done.stderr == f"flexkern.demo: error: the package {package!r} {told}"


def test_a_locale_of_ascii_prints_the_figures(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ("--frames", "6", "--videos", "1", "--methods", "sink", "--out", "d")
    done = run_demo(*words, cwd=tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "mean ? 95 % interval" in done.stdout and "1 room is few: " in done.stdout
