"""What the default takes, and which attention kernel a row was made by, without a GPU."""

import bench_frame_attention as bench
import correctness
import default_path
import harness
import pytest
import roofs
import torch

from flexkern.kernels.attention.hopper_variants import SELECTED
from flexkern.kernels.attention.select import portable_tile

ROOF = roofs.Roofs(matmul_tflop_s=790.0, copy_gb_s=4300.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the queue runs it there")
def test_the_default_is_rendered_and_what_else_runs_is_caught(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["default_path.py"])
    assert default_path.main() == 0
    out = capsys.readouterr().out
    assert out.count("backend sdpa: auto, since device 'cpu' is not a CUDA GPU") == 2
    assert out.endswith("no CUDA GPU: the default is sdpa; no kernel was tried\n")
    monkeypatch.setattr(default_path, "AUTO", "reference")
    monkeypatch.setattr(default_path, "NEAR", 0.0)
    assert default_path.main() == 1
    out = capsys.readouterr().out
    assert "head dim 64: backend reference, expected {'sdpa'}" in out and "is off from that of sdpa by" in out


def test_a_row_says_which_kernel_ran(tmp_path):
    case = bench.build(bench.TINY, ("triton", "portable", "hopper"))
    rows = {row.provider: row for row in harness.compare(case, ROOF, budget_ms=1.0)}
    portable = f"portable {portable_tile(torch.empty(0, device=roofs.DEVICE).device, 64, torch.float16)}"
    assert rows["portable"].path == portable
    if bench.without_hopper():
        assert rows["triton"].path == portable and rows["hopper"].path == ""
        assert rows["hopper"].note.startswith("absent: ")
    else:
        assert rows["triton"].path == rows["hopper"].path == f"hopper {SELECTED}"
    assert roofs.DEVICE == "cuda" or portable == "portable 128x128 w4 s1 pointers x1"
    harness.save(list(rows.values()), tmp_path / "rows.csv")
    assert {row.path for row in harness.load(tmp_path / "rows.csv")} == {row.path for row in rows.values()}
    assert correctness.judge("frame_attention", case, "portable", 1).path == rows["portable"].path
