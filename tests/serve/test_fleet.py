"""A fleet ends with a verdict on every job, whatever happens to its workers, and the same command goes on."""

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import fleet_simulation
import pytest
from fleet_simulation import Clock, SimulatedFarm
from tiny_demo import save_tiny
from watched_steps import watch_steps

from flexkern import demo
from flexkern.cli import main
from flexkern.render import Worker, stoppable
from flexkern.serve.alone import Alone
from flexkern.serve.book import Jobs, read_manifests
from flexkern.serve.fleet import Fleet, News, Shard, holding

RED = "a red disc and a blue square on dark green, fast"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    """A folder of its own, with the tiny model in the demo's place; the seeds of chunks, and what to raise at one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "WEIGHTS", tiny)
    monkeypatch.setattr(demo, "ZOOM", 2)
    made, do = [], {}

    def before(seed, chunk):
        if errors := do.get((seed, chunk)):
            if isinstance(error := errors.pop(0), int):
                signal.raise_signal(error)
            else:
                raise error
        made.append((seed, chunk))

    watch_steps(monkeypatch, before)
    return SimpleNamespace(made=made, do=do)


def write(*jobs, name="jobs.jsonl"):
    Path(name).write_text("".join(json.dumps(job) + "\n" for job in jobs))


def films(count, frames=6):
    write(*({"prompt": RED, "frames": frames, "seed": i} for i in range(count)))


def run(**options):
    """A fleet of one worker in this process: its summary, and what it said."""
    folder, told = Path("out").resolve(), []
    folder.mkdir(exist_ok=True)
    farm = options.pop("farm", None) or Alone(lambda: Worker(every=0))
    with holding(folder, options.get("shard")):
        fleet = Fleet(Jobs(Path("jobs.jsonl"), folder), farm, folder, tell=told.append, **options)
        return fleet.run(), told


def lines(name="manifest.jsonl"):
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


def outcomes():
    return [(line["job"], line["outcome"]) for line in lines()]


def bytes_of(name):
    return Path("out", name).read_bytes()


def test_every_job_is_made_and_written_down_and_the_same_command_does_nothing_more(here):
    films(2)
    summary, _ = run()
    assert (summary.done, summary.code, summary.pictures) == (2, 0, 12)
    assert outcomes() == [(1, "started"), (1, "done"), (2, "started"), (2, "done")]
    assert json.loads(bytes_of("status/000/000001.json"))["state"] == "done"
    assert json.loads(bytes_of("summary.json"))["done"] == 2
    count = len(here.made)
    summary, _ = run()
    assert (summary.done, summary.skipped, summary.code) == (0, 2, 0) and len(here.made) == count
    Path("out/000001.mp4").unlink()
    assert run()[0].done == 1  # what is not there any more is made again


def test_a_worker_that_fails_unforeseen_is_replaced_and_the_video_has_the_same_bytes(here):
    films(2, frames=9)
    run()
    whole = bytes_of("000000.mp4")
    for path in Path("out").glob("000000.mp4*"):
        path.unlink()
    here.do[0, 2] = [RuntimeError("a fault of ours")]
    here.made.clear()
    summary, _ = run()
    assert (summary.done, summary.lost, summary.code) == (1, 1, 0)
    assert bytes_of("000000.mp4") == whole and here.made == [(0, 0), (0, 1), (0, 2)]
    assert [one["outcome"] for one in lines()[-4:]] == ["started", "again", "started", "done"]
    assert lines()[-3]["why"] == "its worker was lost: RuntimeError: a fault of ours" and lines()[-3]["pictures"] == 6


def test_a_poisoned_job_fails_with_its_reason_and_stops_nothing(here):
    films(3)
    here.do[1, 0] = [RuntimeError("poison")] * 9
    summary, told = run(retries=1)
    assert (summary.done, summary.failed, summary.code) == (2, 1, 1)
    assert any("000001.mp4: failed: its worker was lost: RuntimeError: poison" in line for line in told)
    assert json.loads(bytes_of("status/000/000001.json"))["state"] == "failed"
    assert run()[0].left_failed == 1  # not tried again
    here.do.clear()
    summary, _ = run(retry_failed=True)
    assert (summary.done, summary.code) == (1, 0)


def test_a_full_disk_puts_the_job_back_and_says_so(here):
    films(2, frames=9)
    here.do[0, 2] = [OSError(28, "No space left on device")]
    summary, _ = run()
    assert (summary.done, summary.code) == (2, 0)
    (again,) = [line for line in lines() if line["outcome"] == "again"]
    assert again["job"] == 1 and "No space left on device" in again["why"] and again["pictures"] == 6


def test_a_disk_that_stays_full_ends_the_run_and_not_the_jobs(here):
    films(8)
    for seed in range(8):
        here.do[seed, 0] = [OSError(28, "No space left on device")] * 9
    summary, told = run()
    assert summary.failed == 0 and summary.waiting + summary.stopped == 8 and summary.code == 75
    assert any("is set aside, its last jobs were stopped: " in line and "No space left" in line for line in told)
    here.do.clear()
    assert run()[0].done == 8


def test_ctrl_c_keeps_what_was_made(here):
    films(2, frames=9)
    here.do[0, 2] = [KeyboardInterrupt()]
    summary, _ = run()
    assert (summary.done, summary.waiting, summary.code) == (0, 2, 130)
    assert outcomes() == [(1, "started"), (1, "interrupted")]
    here.made.clear()
    assert run()[0].done == 2 and here.made[0] == (0, 2)


@pytest.mark.parametrize(("chunk", "ended"), [(1, "interrupted"), (2, "done")])
def test_a_signal_waits_for_the_chunk_and_begins_no_other_job(here, chunk, ended):
    """Also in the last chunk of a video, which is then whole."""
    films(2, frames=9)
    here.do[0, chunk] = [signal.SIGTERM]
    with stoppable() as signals:  # as the command has it
        summary, told = run(farm=Alone(lambda: Worker(every=1e9)))
    assert (summary.code, summary.interrupted, signals) == (143, signal.SIGTERM, [])
    assert outcomes() == [(1, "started"), (1, ended)] and lines()[-1]["pictures"] == 3 * (chunk + 1)
    here.made.clear()
    summary, _ = run()
    assert summary.code == 0 and here.made[0] == ((0, 2) if ended == "interrupted" else (1, 0))


def test_shards_share_the_jobs_and_a_later_run_sees_what_they_did(here):
    films(5, frames=3)
    assert run(shard=Shard(index=0, of=2))[0].done == 3
    assert run(shard=Shard(index=1, of=2))[0].done == 2
    assert run()[0].skipped == 5
    assert {path.name for path in Path("out").glob("manifest*")} == {
        f"manifest-{i}-of-2.jsonl" for i in range(2)
    }  # the last had nothing to write


def test_a_shard_whose_process_was_killed_again_and_again_gives_the_job_up(here):
    films(1)
    folder = Path("out")
    for killed in range(3):
        folder.mkdir(exist_ok=True)
        fleet = Fleet(Jobs(Path("jobs.jsonl"), folder.resolve()), Dying(), folder.resolve(), shard=Shard(index=0, of=1))
        with pytest.raises(Killed):
            fleet.run()
        kept = [line for line in lines("manifest-0-of-1.jsonl") if line["outcome"] != "interrupted"]
        (folder / "manifest-0-of-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert [line["tries"] for line in kept] == list(range(killed + 1))
    past = read_manifests(folder.resolve())
    assert [one.outcome for one in past.values()] == ["started"]
    here.do[0, 0] = [RuntimeError("poison")]
    summary, _ = run(shard=Shard(index=0, of=1))
    assert summary.failed == 1


class Killed(BaseException):
    """As if the process ended."""


class Dying:
    """A farm whose process ends with its first job."""

    def start(self):
        pass

    def give(self, worker, task):
        raise Killed

    def wait(self, seconds):
        return [News(worker="w", kind="ready")]

    def interrupt(self):
        pass

    def close(self):
        pass


def test_a_second_fleet_on_the_folder_is_refused(tmp_path):
    with holding(tmp_path):
        for shard in (None, Shard(index=0, of=2)):
            with pytest.raises(BlockingIOError, match="another fleet works on"), holding(tmp_path, shard):
                pass
    with holding(tmp_path, Shard(index=0, of=2)), holding(tmp_path, Shard(index=1, of=2)):
        for shard in (None, Shard(index=0, of=2)):
            with pytest.raises(BlockingIOError, match="another fleet works on"), holding(tmp_path, shard):
                pass


def test_gpus_that_cannot_share_a_model_are_refused_before_anything_runs(here, monkeypatch, capsys):
    pytest.importorskip("ray", reason='needs pip install "flexkern[cluster]"')
    monkeypatch.setattr("flexkern.serve.actors.RayFarm.start", lambda _: pytest.fail("Ray was started"))
    films(2)
    with pytest.raises(SystemExit) as stopped:
        main(["fleet", "jobs.jsonl", "--out", "out", "--gpus-per-job", "2"])
    err = capsys.readouterr().err
    words = "line 1: gpus-per-job must share 1 heads and the 6x6 tokens of a frame evenly: expected one of 1, got 2"
    assert stopped.value.code == 2 and words in err and "(1 more will not do: line 2)" in err, err


WRONG = {
    "a field": ({"sed": 3}, "line 2: a job has no field 'sed'"),
    "outside": ({"out": "../a.mp4"}, "line 2: out must be inside the folder of --out, got '../a.mp4'"),
    "absolute": ({"out": "/tmp/a.mp4"}, "line 2: out must be inside the folder of --out, got '/tmp/a.mp4'"),
    "stdout": ({"out": "-"}, "line 2: a fleet writes files, not to stdout"),
    "the same file": ({"out": "000000.mp4"}, "line 2: {out}/000000.mp4 is what line 1 writes, too"),
    "a prompt": ({"prompt": "a cat"}, "line 2: the demo model knows prompts like"),
    "weights": ({"model": "longlive", "prompt": "a", "weights": "x.pt"}, "line 2: no checkpoint at"),
    "a list": ([1], "line 2: a job must be a mapping of fields, got '[1]'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_line_is_refused_before_anything_runs(here, monkeypatch, capsys, case):
    monkeypatch.setattr(demo, "load_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    job, words = WRONG[case]
    job = {"prompt": RED, "frames": 3} | job if isinstance(job, dict) else job
    write({"prompt": RED, "frames": 3}, job)
    with pytest.raises(SystemExit) as stopped:
        main(["fleet", "jobs.jsonl", "--out", "out", "--shard", "0/1"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"jobs.jsonl, {words.format(out=Path('out').resolve())}" in err, err


def test_all_bad_lines_are_named(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"frames": 3}\n\n{"frames": 0}\n{\n{"frames": 3}\n{"seed": -1}\n')
    with pytest.raises(ValueError) as caught:
        Jobs(path, tmp_path)
    assert str(caught.value).startswith(f"{path}, line 3: frames must be at least 1, got 0")
    assert str(caught.value).endswith("(2 more will not do: line 4, 6)")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--shard", "2/2"], "a shard is I/N with 0 <= I < N, got 2/2"),
        (["--shard", "x"], "--shard must be I/N, such as 0/8, got 'x'"),
        (["--shard", "0/2", "--workers", "3"], "--workers is for Ray"),
        (["--retries", "-1"], "--retries must be at least 0"),
        (["--gpus-per-job", "1.5"], "gpus-per-job must be 0, a share of 1, or a whole number, got 1.5"),
        (["--shard", "0/2"], "there is no job file jobs.jsonl"),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, given, words):
    monkeypatch.chdir(tmp_path)
    if "no job file" not in words:
        films(1)
    with pytest.raises(SystemExit) as stopped:
        main(["fleet", "jobs.jsonl", "--out", "out", *given])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_the_command_renders_a_shard(here, capsys):
    films(3, frames=3)
    assert main(["fleet", "jobs.jsonl", "--out", "out", "--shard", "1/2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("out: 1 jobs: 1 done; 3 pictures in") and "\r" not in err  # a bar is for a terminal
    assert "\nflexkern: 0 failed, 1 tries, 1 of 1 jobs (100 %), " in err
    assert Path("out/000001.mp4").is_file() and not Path("out/000000.mp4").exists()


def test_without_ray_it_is_said_what_to_install(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    films(1)
    with pytest.raises(SystemExit) as stopped:
        main(["fleet", "jobs.jsonl", "--out", "out"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and 'pip install "flexkern[cluster]"' in err and "--shard I/N" in err


def simulated(tmp_path, count, workers=20, **hazards):
    return fleet_simulation.simulate(workers, count, models=3, folder=tmp_path / str(count), **hazards)


def test_what_the_driver_holds_and_writes_grows_with_the_jobs_and_no_faster(tmp_path):
    few, many = (simulated(tmp_path, count) for count in (100, 400))
    assert few["done"] == 100 and many["done"] == 400 and many["jobs held by the driver, at most"] == 20
    assert many["manifest, bytes per job"] <= few["manifest, bytes per job"] + 8  # longer numbers
    assert few["manifest, lines per job"] == many["manifest, lines per job"] == 2
    assert many["weights loaded"] <= 20 + 2  # each worker stays with its model, but for the ends


def test_workers_that_die_at_random_lose_no_job(tmp_path):
    seen = simulated(tmp_path, 300, life=600.0, bad=0.05, poison=0.02)
    assert seen["workers lost"] > 20 and seen["left"] == 0
    fates = [random.Random(number).random() for number in range(300)]
    poisoned = sum(fate < 0.02 for fate in fates)
    assert seen["failed"] >= poisoned > 0 and seen["done"] + seen["failed"] == 300


def test_a_cluster_without_workers_is_given_up(tmp_path):
    fleet_simulation.write_jobs(tmp_path / "jobs.jsonl", 2, 1)
    clock, told = Clock(), []
    farm = SimulatedFarm(0, clock, random.Random(0))
    fleet = Fleet(Jobs(tmp_path / "jobs.jsonl", tmp_path), farm, tmp_path, clock=clock, tell=told.append, patience=60)
    summary = fleet.run()
    assert summary.waiting == 2 and summary.code == 75 and told == ["there was no worker for 60 seconds: 2 jobs wait"]


def test_a_manifest_torn_by_a_loss_of_power_is_read_as_far_as_it_goes(tmp_path):
    Path(tmp_path, "manifest.jsonl").write_text(
        '{"time": "1", "id": "a", "outcome": "done", "tries": 0, "pictures": 3}\n{"time": "2", "id": "b", "outc'
    )
    assert list(read_manifests(tmp_path)) == ["a"]
    assert os.listdir(tmp_path) == ["manifest.jsonl"]
