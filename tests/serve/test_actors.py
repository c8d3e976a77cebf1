"""Workers that are Ray's actors, on this machine: the same videos as in one process, also where one is killed."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file
from tiny_demo import save_tiny

pytest.importorskip("ray", reason='needs pip install "flexkern[cluster]"')

from flexkern.demo.train import CONFIG
from flexkern.model.wan import CausalWan
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
    """Hands on a farm's calls, and kills an actor's process, or one of it, while it renders."""

    def __init__(self, farm, moments, of=lambda process: [process]):
        self.farm, self.killed, self._moments, self._of = farm, 0, moments, of
        self._due, self._task = None, {}

    def give(self, worker, task):
        self.farm.give(worker, task)
        self._task[worker] = task

    def wait(self, seconds):
        for worker, task in list(self._task.items()):
            parts = task.target.with_name(f"{task.target.name}.parts")
            if self._moments and list(parts.glob("checkpoint-*.safetensors")) and worker in self.farm._pids:
                time.sleep(self._moments.pop())
                (process,) = self._of(self.farm._pids[worker])
                os.kill(process, signal.SIGKILL)
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


@pytest.mark.parametrize(
    ("gpus", "nodes", "workers", "ranks"),
    [
        (None, [0.0], 1, 1),
        (None, [4.0, 2.0], 6, 1),
        (0.5, [2.0], 4, 1),
        (2, [3.0, 0.0, 3.0], 2, 2),  # a job's GPUs are of one machine
        (4, [8.0, 4.0, 2.0], 3, 4),
    ],
)
def test_actors_are_as_many_as_find_room(monkeypatch, gpus, nodes, workers, ranks):
    there = [{"Alive": True, "Resources": {"CPU": 2.0} | ({"GPU": count} if count else {})} for count in nodes]
    ray = SimpleNamespace(
        is_initialized=lambda: True, nodes=lambda: [*there, {"Alive": False, "Resources": {"GPU": 8.0}}]
    )
    monkeypatch.setattr("flexkern.serve.actors.load_ray", lambda: ray)
    farm = RayFarm(gpus_per_job=gpus)
    made = []
    monkeypatch.setattr(farm, "_make", lambda: made.append(farm._options.get("ranks", 1)))
    farm.start()
    assert made == [ranks] * workers
    with pytest.raises(ValueError, match="gpus-per-job 9 cannot be had: Ray sees . GPUs on a machine"):
        RayFarm(gpus_per_job=9).start()


@pytest.mark.slow
def test_a_rank_of_an_actor_that_is_killed_costs_a_try_and_no_byte(cluster, tmp_path):
    """Two processes compute each video; the second one of an actor is killed in the middle."""
    config = replace(CONFIG, dim=64, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=32)
    weights = str(tmp_path / "two.safetensors")
    save_file(CausalWan(config).state_dict(), weights, {"flexkern_config": json.dumps(config.to_dict())})
    jobs = [{"model": weights, "prompt": RED, "frames": 18, "seed": i} for i in range(2)]
    fleet, _ = fleet_of(tmp_path, jobs)
    farm = RayFarm(workers=1, options={"threads": 1, "every": 0, "ranks": 2})
    fleet._farm = killing = Killing(farm, [0.0], of=ranks_below)
    summary = fleet.run()
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert (summary.done, summary.lost, summary.code, killing.killed) == (2, 1, 0, 1), lines
    (again,) = [line for line in lines if line["outcome"] == "again"]
    assert "rank 1 of 2 has ended, killed by signal 9" in again["why"] and again["pictures"] > 0
    for number, job in enumerate(jobs):
        assert (tmp_path / f"{number:06}.mp4").read_bytes() == whole(tmp_path, job, f"whole{number}.mp4")


def ranks_below(process):
    """The processes that a process has started as ranks."""
    children = [
        child for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [int(child) for child in children if b"flexkern.parallel" in Path(f"/proc/{child}/cmdline").read_bytes()]


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
