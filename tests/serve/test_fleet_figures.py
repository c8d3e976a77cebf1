"""Figures of a fleet for Prometheus, asked for while it works."""

import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("prometheus_client", reason='needs pip install "flexkern[serve]"')

from prometheus_client.parser import text_string_to_metric_families
from tiny_demo import save_tiny
from watched_steps import watch_steps

import flexkern
from flexkern import demo
from flexkern.cli import main
from flexkern.render.spec import JobSpec
from flexkern.serve import fleet, task
from flexkern.serve.figures import FleetFigures
from flexkern.serve.fleet import Moment, Summary
from flexkern.serve.tally import LATENCIES, Counting, Tally
from flexkern.serve.task import Task, note
from flexkern.serve.telemetry import FLEET, PREFIX

RED = "a red disc and a blue square on dark green, fast"


def read(text):
    """Every value by its name and labels but the model's."""
    return {
        (sample.name.removeprefix(PREFIX), *(value for name, value in sample.labels.items() if name != "model_name")):
            sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip


@pytest.fixture
def scraped(tmp_path, monkeypatch, capsys):
    """Runs the command on two jobs: exit status, stderr, and what was told before each chunk that a test names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "WEIGHTS", save_tiny(tmp_path / "tiny.safetensors"))
    monkeypatch.setattr(demo, "ZOOM", 2)
    monkeypatch.setattr(task, "EVERY", 0.0)
    monkeypatch.setattr(fleet, "TURN", 0.0)
    do, told, ports, serve = {}, [], [], FleetFigures.serve

    def serving(own, port, host):
        found = serve(own, port, host)
        ports.append(found[0])
        return found

    def before(seed, chunk):
        told.append(read(urlopen(f"http://127.0.0.1:{ports[0]}/metrics").read().decode()))
        if errors := do.get((seed, chunk)):
            raise errors.pop(0)

    monkeypatch.setattr(FleetFigures, "serve", serving)
    watch_steps(monkeypatch, before)
    Path("jobs.jsonl").write_text("".join(json.dumps({"prompt": RED, "frames": 9, "seed": i}) + "\n" for i in range(2)))

    def run(*more):
        words = ["fleet", "jobs.jsonl", "--out", "out", "--shard", "0/1", "--no-progress", "--threads", "1"]
        ended = main([*words, "--metrics-port", "0", *more])
        return SimpleNamespace(ended=ended, err=capsys.readouterr().err, told=told, port=ports[0])

    return SimpleNamespace(run=run, do=do)


def test_a_fleet_tells_what_it_does_while_it_does_it(scraped):
    scraped.do[0, 2] = [OSError(28, "No space left on device")]
    seen = scraped.run()
    assert seen.ended == 0 and f"figures for Prometheus at http://127.0.0.1:{seen.port}/metrics" in seen.err
    first = seen.told[0]
    jobs = {name: first["jobs", name] for name in ("queued", "in_progress", "completed", "failed", "stopped")}
    assert jobs == {"queued": 1, "in_progress": 1, "completed": 0, "failed": 0, "stopped": 0}
    assert {name: first["workers", name] for name in ("idle", "rendering", "set_aside")} == {
        "idle": 0, "rendering": 1, "set_aside": 0
    }  # fmt: skip
    assert first["tries_total",] == 1 and first["pictures_total",] == first["frames_total",] == 0
    told = lambda name: [one[name,] for one in seen.told]
    made = [0, 1, 2, 2, 3, 4, 5, 6, 7]  # chunks before each step; those of the first job's first try among them
    counted = told("chunk_latency_seconds_count")
    assert all(most - 2 <= count <= most for count, most in zip(counted, made, strict=True))  # two may be unwritten
    assert counted == sorted(counted) and [counted[i] for i in (0, 3, 6)] == [0, 2, 5]  # where a try begins, none is
    assert told("pictures_total") == told("frames_total") == [3 * count for count in counted]
    assert told("tries_total") == [1, 1, 1, 2, 2, 2, 3, 3, 3] and told("retries_total") == [0] * 3 + [1] * 6
    assert [one["jobs", "completed"] for one in seen.told] == [0] * 6 + [1] * 3
    last = seen.told[-1]
    assert last["chunk_latency_seconds_bucket", "+Inf"] == last["chunk_latency_seconds_count",]
    assert 0 < last["chunk_latency_seconds_sum",] < 60
    assert 0 < seen.told[2]["checkpoint_age_seconds",] < 60 and last["renders_total", "finished"] == 1
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{seen.port}/metrics")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metrics-port", "{taken}"], "cannot be told at 127.0.0.1:{taken}: Address already in use"),
        (["--metrics-port", "70000"], "cannot be told at 127.0.0.1:70000: "),
        (
            ["--metrics-port", "0", "--metrics-host", "no.such.host.invalid"],
            "cannot be told at no.such.host.invalid:0:",
        ),
        (["--metrics-host", "0.0.0.0"], "--metrics-host is where --metrics-port listens: give both"),
    ],
)
def test_where_nothing_can_listen_is_refused_before_any_work(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(json.dumps({"prompt": RED, "frames": 3}) + "\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as stopped:
            main(["fleet", "jobs.jsonl", "--out", "out", "--shard", "0/1", *(one.format(taken=port) for one in more)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words.format(taken=port) in said and len(said.strip().splitlines()) == 1
    assert os.listdir() == ["jobs.jsonl"]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_events_of_a_try_are_counted():
    clock, wall = Clock(), Clock()
    counting = Counting(clock=clock, wall=wall)
    assert counting.kept is None
    counting.write("started", made=9)
    for made, seconds in ((12, 0.01), (15, 100.0), (18, 1.5)):
        clock.now += seconds
        counting.write("chunk", made=made, frames=3)
    tally = counting.tally
    assert counting.kept == 100 and (tally.frames, tally.pictures, tally.resumes) == (9, 9, 1)
    counts = {bound: count for bound, count in zip((*LATENCIES, None), tally.chunks, strict=True) if count}
    assert counts == {0.01: 1, 2: 1, None: 1} or counts == {0.025: 1, 2: 1, None: 1}  # as the clock rounds
    assert tally.seconds == pytest.approx(101.51)
    wall.now = 107.0
    counting.write("checkpoint", pictures=18, copy_seconds=0.1, write_seconds=0.1)
    assert counting.kept == 107
    both = tally.plus(tally)
    assert both.frames == 18 and sum(both.chunks) == 6 and both.seconds == 2 * tally.seconds


def a_task(folder, number, began):
    spec = JobSpec(prompt=RED, frames=3, out=folder / f"{number}.mp4")
    return Task(number=number, spec=spec, status=folder / f"{number}.json", said={}, began=began)


def figures_at(moment, **options):
    """What is told of a moment."""
    figures = FleetFigures(**options)
    figures.follow(SimpleNamespace(moment=lambda: moment), "small")
    return lambda: {
        (sample.name.removeprefix(PREFIX), *list(sample.labels.values())[1:]): sample.value
        for family in figures.collect() for sample in family.samples
    }  # fmt: skip


def test_what_runs_is_added_to_what_has_ended_and_never_becomes_less(tmp_path):
    tasks = [a_task(tmp_path, number, "now") for number in range(3)]
    made = {"chunks": [1] * (len(LATENCIES) + 1), "seconds": 5.0, "frames": 3, "pictures": 12, "resumes": 1}
    note(tasks[0], "running", tally=made, kept=90.0)
    note(tasks[1], "running", tally=made, kept=70.0)
    note(a_task(tmp_path, 2, "before"), "running", tally=made, kept=10.0)  # left by an earlier try
    moment = Moment(
        summary=Summary(jobs=9, done=1, skipped=2, failed=1, left_failed=1, stopped=1, waiting=4, lost=3),
        workers={"idle": 0, "rendering": 3, "set_aside": 2}, running=tuple(tasks), tally=Tally(frames=10, pictures=40),
    )  # fmt: skip
    clock = Clock()
    told = figures_at(moment, wall=clock)
    seen = told()
    assert (seen["frames_total",], seen["pictures_total",], seen["resumes_total",]) == (16, 64, 2)
    assert seen["chunk_latency_seconds_count",] == 2 * 16 and seen["chunk_latency_seconds_sum",] == 10
    assert seen["checkpoint_age_seconds",] == 30 and seen["worker_crashes_total",] == 3
    assert seen["jobs", "completed"] == 3 and seen["jobs", "failed"] == 2 and seen["jobs", "queued"] == 4
    assert seen["workers", "set_aside"] == 2 and seen["renders_total", "failed"] == 1
    tasks[0].status.unlink()
    clock.now = 120.0
    seen = told()
    assert seen["frames_total",] == 16 and seen["checkpoint_age_seconds",] == 50


def test_the_page_lists_every_figure_of_a_fleet():
    text = (Path(flexkern.__file__).parent / "docs/fleet.md").read_text()
    listed = set(re.findall(rf"`{PREFIX}(\w+)`", text))
    nothing = Moment(summary=Summary(), workers={"idle": 0}, running=(), tally=Tally())
    told = {re.sub("_(bucket|count|sum)$", "", name) for name, *_ in figures_at(nothing)()}
    assert listed == told and set(FLEET) < told
