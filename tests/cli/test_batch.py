"""Several videos: what is done is skipped, what was stopped goes on, what fails is survived; all is written down."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from watched_steps import watch_steps

import flexkern.render
from flexkern import demo

RED = "a red disc and a blue square on dark green, fast"
QUIET = ("--no-progress",)


def write(*jobs, name="night.json"):
    Path(name).write_text(json.dumps([{"prompt": RED, "frames": 3} | job for job in jobs]))


def manifest(name="night.json.manifest.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def outcomes(name="night.json.manifest.jsonl"):
    return [(Path(line["target"]).name, line["outcome"]) for line in manifest(name)]


@pytest.fixture
def steps(monkeypatch):
    """The seeds of the videos of which chunks were made, in order, each chunk once; and what to do at a chunk."""
    made, do = [], {}

    def before(seed, chunk):
        made.append(seed)
        if isinstance(action := do.get((seed, chunk)), int):
            signal.raise_signal(action)
        elif action:
            raise action

    watch_steps(monkeypatch, before)
    return SimpleNamespace(made=made, do=do)


def test_what_is_done_is_skipped_until_its_job_changes(flexkern_, steps):
    write({"seed": 1, "out": "a.mp4"}, {"seed": 2, "out": "b.mp4"})
    assert flexkern_("render", "night.json", *QUIET)[0] == 0 and steps.made == [1, 2]
    status, out, err = flexkern_("render", "night.json", *QUIET)
    assert (status, out, steps.made) == (0, "", [1, 2])
    assert err.splitlines() == [
        f"flexkern: {name}.mp4: is finished already, nothing of it has changed: skipped" for name in "ab"
    ]
    assert outcomes() == [("a.mp4", "finished"), ("b.mp4", "finished"), ("a.mp4", "skipped"), ("b.mp4", "skipped")]
    write({"seed": 1, "out": "a.mp4"}, {"seed": 3, "out": "b.mp4"})
    status, _, err = flexkern_("render", "night.json", *QUIET)
    assert status == 2 and err == "flexkern: error: b.mp4 exists already: --overwrite replaces it\n"
    assert flexkern_("render", "night.json", "--overwrite", *QUIET)[0] == 0 and steps.made == [1, 2, 1, 3]


CHANGES = {
    "video": lambda: Path("a.mp4").write_bytes(Path("a.mp4").read_bytes()[:-1]),
    "sidecar": lambda: Path("a.mp4.json").write_text("{"),
    "no sidecar": lambda: Path("a.mp4.json").unlink(),
    "weights": lambda: Path("tiny.safetensors").write_bytes(Path("tiny.safetensors").read_bytes()[:-1] + b"\1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_video_whose_weights_or_bytes_have_changed_is_not_done(flexkern_, tiny, change):
    Path("tiny.safetensors").write_bytes(Path(tiny).read_bytes())
    write({"model": "tiny.safetensors", "out": "a.mp4"})
    assert flexkern_("render", "night.json", *QUIET)[0] == 0
    assert "skipped" in flexkern_("render", "night.json", *QUIET)[2]
    CHANGES[change]()
    status, _, err = flexkern_("render", "night.json", *QUIET)
    assert status == 2 and "a.mp4 exists already" in err


def test_what_fails_is_survived_and_told(flexkern_, steps):
    steps.do[1, 0] = OSError(28, "No space left on device")
    Path("p.txt").write_text(f"{RED}\n" * 3)
    status, out, err = flexkern_("render", "--data-path", "p.txt", "--output-folder", "v", "--frames", 3, *QUIET)
    assert status == 73 and out.count("3 pictures") == 2
    assert re.search(r"flexkern: v/0001.mp4: .*No space left.*; nothing was written of 3 pictures\n", err), err
    assert err.endswith("flexkern: 1 of 3 videos failed, see v/manifest.jsonl\n")
    assert outcomes("v/manifest.jsonl") == [("0000.mp4", "finished"), ("0001.mp4", "failed"), ("0002.mp4", "finished")]
    assert "No space left" in manifest("v/manifest.jsonl")[1]["error"]
    steps.do.clear()
    steps.made.clear()
    assert flexkern_("render", "--data-path", "p.txt", "--output-folder", "v", "--frames", 3, *QUIET)[0] == 0
    assert steps.made == [1]


def test_failures_of_several_kinds_are_status_1(flexkern_, steps, monkeypatch):
    write(*({"seed": i, "out": f"{i}.mp4", "frames": 9} for i in range(3)))
    steps.do[0, 0], steps.do[1, 1] = OSError(28, "No space"), MemoryError()
    status, _, err = flexkern_("render", "night.json", *QUIET)
    assert status == 1, err
    assert [line["status"] for line in manifest() if line["outcome"] == "failed"] == [73, 75]


def test_a_video_that_was_stopped_goes_on(flexkern_, steps):
    write({"seed": 0, "out": "a.mp4", "frames": 12}, {"seed": 1, "out": "b.mp4"})
    steps.do[0, 2] = KeyboardInterrupt()
    status, _, err = flexkern_("render", "night.json", *QUIET)
    assert status == 130 and outcomes() == [("a.mp4", "interrupted")], err
    steps.do.clear()
    assert flexkern_("render", "night.json", *QUIET)[0] == 0
    assert outcomes()[1:] == [("a.mp4", "finished"), ("b.mp4", "finished")]
    whole = Path("a.mp4").read_bytes()
    assert flexkern_("render", "night.json", "--overwrite", *QUIET)[0] == 0
    assert Path("a.mp4").read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_chunk_ends_the_others(flexkern_, steps, number):
    write({"seed": 0, "out": "a.mp4", "frames": 6}, {"seed": 1, "out": "b.mp4"})
    steps.do[0, 1] = number
    status, out, err = flexkern_("render", "night.json", *QUIET)
    assert (status, out, steps.made) == (128 + number, "a.mp4: 6 pictures, 0.4 s\n", [0, 0])
    assert err.endswith("\nflexkern: interrupted: a.mp4 was the last one that was tried\n")
    assert outcomes() == [("a.mp4", "finished")]
    steps.do[1, 0] = number
    status, _, err = flexkern_("render", "night.json", *QUIET)
    assert status == 128 + number and "interrupted: nothing was written of 3 pictures" in err


@pytest.mark.parametrize("name", ["a.mov", "shots/%03d.png"])
def test_other_outputs_go_on_too(flexkern_, steps, monkeypatch, name):
    monkeypatch.setattr(demo, "ZOOM", 8)  # ProRes takes multiples of 32
    write({"seed": 0, "out": name, "frames": 12})
    steps.do[0, 2] = KeyboardInterrupt()
    assert flexkern_("render", "night.json", *QUIET)[0] == 130
    steps.do.clear()
    steps.made.clear()
    assert flexkern_("render", "night.json", *QUIET)[0] == 0
    assert "skipped" in flexkern_("render", "night.json", *QUIET)[2]
    files = sorted(Path(name).parent.glob(f"*{Path(name).suffix}"))
    first = [path.read_bytes() for path in files]
    assert flexkern_("render", "night.json", "--overwrite", *QUIET)[0] == 0
    assert [path.read_bytes() for path in files] == first and len(files) == (1 if name == "a.mov" else 12)


def test_a_manifest_that_cannot_be_written_ends_nothing(flexkern_):
    write({"out": "a.mp4"}, {"out": "b.mp4"})
    status, out, err = flexkern_("render", "night.json", "--manifest", "none/m.jsonl", *QUIET)
    assert status == 0 and out.count("3 pictures") == 2 and err.count("the manifest cannot be written") == 2


def test_one_video_has_a_manifest_only_where_it_is_named(flexkern_, tmp_path):
    assert flexkern_("render", "--frames", 3, *QUIET)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"video.mp4", "video.mp4.json"}
    assert flexkern_("render", "--frames", 3, "--out", "b.mp4", "--manifest", "m.jsonl", *QUIET)[0] == 0
    (line,) = manifest("m.jsonl")
    assert line == {
        "time": line["time"], "target": "b.mp4", "outcome": "finished", "seed": 0, "preset": "flex", "prompt": RED,
        "pictures": 3,
    }  # fmt: skip


def test_the_job_of_a_sidecar_renders_the_same_video(flexkern_, tiny):
    given = ("--model", tiny, "--preset", "pi", "--retention.sink", 2, "--seed", 5, "--crf", 30, "--frames", 6)
    assert flexkern_("render", *given, *QUIET)[0] == 0
    said = json.loads(Path("video.mp4.json").read_text())
    Path("again.json").write_text(json.dumps(said["job"] | {"out": "again.mp4"}))
    assert flexkern_("render", "again.json", *QUIET)[0] == 0
    assert Path("again.mp4").read_bytes() == Path("video.mp4").read_bytes()
    assert json.loads(Path("again.mp4.json").read_text())["video"]["sha256"] == said["video"]["sha256"]


def test_a_sidecar_replaces_no_job_file(flexkern_):
    write({"out": "a.mp4"}, name="a.mp4.json")
    status, _, err = flexkern_("render", "a.mp4.json", *QUIET)
    assert status == 2 and "a.mp4.json would be overwritten: it is also" in err


def test_a_person_sees_what_is_rendered_how_far_it_is_and_how_fast_it_was(flexkern_, monkeypatch):
    monkeypatch.setattr("flexkern.render.batch.AT_ONCE", 0)
    status, out, err = flexkern_("render", "--frames", 6, "--retention.sink", 2, "--prompt", RED)
    lines = err.splitlines()
    assert status == 0 and out == "video.mp4: 6 pictures, 0.4 s\n"
    assert re.fullmatch(r"flexkern: loading .*tiny.safetensors \(0\.\d MB\)", lines[0])
    said = "demo, preset flex, retention.sink 2, 72x72, 6 pictures (0.375 s), seed 0; backend sdpa on cpu"
    assert lines[1].startswith("flexkern: backend sdpa: auto") and lines[2] == f"flexkern: video.mp4: {said}"
    assert re.fullmatch(r"flexkern: chunk 2, 6 of 6 pictures \(100 %\), [\d.e+]+ pictures/s, done", lines[3])
    fast = r"denoising [\d.e+]+ pictures/s, end to end [\d.e+]+ pictures/s"
    fast += r"; encoding [\d.e-]+ s, of which [\d.e-]+ s were waited for"
    assert re.fullmatch(rf"flexkern: 6 pictures in 0:\d\d: {fast}", lines[4]) and len(lines) == 5


def test_a_log_and_a_preview_are_written(flexkern_):
    from PIL import Image

    Path("p.yaml").write_text(f"0: {RED}\n0.1: {RED}")
    given = ("--prompts", "p.yaml", "--frames", 6, "--log", "l.jsonl", "--preview", "now.png")
    assert flexkern_("render", *given, *QUIET)[0] == 0
    events = [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()]
    assert [one["event"] for one in events] == ["started", "chunk", "switch", "chunk", "finished"]
    assert Image.open("now.png").size == (72, 72)
    assert flexkern_("render", "--frames", 3, "--log", "l.jsonl", "--preset", "pi", *QUIET)[0] == 2  # exists already
    status, _, err = flexkern_("render", "--frames", 3, "--out", "b.mp4", "--preview", "now.gif", *QUIET)
    assert status == 2 and err == "flexkern: error: a preview must be named .png or .jpg or .jpeg, got 'now.gif'\n"


def test_the_same_video_has_the_same_tags_and_bytes(flexkern_):
    import av

    for name in ("a", "b"):
        assert flexkern_("render", "--frames", 3, "--out", f"{name}.mp4", *QUIET)[0] == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    with av.open("a.mp4") as video:
        assert video.metadata["title"] == RED and video.metadata["comment"] == "seed 0, preset flex, model demo"
        assert "creation_time" not in video.metadata


def test_a_failure_to_write_the_sidecar_is_told(flexkern_, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "video.mp4.json")

    monkeypatch.setattr(flexkern.render.job, "write_sidecar", full)
    status, out, err = flexkern_("render", "--frames", 3, *QUIET)
    assert status == 75 and not out and "No space left on device: 'video.mp4.json'" in err
