"""Commands on a GPU: what is rendered with graphs and without, stopped and gone on with, and compiled beforehand."""

import re
from pathlib import Path

import pytest
import torch
from videos import pictures_in

from flexkern.session import Session

pytestmark = pytest.mark.gpu
FRAMES = 36  # twelve chunks: the window is full after seven
RENDER = ("render", "--device", "cuda", "--backend", "triton", "--frames", FRAMES, "--seed", 3, "--no-progress")


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs a session held, and why it held none, after each chunk."""
    seen, step = [], Session.step

    def watched(session):
        made = step(session)
        seen.append((session.passes.count, session.passes.why_not))
        return made

    monkeypatch.setattr(Session, "step", watched)
    return seen


def test_a_render_is_the_same_bytes_with_graphs_and_without_stopped_or_whole(flexkern_, graphs):
    for name, more in (("whole.mp4", ()), ("launched.mp4", ("--no-graphs",))):
        status, _, err = flexkern_(*RENDER, "--out", name, *more)
        assert status == 0, err
    assert graphs[11] == (2, None) and graphs[23][0] == 0, "captured passes, and none"
    with pytest.MonkeyPatch.context() as patch:
        step = Session.step

        def interrupted(session):
            if session.chunks == 10:
                raise KeyboardInterrupt
            return step(session)

        patch.setattr(Session, "step", interrupted)
        assert flexkern_(*RENDER, "--out", "stopped.mp4")[0] == 130
    status, _, err = flexkern_("render", "--resume", "stopped.mp4", "--no-progress")
    assert status == 0, err
    assert pictures_in("whole.mp4") == FRAMES
    assert len({Path(f"{name}.mp4").read_bytes() for name in ("whole", "launched", "stopped")}) == 1


def test_after_a_warmup_nothing_is_compiled(flexkern_):
    from flexkern.kernels.compiles import watch_compiles

    status, out, err = flexkern_("warmup")
    assert status == 0 and "in all" in out, err
    with watch_compiles() as compiled:
        status, _, err = flexkern_(*RENDER)
    assert status == 0 and compiled == [], err


def test_the_doctor_finds_the_gpu_and_what_runs_on_it(flexkern_):
    status, out, _ = flexkern_("doctor")
    name = re.escape(torch.cuda.get_device_name(0))
    assert status == 0 and "broken:" not in out
    assert re.search(rf"^gpu +cuda:0 {name}, \d+ GiB, compute capability \d+\.\d, driver \S+$", out, re.MULTILINE)
    assert re.search(r"^auto +cuda:0, heads of 128 in bfloat16: triton \(auto; the \w+ attention kernel", out, re.M)
