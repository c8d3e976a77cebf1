"""Figures for Prometheus: what is counted, under which names, and that the dashboard asks for nothing else."""

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("prometheus_client", reason='needs pip install "flexkern[serve]"')

import small_render
from prometheus_client.parser import text_string_to_metric_families

import flexkern
from flexkern.render import Watch, prepare
from flexkern.serve.telemetry import FIGURES, FLEET, PREFIX, STAGES, Telemetry, sample_names

DOCS = Path(flexkern.__file__).parent / "docs"


def samples(telemetry):
    """Every value by its name and labels but the model's."""
    return read(telemetry.text().decode())


def read(text):
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "le"))
            found[(sample.name, *labels)] = sample.value
    return found


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_events_of_a_render_are_counted(clock):
    telemetry = Telemetry("small", clock=clock)
    telemetry.write("started", made=0, prompt_seconds=0.5)
    for made in (12, 24):
        clock.now += 2
        telemetry.write("chunk", made=made, frames=3, denoise_seconds=1.0, decode_seconds=0.5, encode_seconds=0.1,
                        peak_bytes=100 - made)  # fmt: skip
    telemetry.write("switch", seconds=0.25, prompt="b")
    telemetry.write("checkpoint", pictures=24, copy_seconds=0.1, write_seconds=0.2)
    telemetry.write("warning", message="whatever")
    clock.now += 7
    found = samples(telemetry)
    assert found["flexkern:pictures_total",] == 24 and found["flexkern:frames_total",] == 6
    assert found["flexkern:chunk_latency_seconds_sum",] == 4 and found["flexkern:chunk_latency_seconds_count",] == 2
    sums = {stage: found["flexkern:stage_latency_seconds_sum", stage] for stage in STAGES}
    assert sums == pytest.approx({"prompt": 0.75, "denoise": 2, "decode": 1, "encode": 0.2, "checkpoint": 0.3})
    assert found["flexkern:peak_memory_bytes",] == 88 and found["flexkern:checkpoint_age_seconds",] == 7
    telemetry.write("finished", target="x", made=24)
    found = samples(telemetry)
    assert found["flexkern:renders_total", "finished"] == 1 and found["flexkern:checkpoint_age_seconds",] == 0


def test_a_render_that_goes_on_counts_what_it_makes_itself(clock):
    telemetry = Telemetry("small", clock=clock)
    telemetry.write("started", render="b", made=100)
    telemetry.write("chunk", render="b", made=112, frames=3, denoise_seconds=1.0, decode_seconds=0.5)
    found = samples(telemetry)
    assert found["flexkern:pictures_total",] == 12 and found["flexkern:resumes_total",] == 1


def test_of_several_renders_the_oldest_checkpoint_counts(clock):
    telemetry = Telemetry("small", clock=clock)
    telemetry.write("started", render="a", made=0)
    clock.now = 10
    telemetry.write("started", render="b", made=0)
    clock.now = 15
    assert samples(telemetry)["flexkern:checkpoint_age_seconds",] == 15
    telemetry.left("a")
    assert samples(telemetry)["flexkern:checkpoint_age_seconds",] == 5


def test_a_real_render_fills_every_stage(tmp_path):
    telemetry = Telemetry("small")
    order = small_render.small_order(tmp_path / "film.mp4")
    job = prepare(order, small_render.small_engine(), small_render.small_family(), every=0)
    watch = Watch(progress=False, log=telemetry)
    job.run(watch=watch)
    watch.finished(order.target)
    found = samples(telemetry)
    for stage in STAGES:
        assert found["flexkern:stage_latency_seconds_count", stage] > 0, stage
    assert found["flexkern:stage_latency_seconds_count", "prompt"] == 4  # the first, and three changes
    assert found["flexkern:pictures_total",] == found["flexkern:frames_total",] - 2 == small_render.PICTURES
    assert found["flexkern:peak_memory_bytes",] > 1 << 20


def test_every_figure_is_told_under_its_name(clock):
    telemetry = Telemetry("small", clock=clock)
    telemetry.count_jobs(lambda: {"queued": 2, "failed": 1})
    telemetry.began(3.0)
    telemetry.completed(5.0)
    telemetry.crashed()
    telemetry.retried()
    telemetry.refused("queue_full")
    telemetry.write("started", made=0, prompt_seconds=0.1)
    telemetry.write("failed", made=0)
    text = telemetry.text().decode()
    told = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    of_fleets = {f"{PREFIX}{name}" for name in FLEET}
    assert sample_names() - of_fleets <= told
    assert samples(telemetry)["flexkern:jobs", "queued"] == 2
    assert all('model_name="small"' in line for line in text.splitlines() if not line.startswith("#"))


def test_prometheus_is_answered_on_a_port_of_this_machine():
    telemetry = Telemetry("small")
    port, end = telemetry.serve(0)
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert ("flexkern:pictures_total",) in read(answer.read().decode())
    finally:
        end()


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_the_dashboard_asks_for_figures_that_there_are():
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = dict.fromkeys(name for _, text in expressions(dashboard) for name in re.findall(r"flexkern:\w+", text))
    assert asked and set(asked) <= sample_names(), set(asked) - sample_names()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name).removeprefix(PREFIX) for name in asked}
    assert shown == {*FIGURES, *FLEET}, {*FIGURES, *FLEET} - shown
    for title, text in expressions(dashboard):
        assert text.count("(") == text.count(")") and text.count("[") == text.count("]"), title


def test_the_page_lists_every_figure():
    text = (DOCS / "serve.md").read_text()
    missing = [name for name in FIGURES if f"`{PREFIX}{name}`" not in text]
    assert not missing, f"serve.md does not say what {', '.join(missing)} are"
