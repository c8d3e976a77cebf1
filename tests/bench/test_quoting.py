"""What makes a row of a bench quotable: conditions, pictures per second, memory, and the name of the shape it ran."""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton.knobs", reason="needs Triton >= 3.4")

import harness
import machine
import roofs
import tables
from bare import run_python
from harness import Row

ROOT = Path(__file__).parent.parent.parent
ABOUT = dict(gpu="GPU X", driver="1", torch="2", triton="3", commit="abc", day="2026-01-01")


def test_rows_of_older_runs_are_read_without_what_they_lack(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("kernel,provider,shape,ms,note,gpu,driver,torch,triton,commit,day\nk,a,s,2.5,,G,1,2,3,abc,day\n")
    [row] = harness.load(path)
    assert (row.ms, row.interpreter, row.clocks, row.threads) == (2.5, "", "", 0) and math.isnan(row.peak_gb)
    harness.save([replace(row, provider="b", clocks="sm 1 MHz, memory 2 MHz", load=0.5, threads=3)], path)
    old, new = harness.load(path)
    assert old.threads == 0 and math.isnan(old.load) and (new.clocks, new.load, new.threads) != ("", 0, 0)


def test_a_row_as_json_has_null_where_nothing_was_measured(capsys):
    row = Row(kernel="k", provider="a", shape="s", ms=1.5, ms_20=1.0, ms_80=2.0, pictures_s=8.0, **ABOUT)
    harness.show(row, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["ms"], found["pictures_s"], found["gb_s"], found["peak_gb"]) == (1.5, 8.0, None, None)
    harness.show(row, as_json=False)
    line = capsys.readouterr().out
    assert "8.00 pictures/s" in line and " GB/s" not in line and "nan" not in line


def test_clocks_are_asked_while_the_call_runs(tmp_path, monkeypatch):
    assert machine.clocks_during(lambda: None) == "" or shutil.which("nvidia-smi")
    calls = []
    for says, code, told in (
        ("1740 MHz, 3201 MHz\n1980 MHz, 3201 MHz", 0, "sm 1740 MHz, memory 3201 MHz"),
        ("no devices were found", 0, ""),
        ("1740 MHz, 3201 MHz", 9, ""),
    ):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nsleep 0.1\necho '{says}'\nexit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert machine.clocks_during(lambda: calls.append(time.sleep(0.01))) == told
    assert len(calls) > 3


@pytest.mark.parametrize("name", ["bench_roofs", "bench_rms_norm", "bench_frame_attention"])
def test_a_tiny_run_never_bears_the_name_of_a_big_shape(name, tmp_path):
    done = run_python(ROOT / f"bench/{name}.py", "--tiny", "--json", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and all(row["threads"] >= 1 and row["load"] >= 0 for row in rows)
    if roofs.DEVICE == "cpu":
        shapes = {row["shape"] for row in rows}
        assert not any(big in shape for shape in shapes for big in ("1.3B", "14B", "480p", "720p", "8192", "GiB"))
        assert {row["interpreter"] for row in rows} == {"yes"}
    [csv_file] = tmp_path.glob("*.csv")
    assert [row.shape for row in harness.load(csv_file)] == [row["shape"] for row in rows]


def test_pytest_collects_the_benches():
    done = run_python("-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("add_modulate", "frame_attention", "gate_residual", "modulate", "norm_rope_write", "rms_norm"):
        assert f"bench_{name}.py::test_speed[" in done.stdout


def test_tables_of_other_results_are_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    before = {name: (ROOT / name).read_text() for name in tables.FILES}
    about = ABOUT | {"gpu": "cpu", "interpreter": "yes"}
    row = Row(kernel="vae", provider="flexkern", shape="tiny", ms=30.0, pictures_s=400.0, peak_gb=0.36, **about)
    for where in (tmp_path / "itself", tmp_path / "beside/GPU-X"):
        harness.save([row], where / "vae.csv")
    for results in (tmp_path / "itself", tmp_path / "beside"):
        monkeypatch.setattr(sys, "argv", ["tables.py", "--results", str(results)])
        assert tables.main() == 0
        out = capsys.readouterr().out
        assert "| tiny | flexkern | 30 | 400 | 0.4 |" in out and "Triton 3 in its interpreter, commit abc" in out
    monkeypatch.setattr(sys, "argv", ["tables.py", "--results", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        tables.main()
    assert {name: (ROOT / name).read_text() for name in tables.FILES} == before
