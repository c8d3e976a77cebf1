"""Workers that are Ray's actors, on this machine: the same videos as in one process, also where one is killed."""

import json
import os
import signal
import time

import pytest
from tiny_demo import save_tiny

pytest.importorskip("ray", reason='needs pip install "flexkern[cluster]"')

from flexkern.render import JobSpec, Worker
from flexkern.serve.actors import RayFarm
from flexkern.serve.book import Jobs
from flexkern.serve.fleet import Fleet, holding

RED = "a red disc and a blue square on dark green, fast"
FRAMES = 60
KILLS = 12


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, shared by the tests of this file."""
    farm = RayFarm(workers=2, options={"threads": 1, "every": 0})
    farm._init()
    yield
    farm._ray.shutdown()


def fleet_of(folder, jobs, **options):
    """A fleet of two actors in a folder, and its farm."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    farm = RayFarm(workers=2, options={"threads": 1, "every": 0})
    return Fleet(Jobs(folder / "jobs.jsonl", folder), farm, folder, **options), farm


def films(tmp_path, count):
    weights = str(save_tiny(tmp_path / "tiny.safetensors"))
    return [{"model": weights, "prompt": RED, "frames": FRAMES, "seed": i} for i in range(count)]


def whole(tmp_path, job, name="whole.mp4"):
    """The bytes of the video that one process makes, undisturbed."""
    assert Worker(threads=1, device="cpu").run(JobSpec.from_dict(job | {"out": str(tmp_path / name)})).status == "done"
    return (tmp_path / name).read_bytes()


class Killing:
    """Hands on a farm's calls, and kills an actor's process while it renders."""

    def __init__(self, farm, moments):
        self.farm, self.killed, self._moments = farm, 0, moments
        self._due, self._task = None, {}

    def give(self, worker, task):
        self.farm.give(worker, task)
        self._task[worker] = task

    def wait(self, seconds):
        for worker, task in list(self._task.items()):
            parts = task.target.with_name(f"{task.target.name}.parts")
            if self._moments and list(parts.glob("checkpoint-*.safetensors")) and worker in self.farm._pids:
                time.sleep(self._moments.pop())
                os.kill(self.farm._pids[worker], signal.SIGKILL)
                self.killed += 1
                del self._task[worker]
        news = self.farm.wait(min(seconds, 0.05))
        for one in news:
            if one.kind != "ready":
                self._task.pop(one.worker, None)
        return news

    def __getattr__(self, name):
        return getattr(self.farm, name)


def test_a_killed_worker_is_replaced_and_the_videos_have_the_bytes_of_undisturbed_ones(cluster, tmp_path):
    jobs = films(tmp_path, 3)
    told = []
    fleet, farm = fleet_of(tmp_path, jobs, tell=told.append)
    fleet._farm = killing = Killing(farm, [0.0])
    with holding(tmp_path):
        summary = fleet.run()
    assert (summary.done, summary.lost, summary.code, killing.killed) == (3, 1, 0, 1), told
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    (again,) = [line for line in lines if line["outcome"] == "again"]
    assert "its worker was lost" in again["why"] and again["pictures"] > 0
    number = again["job"] - 1
    assert (tmp_path / f"{number:06}.mp4").read_bytes() == whole(tmp_path, jobs[number])
    assert sorted(path.suffix for path in tmp_path.glob("00000*")) == [".json"] * 3 + [".mp4"] * 3


def test_a_job_that_kills_its_worker_fails_and_the_rest_is_made(cluster, tmp_path, monkeypatch):
    jobs = films(tmp_path, 2)
    jobs[0]["frames"] = jobs[1]["frames"] = 3
    fleet, farm = fleet_of(tmp_path, jobs, retries=0)
    give = farm.give

    def poisoned(worker, task):
        give(worker, task)
        if task.number == 0:
            os.kill(farm._pids[worker], signal.SIGKILL)

    monkeypatch.setattr(farm, "give", poisoned)
    summary = fleet.run()
    assert (summary.done, summary.failed, summary.code) == (1, 1, 1)


@pytest.mark.slow
def test_workers_killed_at_random_moments_change_no_byte(cluster, tmp_path):
    import random

    chance = random.Random(3)
    jobs = films(tmp_path, 8)
    fleet, farm = fleet_of(tmp_path, jobs, retries=KILLS)
    fleet._farm = killing = Killing(farm, [chance.uniform(0, 1.5) for _ in range(KILLS)])
    summary = fleet.run()
    assert (summary.done, summary.lost) == (8, KILLS) and killing.killed == KILLS
    for number, job in enumerate(jobs):
        assert (tmp_path / f"{number:06}.mp4").read_bytes() == whole(tmp_path, job, f"whole{number}.mp4")
