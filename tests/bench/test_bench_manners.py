"""How a bench behaves towards whoever runs it: help, refusals before any measurement, what is missing, closed pipes."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton.knobs", reason="needs Triton >= 3.4")

import bench_engine
import correctness
import default_path
import harness
import machine
import roofs
from bare import run_python
from roofs import Roofs

BENCH = Path(__file__).parent.parent.parent / "bench"
ROOF = Roofs(matmul_tflop_s=1.0, copy_gb_s=1.0)


@pytest.fixture
def folder(tmp_path):
    """One that cannot be made: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "rows"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(folder, monkeypatch, capsys):
    monkeypatch.setattr(roofs, "measure_roofs", lambda: pytest.fail("measured"))
    args = harness.arguments("A bench.").parse_args(["--tiny", "--out", str(folder)])
    with pytest.raises(SystemExit) as left:
        harness.run(args, "rows", [], lambda shape: None)
    assert left.value.code == 2 and capsys.readouterr().err.endswith(f"cannot write to {folder}: Not a directory\n")


def test_the_engine_is_not_built_for_a_folder_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(bench_engine, "make_model", lambda config: pytest.fail("built"))
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", "--tiny", "--out", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        bench_engine.main()


def test_a_folder_is_made_when_it_is_named(tmp_path):
    args = harness.arguments("A bench.").parse_args(["--out", str(tmp_path / "a/b")])
    assert harness.folder(args) == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_keeps_the_rows_that_were_there(tmp_path, capsys):
    row = harness.Row(kernel="k", provider="p", shape="s", ms=1.0, **harness.provenance())
    harness.save([row], tmp_path / "k.csv")
    before = (tmp_path / "k.csv").read_text()
    (tmp_path / "k.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="1"):
        harness.save([replace(row, ms=2.0)], tmp_path / "k.csv")
    assert capsys.readouterr().err.endswith(f"cannot write {tmp_path}/k.csv: No space left on device\n")
    assert (tmp_path / "k.csv").read_text() == before and [path.name for path in tmp_path.iterdir()] == ["k.csv"]


def test_what_has_no_operations_has_no_rate_of_them():
    case = harness.Case(kernel="k", shape="s", bytes=1000, flops=0, bound="copy", providers={}, truth=None)
    found = harness.rates(case, [2.0], ROOF)
    assert math.isnan(found["tflop_s"]) and found["gb_s"] == pytest.approx(5e-4)
    line = harness.describe(harness.Row(kernel="k", provider="p", shape="s", **found, **harness.provenance()))
    assert "TFLOP/s" not in line and "  0.0005 GB/s" in line  # not 0 of either


def test_correctness_judges_attention_where_nothing_is_named(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(correctness, "cases", lambda kernel, is_tiny: seen.append(kernel) or iter([("case", 3)]))
    verdict = correctness.Verdict(
        kernel="k", shape="s", error=0.0, repeats=3, differing=0, verdict="right", **harness.provenance()
    )
    monkeypatch.setattr(correctness, "judge", lambda *given: seen.append(given) or verdict)
    monkeypatch.setattr(sys, "argv", ["correctness.py", "--tiny"])
    with pytest.raises(SystemExit, match="0"):
        correctness.main()
    assert seen == ["frame_attention", ("frame_attention", "case", "portable", 3)]


@pytest.mark.parametrize("word", ["--help", "--tinny"])
def test_the_default_path_is_rendered_only_when_asked(word, monkeypatch):
    monkeypatch.setattr(default_path, "check", lambda dim: pytest.fail("rendered"))
    monkeypatch.setattr(sys, "argv", ["default_path.py", word])
    with pytest.raises(SystemExit, match="0" if word == "--help" else "2"):
        default_path.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'diffusers'", name="diffusers"),
            "the package 'diffusers' is not installed",
        ),
        (
            ImportError("the kernels need Triton >= 3.4, and Triton 2.1.0 is installed"),
            "error: the kernels need Triton",
        ),
        (KeyboardInterrupt(), "interrupted\n"),
        (
            ModuleNotFoundError("No module named 'flexkern.x'", name="flexkern.x"),
            "ModuleNotFoundError: No module named",
        ),
        (ZeroDivisionError("a fault of ours"), "ZeroDivisionError: a fault of ours"),
    ],
)
def test_what_is_missing_is_one_line_and_a_fault_a_traceback(error, said, capsys):
    machine.tell(type(error), error, None)
    told = capsys.readouterr().err
    assert said in told and (len(told.splitlines()) == 1 or "Error: " in told.splitlines()[-1])


def test_every_bench_says_so_in_one_line(tmp_path):
    """A package that does not import, in place of the one that a bench needs beyond its extra."""
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
    done = run_python(BENCH / "bench_long_render.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench_long_render.py: error: the package 'tyro' is not installed")


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(BENCH / "bench_long_render.py"), "--help"]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    os.close(write)
    assert done.stderr == ""


def test_commands_of_help_are_those_that_work_where_it_is_read(monkeypatch):
    doc = "Time it.\n\npython bench/bench_rms_norm.py --save   # bench/results\npython bench/gpu_suite.py"
    assert machine.described(doc) == doc
    monkeypatch.setattr(machine, "CHECKOUT", False)
    monkeypatch.setattr(machine, "RESULTS", Path("/here/bench_results"))
    monkeypatch.setattr(sys, "argv", ["/lib/flexkern/bench/bench_rms_norm.py"])
    told = "Time it.\n\nflexkern bench rms-norm --save   # bench_results\nflexkern bench suite"
    assert machine.described(doc) == told and machine.program() == "flexkern bench rms-norm"


@pytest.mark.skipif(roofs.DEVICE == "cuda", reason="of a CPU")
def test_the_roof_of_a_cpu_is_its_best(monkeypatch):
    monkeypatch.setattr(roofs, "timed", lambda call, repeats: [20.0] * (repeats - 1) + [0.5])
    found = roofs.measure_roofs.__wrapped__()
    assert found.matmul_tflop_s == pytest.approx(2 * roofs.SIDE**3 / 0.5 / 1e9)
    assert found.copy_gb_s == pytest.approx(2 * roofs.COPIED / 0.5 / 1e6)
