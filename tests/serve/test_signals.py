"""Signals to a fleet: at any moment its workers stop, its books are closed, and the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_demo import save_tiny

from flexkern.cli import main
from flexkern.render import JobSpec, Worker
from flexkern.serve.book import Jobs
from flexkern.serve.fleet import Fleet, News

RED = "a red disc and a blue square on dark green, fast"
FRAMES = 450  # so many that neither job is done before both have begun, however late a worker comes on a busy machine


class Stub:
    """A farm that is interrupted where ``at`` says, and never ends a job."""

    def __init__(self, *at, signals=(signal.SIGTERM,)):
        self.at, self._signals, self.ended, self._told = at, signals, 0, False

    def _come(self, where):
        if where in self.at:
            for number in self._signals:
                signal.raise_signal(number)

    def start(self):
        self._come("start")

    def give(self, worker, task):
        self._come("give")

    def wait(self, seconds):
        if self._told:
            self._come("wait")
        self._told = True
        return [News(worker="worker-0", kind="ready")]

    def interrupt(self):
        self._come("interrupt")

    def close(self):
        self._come("close")
        self.ended += 1


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Runs the command with a farm of that kind: its exit status, the farm, outcomes in the manifest, the summary."""
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(json.dumps({"prompt": RED, "frames": 3}) + "\n")

    def run(*at, **given):
        farm = Stub(*at, **given)
        monkeypatch.setattr("flexkern.serve.alone.Alone", lambda _: farm)
        ended = main(["fleet", "jobs.jsonl", "--out", "out", "--shard", "0/1", "--no-progress"])
        manifest = Path("out/manifest-0-of-1.jsonl")
        said = [json.loads(line)["outcome"] for line in manifest.read_text().splitlines()] if manifest.exists() else []
        return ended, farm, said, json.loads(Path("out/summary-0-of-1.json").read_text())

    return run


@pytest.mark.parametrize(
    ("at", "outcomes"),
    [
        (("start",), []),
        (("wait",), ["started", "interrupted"]),
        (("wait", "interrupt"), ["started", "interrupted"]),
        (("wait", "interrupt", "close"), ["started", "interrupted"]),
        (("give", "wait"), ["started", "interrupted"]),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_closes_the_books(stub, monkeypatch, at, outcomes, number):
    monkeypatch.setattr("flexkern.serve.fleet.GRACE", 0.0)
    ended, farm, said, summary = stub(*at, signals=(number,))
    assert (ended, farm.ended, said) == (128 + number, 1, outcomes)
    assert (summary["waiting"], summary["done"]) == (1, 0)


def test_a_second_signal_is_not_waited_for(stub):
    """Though the worker would take its two minutes."""
    began = time.monotonic()
    ended, farm, said, _ = stub("wait", signals=(signal.SIGTERM,))
    assert (ended, farm.ended, said) == (143, 1, ["started", "interrupted"])
    assert time.monotonic() - began < 60


def test_news_that_came_with_a_signal_are_taken(tmp_path):
    """A worker that became ready just then is not forgotten."""
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": RED, "frames": 3}) + "\n")
    fleet = Fleet(Jobs(tmp_path / "jobs.jsonl", tmp_path), Stub(), tmp_path)
    enter = fleet._schedule.enter

    def entering(worker):
        signal.raise_signal(signal.SIGINT)
        enter(worker)

    fleet._schedule.enter = entering
    assert fleet.run().interrupted == signal.SIGINT and fleet._idle == {"worker-0"}


def test_sigterm_while_ray_starts_is_the_commands(tmp_path, monkeypatch, capsys):
    """Ray has a handler of its own by then, which exits with 15."""

    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    closed = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: closed.append(True))
    monkeypatch.setattr("flexkern.serve.actors.load_ray", lambda: ray)
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(json.dumps({"prompt": RED, "frames": 3}) + "\n")
    before = signal.getsignal(signal.SIGTERM)
    assert main(["fleet", "jobs.jsonl", "--out", "out", "--no-progress"]) == 143
    assert closed == [True] and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.startswith("out: 1 jobs: 1 left;")


class Command:
    """``flexkern fleet`` with Ray, as a process of its own."""

    def __init__(self, folder):
        words = [sys.executable, "-m", "flexkern", "fleet", "jobs.jsonl", "--out", "out", "--no-progress"]
        words += ["--workers", "2", "--gpus-per-job", "0", "--threads", "1"]
        self.began, self._folder = time.time(), folder
        self.process = subprocess.Popen(
            words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def until_both_render(self):
        """Both jobs have written something since the command began."""
        end = time.monotonic() + 120
        written = lambda i: [
            path
            for path in self._folder.glob(f"out/{i:06}.mp4.parts/0*.mp4")
            if path.stat().st_size and path.stat().st_mtime > self.began
        ]
        while not (written(0) and written(1)):
            assert time.monotonic() < end and self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)

    def actors(self):
        """The processes that render."""
        return [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if is_in(path, self._folder) and b"ray::Renderer" in (path / "cmdline").read_bytes()
        ]

    def end(self):
        """Exit status, and what was said."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def is_in(process, folder):
    try:
        return process.joinpath("cwd").readlink() == folder
    except OSError:
        return False


@pytest.mark.slow
def test_a_fleet_with_ray_is_stopped_twice_and_ended_once_and_its_videos_have_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason='needs pip install "flexkern[cluster]"')
    weights = str(save_tiny(tmp_path / "tiny.safetensors"))
    jobs = [{"model": weights, "prompt": RED, "frames": FRAMES, "seed": i} for i in range(2)]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    lines = lambda: [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]

    for number in (signal.SIGINT, signal.SIGTERM):  # as Ctrl-C at a terminal, and as a manager: to all, and to one
        command = Command(tmp_path)
        command.until_both_render()
        os.killpg(command.process.pid, number) if number == signal.SIGINT else command.process.send_signal(number)
        ended, out, err = command.end()
        assert ended == 128 + number and out.startswith("out: 2 jobs: 2 left;"), err
        assert err.count("stopping: workers end their chunk and write a checkpoint") == 1
        for line in lines()[-2:]:
            kept = int(re.search(rf"holds the first (\d+) of {FRAMES} pictures", line["why"])[1])
            assert line["outcome"] == "interrupted" and line["pictures"] == kept > 0
            assert (tmp_path / f"out/{line['target']}.parts/checkpoint-{kept:09}.safetensors").is_file()

    command = Command(tmp_path)
    command.until_both_render()
    for actor in command.actors():  # none of them ends its chunk
        os.kill(actor, signal.SIGSTOP)
    command.process.send_signal(signal.SIGINT)
    assert any("stopping:" in line for line in command.process.stderr)
    command.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    ended, out, err = command.end()
    assert ended == 130 and out.startswith("out: 2 jobs: 2 left;") and time.monotonic() - began < 60, err
    assert [line["why"] for line in lines()[-2:]] == ["the fleet was ended"] * 2 and not command.actors()

    ended, out, err = Command(tmp_path).end()
    assert ended == 0 and out.startswith("out: 2 jobs: 2 done;"), err
    for i, job in enumerate(jobs):
        spec = JobSpec.from_dict(job | {"out": str(tmp_path / "whole.mp4")})
        assert Worker(threads=1, device="cpu").run(spec).status == "done"
        assert (tmp_path / f"out/{i:06}.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
        for left in tmp_path.glob("whole.mp4*"):
            left.unlink()
