"""A worker whose videos several ranks compute: they stay from job to job, and are started again where they are lost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file

from flexkern import parallel
from flexkern.cli import main
from flexkern.demo.train import CONFIG
from flexkern.model.wan import CausalWan
from flexkern.parallel import RankError, launch
from flexkern.render import JobSpec, Worker
from flexkern.render.held import HeldRanks

RED = "a red disc and a blue square on dark green, fast"


@pytest.fixture
def two_heads(tmp_path, monkeypatch):
    """A model that two ranks can share."""
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, dim=64, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=32)
    save_file(CausalWan(config).state_dict(), "two.safetensors", {"flexkern_config": json.dumps(config.to_dict())})


@pytest.fixture
def groups(monkeypatch):
    """The processes of each group that was started."""
    begun, begin = [], launch.Processes.__init__
    monkeypatch.setattr(
        launch.Processes, "__init__", lambda own, *given: begun.append(own) or begin(own, *given)
    )  # fmt: skip
    return begun


def spec(out, **given):
    return JobSpec(**{"model": "two.safetensors", "prompt": RED, "frames": 9, "out": Path(out)} | given)


def running(group):
    return [process for process in group.started.values() if process.poll() is None]


def rendered(seed, *more):
    """The bytes that the command makes."""
    given = ["--model", "two.safetensors", "--prompt", RED, "--frames", "9", "--threads", "1", "--no-progress"]
    words = [*given, "--device", "cpu", "--seed", str(seed), "--out", "whole.mp4", "--overwrite", *more]
    assert main(["render", *words]) == 0
    return Path("whole.mp4").read_bytes()


def test_ranks_stay_from_job_to_job_and_are_started_again_where_they_are_lost(two_heads, groups):
    whole = [rendered(0), rendered(1, "--gpus", "2")]
    groups.clear()
    worker = Worker(device="cpu", threads=1, every=0, ranks=2)
    worker.check(spec("0.mp4"))
    assert not groups  # with the first job

    def kill(progress):
        if progress.pictures == 6:
            groups[0].started[1].kill()

    try:
        for seed in (0, 1):
            assert worker.run(spec(f"{seed}.mp4", seed=seed)).status == "done"
            assert Path(f"{seed}.mp4").read_bytes() == whole[seed]
        assert len(groups) == 1 and len(running(groups[0])) == 1

        with pytest.raises(RankError, match="rank 1 of 2 has ended, killed by signal 9"):
            worker.run(spec("2.mp4", seed=1), on_progress=kill)
        assert not running(groups[0])
        outcome = worker.run(spec("2.mp4", seed=1))
        assert (outcome.status, outcome.resumed_from, len(groups)) == (
            "done",
            3,
            2,
        )  # the checkpoint of picture 6 needed its pages
        assert Path("2.mp4").read_bytes() == whole[1]
    finally:
        worker.close()
    assert not any(map(running, groups))


def test_ranks_that_cannot_be_are_told_before_any_work(two_heads, groups, monkeypatch):
    with pytest.raises(ValueError, match="ranks must be a whole number >= 1, got 0"):
        Worker(ranks=0)
    with pytest.raises(
        ValueError, match="ranks must share 2 heads and the 6x6 tokens of a frame .* one of 1, 2, got 3"
    ):
        Worker(device="cpu", ranks=3).check(spec("a.mp4"))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RankError, match="rank 1 of 2 has ended, with status 1"):
        Worker(device="cpu", ranks=2).run(spec("a.mp4"))
    assert not list(Path.cwd().glob("a.mp4*"))


class Stub:
    """Ranks that only say how they are."""

    lost, device, closed = None, SimpleNamespace(type="cpu"), False

    def close(self):
        self.closed = True


def test_ranks_that_were_lost_between_two_jobs_cost_none_of_them(monkeypatch):
    monkeypatch.setattr(parallel, "start_ranks", lambda count, device: Stub())
    held = HeldRanks(2)
    first = held.open("cpu")
    assert held.open("cpu") is first and not first.closed
    first.lost = "rank 1 of 2 has ended, killed by signal 9"
    second = held.open("cpu")
    assert second is not first and first.closed
    held.close()
    assert second.closed and HeldRanks(1).open("cpu") is None
