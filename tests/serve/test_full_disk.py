"""One worker of two has a full disk: the other makes the videos, with the bytes of a fleet that had room."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_demo import save_tiny

from flexkern import demo
from flexkern.render import Worker
from flexkern.serve.book import Jobs
from flexkern.serve.fleet import Fleet, News
from flexkern.serve.schedule import SET_ASIDE
from flexkern.serve.task import carry_out

RED = "a red disc and a blue square on dark green, fast"
NAMES = ("worker-0", "worker-1")


class Pair:
    """Two workers in this process, which take turns; ``full`` gives the disk of each while it renders."""

    def __init__(self, full):
        self._full, self._given, self._told = full, {}, []
        self._workers = {name: Worker(device="cpu", every=0) for name in NAMES}

    def start(self):
        self._told = [News(worker=name, kind="ready") for name in NAMES]

    def give(self, worker, task):
        self._given[worker] = task

    def wait(self, seconds):
        told, self._told = self._told, []
        for name, task in self._given.items():
            with self._full(name):
                told.append(News(worker=name, kind="ended", result=carry_out(self._workers[name], task)))
        self._given = {}
        return told

    def interrupt(self):
        pass

    def close(self):
        pass


@contextmanager
def room(count):
    """No file grows beyond so many bytes: the kernel refuses what would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A fleet of the pair in a folder: its summary, what it said, and the manifest."""
    monkeypatch.setattr(demo, "WEIGHTS", save_tiny(tmp_path / "tiny.safetensors"))
    monkeypatch.setattr(demo, "ZOOM", 2)

    def one(name, full, *, jobs, frames=3, **options):
        path, folder, told = tmp_path / "jobs.jsonl", tmp_path / name, []
        path.write_text("".join(json.dumps({"prompt": RED, "frames": frames, "seed": i}) + "\n" for i in range(jobs)))
        folder.mkdir()
        summary = Fleet(Jobs(path, folder), Pair(full), folder, tell=told.append, **options).run()
        return summary, told, [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]

    return one


def videos(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.mp4")}


@contextmanager
def enough(_):
    yield


@pytest.mark.parametrize("count", [0, 3_000])
def test_the_other_worker_makes_the_videos(run, tmp_path, count):
    run("whole", enough, jobs=6)
    summary, told, lines = run("full", lambda name: room(count) if name == NAMES[0] else enough(name), jobs=6)
    assert (summary.done, summary.failed, summary.lost, summary.code) == (6, 0, 0, 0)
    again = [line for line in lines if line["outcome"] == "again"]
    assert [line["worker"] for line in again] == [NAMES[0]] * SET_ASIDE and len(again) == len({x["job"] for x in again})
    assert all("File too large: '" in line["why"] and "nothing was written" in line["why"] for line in again)
    assert {line["worker"] for line in lines if line["outcome"] == "done"} == {NAMES[1]}
    assert len(told) == 1 and told[0].startswith(f"{NAMES[0]} is set aside, its last jobs were stopped: ")
    assert videos(tmp_path / "full") == videos(tmp_path / "whole")


def test_a_disk_that_fills_up_costs_what_was_not_kept_and_no_retry(run, tmp_path):
    """A try that has made pictures is none of a job's retries, and its worker is not set aside."""
    run("whole", enough, jobs=2, frames=48)
    half = (tmp_path / "whole/000000.mp4").stat().st_size // 2
    summary, told, lines = run("full", lambda name: room(half) if name == NAMES[0] else enough(name), jobs=2,
                               frames=48, retries=0)  # fmt: skip
    assert (summary.done, summary.stopped, summary.code) == (2, 0, 0) and told == []
    again = [line for line in lines if line["outcome"] == "again"]
    assert again and {line["worker"] for line in again} == {NAMES[0]}
    assert all(line["tries"] == 0 and 0 < line["pictures"] < 48 for line in again)
    assert videos(tmp_path / "full") == videos(tmp_path / "whole")
