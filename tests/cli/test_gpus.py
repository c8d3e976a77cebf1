"""``flexkern render --gpus``: the file of one process, and errors before any rank is started."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from flexkern.cli.ranks import TORCHRUN, count_ranks
from flexkern.demo.train import CONFIG
from flexkern.model.wan import CausalWan
from flexkern.parallel import launch
from flexkern.render import status
from flexkern.render.checkpoint import Checkpoints
from flexkern.session import Session

RENDER = ("render", "--frames", 9, "--preset", "longlive-infinite", "--no-progress")


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(launch, "Processes", None)


def test_the_demo_on_two_ranks_is_the_demo_on_one(tmp_path):
    """And torchrun's, whose second process prints nothing; all at once, since each takes a while to load."""
    command = [sys.executable, "-m", "flexkern", *map(str, RENDER), "--threads", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *command[1:]]
    started = [
        subprocess.Popen(
            [*words, "--out", name], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, words in (("one.mp4", command), ("two.mp4", [*command, "--gpus", "2"]), ("run.mp4", torchrun))
    ]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(err for _, err in said)
    one, two, run = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("one", "two", "run"))
    assert one == two == run
    assert [out for out, _ in said] == [f"{name}.mp4: 9 pictures, 0.6 s\n" for name in ("one", "two", "run")]
    assert said[2][1].count("backend sdpa") == 1


def test_a_render_goes_on_with_another_number(flexkern_, tmp_path, monkeypatch):
    config = replace(CONFIG, dim=64, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=32)
    save_file(
        CausalWan(config).state_dict(), tmp_path / "two.safetensors", {"flexkern_config": json.dumps(config.to_dict())}
    )
    begin = Checkpoints.__init__
    monkeypatch.setattr(Checkpoints, "__init__", lambda own, parts, **given: begin(own, parts, **given | {"every": 0}))
    weights = ("--model", tmp_path / "two.safetensors")
    assert flexkern_(*RENDER, *weights, "--out", "whole.mp4")[0] == 0
    step = Session.step

    def stopped(session):
        if session.chunks == 2:
            raise KeyboardInterrupt
        return step(session)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "step", stopped)
        ended, _, err = flexkern_(*RENDER, *weights, "--out", "stopped.mp4", "--gpus", 2)
    assert ended == status.SIGNAL + 2 and "goes on from picture 6" in err
    ended, _, err = flexkern_("render", "--resume", "stopped.mp4", "--gpus", 1)
    assert ended == 0, err
    assert Path("stopped.mp4").read_bytes() == Path("whole.mp4").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", 0), "--gpus must be at least 1, got 0"),
        (("--gpus", 2, "--device", "cpu"), "--gpus must share 1 heads and the 6x6 tokens of a frame evenly: .* got 2"),
    ],
)
def test_a_number_that_does_not_work_is_refused_before_anything_starts(flexkern_, nothing_starts, flags, message):
    ended, _, err = flexkern_(*RENDER, *flags)
    assert ended == status.REFUSED
    assert re.search(message, err), err


def test_a_preset_that_runs_on_one_is_refused_before_anything_starts(flexkern_, nothing_starts):
    ended, _, err = flexkern_("render", "--frames", 9, "--preset", "deep-forcing", "--gpus", 2)
    assert ended == status.REFUSED
    assert "--gpus must be 1 with preset 'deep-forcing', whose tokens are chosen by the queries of all heads" in err


def test_gpus_under_torchrun_must_be_its_processes(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "4")
    assert count_ranks(None) == count_ranks(4) == 4
    with pytest.raises(ValueError, match="--gpus 2: torchrun has started 4 processes"):
        count_ranks(2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert count_ranks(2) == 2
