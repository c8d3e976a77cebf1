"""Renders that are stopped and resumed from the command line, and outputs that cannot be lost."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videos import pictures_in

from flexkern import Engine, demo
from flexkern.render import read_sidecar, sidecar_path, status
from flexkern.render.batch import Batch
from flexkern.render.checkpoint import Checkpoints
from flexkern.session import Session

SCRIPT = """\
- {at: 0, prompt: "a red disc and a blue square on dark green, fast"}
- {at: 0.6, prompt: "a yellow disc and a cyan triangle on black, slow"}
- {at: 1.2, prompt: "a red disc and a blue square on dark green, fast", cut: true}
"""
ORDERED = ("--prompts", "s.yaml", "--frames", 30, "--preset", "longlive-infinite", "--seed", 3, "--no-progress")


@pytest.fixture
def flexkern_(flexkern_, monkeypatch):
    """The command, with a checkpoint after every chunk."""
    begin = Checkpoints.__init__
    monkeypatch.setattr(Checkpoints, "__init__", lambda own, parts, **given: begin(own, parts, **given | {"every": 0}))
    Path("s.yaml").write_text(SCRIPT)
    return flexkern_


@pytest.fixture
def stopped_at(flexkern_, monkeypatch):
    """Runs the command until a chunk, where an error is raised: (status, stdout, stderr)."""

    def run(chunk, *arguments, error=KeyboardInterrupt):
        step = Session.step

        def stopping(session):
            if session.chunks == chunk:
                raise error
            return step(session)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "step", stopping)
            return flexkern_("render", *arguments)

    return run


def names(folder):
    """Of all files but the prompts and the sidecars."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".yaml", ".json"))


def test_resume_needs_nothing_but_the_file(flexkern_, stopped_at, tmp_path, monkeypatch):
    """From another folder, and without the file of prompts."""
    assert flexkern_("render", *ORDERED, "--out", "whole.mp4")[0] == 0
    code, _, err = stopped_at(6, *ORDERED)
    assert code == 130 and err.endswith("; flexkern render --resume video.mp4 goes on from picture 18\n")
    Path("s.yaml").unlink()
    monkeypatch.chdir("/")
    code, out, err = flexkern_("render", "--resume", tmp_path / "video.mp4", "--no-progress", "--no-graphs")
    assert (code, out) == (0, f"{tmp_path}/video.mp4: 30 pictures, 1.9 s\n")
    assert not err
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert names(tmp_path) == ["video.mp4", "whole.mp4"]


def test_nothing_to_resume_is_said(flexkern_, tmp_path):
    code, out, err = flexkern_("render", "--resume", "video.mp4")
    told = "flexkern: error: there is nothing to go on with: no render to video.mp4 was stopped\n"
    assert (code, out, err) == (status.REFUSED, "", told) and not names(tmp_path)


@pytest.mark.parametrize("name", ["video.mp4", "shots/%03d.png"])
def test_what_is_whole_is_said_and_done(flexkern_, name):
    """So that a scheduler that runs the same line again hears that all is well; for as long as that is so."""
    assert flexkern_("render", "--frames", 3, "--out", name, "--no-progress")[0] == 0
    said = (0, f"{name}: is whole, there was nothing left to do\n", "")
    assert flexkern_("render", "--resume", name) == said == flexkern_("render", "--resume", name)
    first = Path(name % 0 if "%" in name else name)
    first.write_bytes(first.read_bytes()[:-1] + b"\0")
    code, _, err = flexkern_("render", "--resume", name)
    assert code == 2 and "there is nothing to go on with" in err


def test_the_name_of_the_unfinished_file_is_near(flexkern_, stopped_at):
    assert stopped_at(3, *ORDERED)[0] == 130
    code, _, err = flexkern_("render", "--resume", "video.unfinished.mp4")
    assert code == 2 and err.endswith("no render to video.unfinished.mp4 was stopped; did you mean video.mp4?\n")


CROWDED = (
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127]\nDefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", CROWDED)
@pytest.mark.parametrize("where", [(Batch, "open"), (Engine, "session")])
def test_too_little_memory_to_begin_is_one_line(flexkern_, stopped_at, monkeypatch, tmp_path, error, where):
    """As with a window that no memory holds; a render that was stopped goes on once there is room."""

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        code, out, err = flexkern_("render", *ORDERED)
        told = f"flexkern: error: out of memory: {' '.join(str(error).split())}\n"
        assert (code, out, err.splitlines(keepends=True)[-1]) == (status.NOTHING_KEPT, "", told)
        assert not names(tmp_path)
    assert stopped_at(3, *ORDERED)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        code, out, err = flexkern_("render", "--resume", "video.mp4")
        assert (code, out, err) == (status.CAN_RESUME, "", told)
    assert flexkern_("render", "--resume", "video.mp4", "--no-progress")[0] == 0


def test_a_name_of_every_length_has_its_sidecar(flexkern_, tmp_path):
    for name in (f"{'x' * 251}.mp4", f"{'é' * 125}x.mp4", f"{'x' * 247}.mp4"):
        assert flexkern_("render", "--frames", 3, "--out", name, "--no-progress")[0] == 0
        beside = [path for path in tmp_path.iterdir() if path.suffix == ".json"]
        assert beside == [sidecar_path(tmp_path / name)] and read_sidecar(tmp_path / name)["video"]["name"] == name
        assert flexkern_("render", "--resume", name)[0] == 0
        for path in (tmp_path / name, *beside):
            path.unlink()
        assert not names(tmp_path)


def test_a_link_into_a_folder_that_is_not_there_is_refused(flexkern_, tmp_path, monkeypatch):
    monkeypatch.setattr(Batch, "open", lambda *_, **__: pytest.fail("weights were loaded"))
    Path("far.mp4").symlink_to(tmp_path / "nowhere" / "x.mp4")
    code, _, err = flexkern_("render", "--frames", 3, "--out", "far.mp4")
    assert code == 2 and err == f"flexkern: error: there is no folder {tmp_path}/nowhere to write far.mp4 to\n"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ("--prompt x", "--prompt"),
        ("--seconds 3", "--seconds"),
        ("--out v.mp4", "--out"),
        ("--overwrite", "--overwrite"),
        ("--retention.sink 6", "--retention"),
    ],
)
def test_resume_takes_nothing_else(flexkern_, more, word):
    code, _, err = flexkern_("render", "--resume", "video.mp4", *more.split())
    assert code == 2 and f"--resume goes on with what was ordered: {word} cannot be given with it" in err


def test_anyway_needs_resume(flexkern_):
    code, _, err = flexkern_("render", "--resume-anyway")
    assert code == 2 and "--resume-anyway needs --resume as well" in err


def test_other_weights_are_refused_and_taken_anyway(flexkern_, stopped_at, monkeypatch, tiny, tmp_path):
    assert stopped_at(4, *ORDERED)[0] == 130
    other = load_file(tiny)
    other["head.modulation"] += 0.01
    with safe_open(tiny, framework="pt") as file:
        save_file(other, "other.safetensors", file.metadata())
    monkeypatch.setattr(demo, "WEIGHTS", Path("other.safetensors"))
    code, out, err = flexkern_("render", "--resume", "video.mp4")
    assert code == 2 and not out
    assert "video.mp4: weights was '" in err and "; --resume-anyway goes on from picture 12\n" in err
    code, out, _ = flexkern_("render", "--resume", "video.mp4", "--resume-anyway", "--no-progress")
    assert code == 0 and out.startswith("video.mp4: 30 pictures")


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
)
def test_out_of_memory_keeps_what_was_made(flexkern_, stopped_at, tmp_path, error):
    code, out, err = stopped_at(5, *ORDERED, error=error)
    assert code == status.CAN_RESUME and not out
    assert f"flexkern: error: out of memory: {error}; video.unfinished.mp4 holds the first 15 of 30 pictures" in err
    assert "flexkern render --resume video.mp4 goes on from picture 15" in err
    assert flexkern_("render", "--resume", "video.mp4", "--no-progress")[0] == 0


def test_a_finished_video_is_not_replaced_unless_asked(flexkern_, tmp_path, monkeypatch):
    given = ("render", "--frames", 6, "--no-progress")
    assert flexkern_(*given)[0] == 0
    before = Path("video.mp4").read_bytes()
    monkeypatch.setattr(demo, "load_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    told = "flexkern: error: video.mp4 exists already: --overwrite replaces it\n"
    assert flexkern_(*given, "--seed", 2) == (2, "", told) and Path("video.mp4").read_bytes() == before
    monkeypatch.undo()


def test_overwrite_replaces_a_video_and_drops_what_was_stopped(flexkern_, stopped_at, tmp_path):
    Path("video.mp4").write_bytes(b"old")
    assert stopped_at(4, *ORDERED, "--overwrite")[0] == 130
    assert Path("video.mp4").read_bytes() == b"old"
    code, _, err = flexkern_("render", *ORDERED, "--out", "video.mp4")
    assert code == 2 and "exists already" in err
    assert flexkern_("render", *ORDERED, "--overwrite")[0] == 0
    assert names(tmp_path) == ["video.mp4"] and pictures_in("video.mp4") == 30


def test_two_processes_on_one_output(flexkern_, tmp_path, tiny):
    """One renders, the other is told at once; the first is not disturbed."""
    code = "import sys; from flexkern.render.parts import Parts; p = Parts('video.mp4'); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONSAFEPATH": "1"}, **pipes) as process:
        assert process.stdout.readline() == "1\n"
        told = "flexkern: error: another render is writing video.mp4\n"
        assert flexkern_("render", "--frames", 3) == (2, "", told)
        assert flexkern_("render", "--frames", 3, "--overwrite") == (2, "", told)
        process.send_signal(signal.SIGKILL)
    assert flexkern_("render", "--frames", 3, "--no-progress")[0] == 0  # who is dead blocks nobody


def test_a_whole_video_has_nothing_left_to_do(flexkern_, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flexkern.render.parts.Parts.clear", lambda parts: None)  # killed before
        assert flexkern_("render", "--frames", 6, "--no-progress")[0] == 0
    told = "video.mp4: is whole, there was nothing left to do\n"
    assert flexkern_("render", "--resume", "video.mp4") == (0, told, "") and names(tmp_path) == ["video.mp4"]


def test_the_documentation_has_every_status():
    page = (Path(demo.__file__).parents[1] / "docs/studio.md").read_text()
    for number, (meaning, action) in status.MEANINGS.items():
        assert f"| {number} | {meaning} | {action} |" in page


def test_a_link_to_itself_is_replaced(flexkern_):
    Path("loop.mp4").symlink_to("loop.mp4")
    assert flexkern_("render", "--frames", 3, "--out", "loop.mp4", "--no-progress")[0] == 0
    assert not Path("loop.mp4").is_symlink() and pictures_in("loop.mp4") == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_and_a_stderr_that_are_full_end_no_render(flexkern_, monkeypatch):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115, which fails when it is closed
    try:
        monkeypatch.setattr(sys, "stderr", full)
        assert flexkern_("render", *ORDERED[:-1], "--log", "/dev/full")[0] == 0
        assert pictures_in("video.mp4") == 30
        assert flexkern_("render", "--frames", "0")[0] == 2  # a refusal keeps its status
    finally:
        with suppress(OSError):
            full.close()
