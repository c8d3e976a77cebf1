"""``flexkern render JOB``: every job is checked before anything is loaded; options beside it take its words' place."""

import json
import re
import shutil
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import av
import pytest
from videos import pictures_in

from flexkern import demo
from flexkern.cli.flags import Flags
from flexkern.render import JobSpec
from flexkern.session import Session

RED, YELLOW = "a red disc and a blue square on dark green, fast", "a yellow disc and a cyan square on black, slow"
EXAMPLES = Path(__file__).parents[2] / "flexkern" / "docs" / "examples"


def write(text, name="night.yaml"):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)


@pytest.fixture
def orders_of(jobs_of):
    """The orders that a command would render, and what it says on stderr."""

    def ordered(*arguments):
        jobs, err = jobs_of(*arguments)
        return [job.order for job in jobs], err

    return ordered


def test_every_field_of_a_job_is_an_option_of_that_name():
    options = {f.name for f in fields(Flags)}
    assert {f.name for f in fields(JobSpec)} - options == {"overrides", "encoding"}  # policies; --fps and --crf


def test_a_job_is_what_its_options_are(flexkern_):
    options = ("--prompt", RED, "--frames", 9, "--seed", 3, "--preset", "pi", "--retention.sink", 2, "--crf", 30)
    assert flexkern_("render", *options, "--out", "a.mp4", "--no-progress")[0] == 0
    said = "frames: 9, seed: 3, preset: pi, overrides: {retention.sink: 2}, encoding: {crf: 30}, out: b.mp4"
    write(f"{{prompt: {RED!r}, {said}}}")
    status, out, err = flexkern_("render", "night.yaml", "--no-progress")
    assert (status, out) == (0, "b.mp4: 9 pictures, 0.6 s\n"), err
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_several_jobs_share_an_engine_where_they_can(flexkern_, monkeypatch, tiny):
    shutil.copy(tiny, "other.safetensors")
    loaded, load = [], demo.load_engine
    monkeypatch.setattr(demo, "load_engine", lambda path, **options: loaded.append(path) or load(path, **options))
    jobs = [{"seed": seed, "frames": 3, "out": f"{seed}.mp4", "prompt": RED} for seed in range(3)]
    jobs[2]["model"] = "other.safetensors"
    write(json.dumps(jobs), "night.json")
    status, out, err = flexkern_("render", "night.json", "--no-progress")
    assert status == 0 and [pictures_in(f"{i}.mp4") for i in range(3)] == [3, 3, 3], err
    assert [str(path) for path in loaded] == [tiny, "other.safetensors"]


def test_paths_start_at_the_file(orders_of):
    write(f"prompt: {RED}\nframes: 3\nout: a.mp4", "shots/night.yaml")
    (order,), _ = orders_of("shots/night.yaml")
    assert order.target == Path("shots/a.mp4")


def test_options_beside_a_file_take_the_place_of_its_words(orders_of):
    second = f"{{prompts: [{RED!r}, {YELLOW!r}], seconds: 1, out: b.mp4}}"
    write(f"- {{prompt: {RED!r}, frames: 3, seed: 1, out: a.mp4}}\n- {second}")
    options = ("--prompt", YELLOW, "--frames", 6, "--retention.sink", 2, "--no-progress")
    (first, second), err = orders_of("night.yaml", *options)
    told = "flexkern: night.yaml: options take the place of what it says: --frames, --prompt, --retention.sink"
    assert err.splitlines()[0] == told
    assert first.prompts == second.prompts == (YELLOW,) and first.pictures == second.pictures == 6
    assert first.overrides == second.overrides == {"retention.sink": 2}
    assert (first.seed, second.seed) == (1, 0) and (first.target, second.target) == (Path("a.mp4"), Path("b.mp4"))


def test_an_option_with_the_value_of_leaving_it_out_still_counts(orders_of):
    write(f"{{prompt: {RED!r}, frames: 3, preset: pi, overrides: {{retention.sink: 2}}, out: a.mp4, seed: 4}}")
    (order,), _ = orders_of("night.yaml", "--seed", 0, "--retention.sink", 3)
    assert order.seed == 0 and order.overrides == {"retention.sink": 3} and order.preset == "pi"


LENGTHS = {
    f"prompt: {RED}": 160,
    f"prompts: {{0: {RED!r}, 2: {YELLOW!r}}}": 160,
    f"prompts: {{0: {RED!r}, 6: {YELLOW!r}}}": 192,
    f"prompts: {{0: {RED!r}, 6: {YELLOW!r}, 14: {RED!r}}}": 22 * 16,
    f"prompts: [{RED!r}, {YELLOW!r}]": 320,
}


@pytest.mark.parametrize("said", LENGTHS)
def test_a_length_that_is_not_given_is_what_the_prompts_need(orders_of, said):
    write(f"{said}\nout: a.mp4")
    (order,), _ = orders_of("night.yaml")
    assert order.pictures == LENGTHS[said]


GOOD = f"- {{prompt: {RED!r}, frames: 3, out: a.mp4}}\n"
REFUSED = {
    "a missing file": ("", "there is no job file night.yaml"),
    "a field": (f"{GOOD}- {{sed: 3}}", "night.yaml, line 2: a job has no field 'sed'"),
    "no output": (f"{GOOD}- {{prompt: {RED!r}}}", "night.yaml, line 2: a job needs out or latents, the file to write"),
    "missing weights": (f"{GOOD}- {{weights: none.pt, out: b.mp4}}", "night.yaml, line 2: no weights at none.pt"),
    "a checkpoint without prompt": (
        f"{GOOD}- {{model: longlive, weights: x, out: b.mp4}}",
        "night.yaml, line 2: model longlive needs prompt TEXT",
    ),
    "a missing checkpoint": (
        f"{GOOD}-\n  model: longlive\n  prompt: a\n  weights: x.pt\n  out: b.mp4",
        "night.yaml, line 3: no checkpoint at x.pt",
    ),
    "only for checkpoints": (f"{GOOD}- {{chunk: 3, out: b.mp4}}", "night.yaml, line 2: chunk is for checkpoints"),
    "the same file twice": (GOOD * 2, "two videos would be written to a.mp4"),
    "its own file": (f"{{prompt: {RED!r}, out: night.yaml}}", "night.yaml, line 1: the video must be named .mp4"),
    "no folder": (f"{GOOD}- {{out: none/b.mp4}}", "night.yaml, line 2: there is no folder none"),
    "never shown": (
        f"{GOOD}- out: b.mp4\n  frames: 3\n  prompts:\n    0: {RED}\n    9: {YELLOW}",
        "night.yaml, line 4: the prompt at 9 seconds is never shown: the video has 3 pictures",
    ),
    "a cut without slots": (
        f"{GOOD}- out: b.mp4\n  prompts: [{{at: 0, prompt: {RED!r}}}, {{at: 1, prompt: {RED!r}, cut: true}}]",
        "night.yaml, line 2: the cut at 1 seconds needs position.index 'slot'",
    ),
    "a window too small": (
        f"{GOOD}- {{prompt: {RED!r}, frames: 3, out: b.mp4, overrides: {{retention.window: 2, retention.sink: 1}}}}",
        "night.yaml, line 2: window must hold the sink (1) and the incoming frames (3), got 2",
    ),
    "a device": (f"{GOOD}- {{out: b.mp4, device: tpu}}", "night.yaml, line 2: device must be cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_before_anything_is_loaded(flexkern_, monkeypatch, tmp_path, case):
    monkeypatch.setattr(demo, "load_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    text, words = REFUSED[case]
    if text:
        write(text)
    before = sorted(tmp_path.iterdir())
    status, out, err = flexkern_("render", "night.yaml")
    assert status == 2 and not out
    assert re.fullmatch(rf"flexkern: error: {re.escape(words)}[^\n]*\n", err), err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("options", ["--data-path p.txt", "--output-folder v"])
def test_options_that_contradict_a_job_file_are_refused(flexkern_, options):
    write(GOOD)
    status, _, err = flexkern_("render", "night.yaml", *options.split())
    assert status == 2 and err == f"flexkern: error: give --job or {options.split()[0]}, not both\n"


def test_another_rate_is_said_plainly(flexkern_):
    status, _, err = flexkern_("render", "--frames", 6, "--fps", 24, "--crf", 30, "--no-progress")
    said = "--fps 24: the model makes 16 pictures a second: 1.5 times as fast, 0.375 seconds are shown in 0.25"
    assert status == 0 and err.splitlines()[0] == f"flexkern: {said}"
    with av.open("video.mp4") as video:
        assert video.streams.video[0].average_rate == 24 and sum(1 for _ in video.decode(video=0)) == 6


@pytest.mark.parametrize(
    ("option", "pictures", "rate"),
    [
        ("--frames 3 --fps 24000/1001", 3, Fraction(24000, 1001)),
        ("--frames 3 --fps 23.976", 3, Fraction(24000, 1001)),
        ("--seconds 0:00.5", 8, 16),
        ("--seconds 250ms", 4, 16),
        ("--seconds 5e-1", 8, 16),
    ],
)
def test_a_rate_and_a_length_are_written_as_people_do(flexkern_, option, pictures, rate):
    assert flexkern_("render", *option.split(), "--no-progress")[0] == 0
    with av.open("video.mp4") as video:
        assert video.streams.video[0].average_rate == rate and sum(1 for _ in video.decode(video=0)) == pictures


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--fps 24/0", "fps must be a number of pictures per second, such as 16, 23.976 or 24000/1001, got '24/0'"),
        ("--fps nan", "got 'nan'"),
        ("--fps 1/2", "--fps must be 1 to 1000 pictures per second, got 0.5"),
        ("--seconds soon", "--seconds must be seconds or a time such as 90, 1:30, 60s or 1m30s, got 'soon'"),
        ("--seconds -1:30", "got '-1:30'"),
        ("--seconds nan", "--seconds must be more than 0, got nan"),
    ],
)
def test_what_is_no_rate_or_length_is_refused(flexkern_, monkeypatch, option, words):
    monkeypatch.setenv("COLUMNS", "300")
    name, value = option.split()
    status, out, err = flexkern_("render", f"{name}={value}")
    assert status == 2 and words in out + err, out + err


def test_prompts_change_by_the_models_time_whatever_the_rate(flexkern_, monkeypatch):
    switch, at = Session.switch, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: at.append(self.next_frame) or switch(self, prompt))
    write(f"{{prompts: {{0: {RED!r}, 0.375: {YELLOW!r}}}, frames: 12, encoding: {{fps: 8}}, out: a.mp4}}")
    assert flexkern_("render", "night.yaml", "--no-progress")[0] == 0
    assert at == [6]


def test_the_example_renders(flexkern_, monkeypatch):
    switch, cut, seen = Session.switch, Session.cut, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: seen.append(prompt) or switch(self, prompt))
    monkeypatch.setattr(Session, "cut", lambda self: seen.append("cut") or cut(self))
    shutil.copy(EXAMPLES / "jobs.yaml", ".")
    status, out, err = flexkern_("render", "jobs.yaml", "--no-progress")
    assert status == 0 and [pictures_in(name) for name in ("scene.mp4", "scene-1.mp4", "two.mp4")] == [48, 48, 24], err
    assert seen == [YELLOW, RED, "cut"] * 2 + [YELLOW]
