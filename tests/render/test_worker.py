"""A worker makes the video of a job, whatever became of an earlier try, and says in one word how it ended."""

import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_demo import save_tiny

from flexkern import demo
from flexkern.cli import main
from flexkern.render import EventLog, JobSpec, Worker, find_stopped
from flexkern.session import Session

RED, YELLOW = "a red disc and a blue square on dark green, fast", "a yellow disc and a cyan square on black, slow"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny):
    """A folder of its own, with the tiny model in the demo's place; how often it was loaded, and what was encoded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "WEIGHTS", tiny)
    monkeypatch.setattr(demo, "ZOOM", 2)
    loaded, encoded, load, encode = [], [], demo.load_engine, demo.encode_prompts
    monkeypatch.setattr(demo, "load_engine", lambda path, **given: loaded.append(path) or load(path, **given))
    monkeypatch.setattr(demo, "encode_prompts", lambda prompts: encoded.extend(prompts) or encode(prompts))
    return SimpleNamespace(loaded=loaded, encoded=encoded)


def spec(out="a.mp4", **given):
    return JobSpec(**{"prompt": RED, "frames": 9, "out": Path(out)} | given)


def stopping_at(chunk):
    """Says to stop before the chunk of that number, from 0."""
    asked = iter(range(1000))
    return lambda: next(asked) >= chunk


def whole(name="whole.mp4"):
    """The bytes of a render that nobody disturbed."""
    assert Worker().run(spec(name)).status == "done"
    return Path(name).read_bytes()


def test_a_job_becomes_the_video_that_the_command_makes():
    given = ["--prompt", RED, "--frames", "9", "--preset", "pi", "--retention.sink", "2", "--seed", "4", "--crf", "30"]
    assert main(["render", *given, "--out", "b.mp4", "--no-progress"]) == 0
    heard = []
    job = JobSpec.from_dict({"prompt": RED, "frames": 9, "preset": "pi", "overrides": {"retention.sink": 2},
                             "seed": 4, "encoding": {"crf": 30}, "out": "a.mp4"})  # fmt: skip
    outcome = Worker().run(job, on_progress=heard.append, preview=Path("now.png"), log=EventLog("l.jsonl"))
    assert (outcome.status, outcome.code, outcome.pictures, outcome.resumed_from) == ("done", 0, 9, None)
    assert outcome.message == "a.mp4: 9 pictures, 0.6 s"
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert [(one.stage, one.pictures, one.of) for one in heard] == [("loading", 0, 9)] + [
        ("rendering", made, 9) for made in (0, 3, 6, 9)
    ]
    assert [one.chunk_seconds is None for one in heard] == [True, True, False, False, False]
    assert Path("now.png").is_file() and len(Path("l.jsonl").read_text().splitlines()) == 5


def test_a_stopped_job_goes_on_to_the_same_bytes(folder):
    worker = Worker()
    outcome = worker.run(spec(), stop=stopping_at(2))
    assert (outcome.status, outcome.code, outcome.pictures) == ("stopped", 75, 6)
    assert "holds the first 6 of 9 pictures" in outcome.message
    outcome = worker.run(spec())
    assert (outcome.status, outcome.pictures, outcome.resumed_from) == ("done", 9, 6)
    assert Path("a.mp4").read_bytes() == whole()
    assert not Path("a.mp4.parts").exists()


def test_the_command_goes_on_with_a_workers_job():
    assert Worker().run(spec(), stop=stopping_at(1)).status == "stopped"
    assert find_stopped("a.mp4").order.pictures == 9
    assert main(["render", "--resume", "a.mp4", "--no-progress"]) == 0
    assert Path("a.mp4").read_bytes() == whole()


def test_a_job_that_is_stopped_before_its_first_chunk_leaves_nothing(tmp_path):
    outcome = Worker().run(spec(), stop=lambda: True)
    assert (outcome.status, outcome.pictures) == ("stopped", 0) and not list(tmp_path.iterdir())


def test_what_is_done_is_done_at_once(folder):
    worker = Worker()
    assert worker.run(spec()).status == "done"
    count = len(folder.loaded)
    again = Worker()
    again.check(spec())
    outcome = again.run(spec())
    assert (outcome.status, outcome.pictures) == ("done", 9) and "there already" in outcome.message
    assert len(folder.loaded) == count == 1


def test_weights_stay_and_a_prompt_is_encoded_once(folder, tiny, tmp_path):
    worker = Worker()
    for i, prompt in enumerate((RED, YELLOW, RED, YELLOW)):
        assert worker.run(spec(f"{i}.mp4", prompt=prompt, frames=3)).status == "done"
    assert len(folder.loaded) == 1
    engine = worker._loaded[1]
    before = len(folder.encoded)
    engine.embed(RED), engine.embed(YELLOW)
    assert len(folder.encoded) == before
    Path("other.safetensors").write_bytes(tiny.read_bytes())
    assert worker.run(spec("4.mp4", frames=3, model="other.safetensors")).status == "done"
    assert len(folder.loaded) == 2
    worker.unload()
    assert worker.run(spec("5.mp4", frames=3)).status == "done" and len(folder.loaded) == 3


def test_a_worker_of_a_thread_installs_no_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    seen, ended = [], []

    def note(_):
        seen.append({number: signal.getsignal(number) for number in before})

    thread = threading.Thread(target=lambda: ended.append(Worker().run(spec(), on_progress=note)))
    thread.start()
    thread.join()
    assert ended[0].status == "done" and all(one == before for one in seen)


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (OSError(28, "No space left on device"), "stopped", 75, "No space left"),
        (MemoryError("no more"), "stopped", 75, "out of memory: no more"),
    ],
)
def test_room_and_memory_are_matters_of_the_moment(monkeypatch, error, status, code, words):
    step = Session.step

    def failing(session):
        if session.chunks == 2:
            raise error
        return step(session)

    worker = Worker(every=0)
    monkeypatch.setattr(Session, "step", failing)
    outcome = worker.run(spec())
    assert (outcome.status, outcome.code, outcome.pictures) == (status, code, 6) and words in outcome.message
    monkeypatch.setattr(Session, "step", step)
    outcome = worker.run(spec())
    assert outcome.status == "done" and outcome.resumed_from
    assert Path("a.mp4").read_bytes() == whole()


def test_a_video_without_its_sidecar_is_finished(monkeypatch):
    """As where a process is killed between the two."""

    def full(target, content):
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("flexkern.render.job.write_sidecar", full)
        assert Worker(every=0).run(spec()).status == "stopped"
    assert Path("a.mp4").is_file() and not Path("a.mp4.json").exists()
    assert Worker().run(spec()).status == "done"
    assert Path("a.mp4").read_bytes() == whole() and Path("a.mp4.json").is_file()


def test_numbers_that_are_not_finite_fail_for_good(monkeypatch):
    from flexkern.finite import NotFiniteError

    def bad(session):
        raise NotFiniteError("chunk 0", "float32")

    monkeypatch.setattr(Session, "step", bad)
    outcome = Worker().run(spec())
    assert (outcome.status, outcome.code) == ("failed", 1) and "finite" in outcome.message


REFUSED = {
    "another job's video": (lambda: spec(seed=1), "a.mp4 exists already, and is not of this job"),
    "no output": (lambda: JobSpec(prompt=RED, frames=3), "a job needs out or latents, the file to write"),
    "stdout": (lambda: spec("-"), "a worker writes files, not to stdout"),
    "a prompt": (lambda: spec("b.mp4", prompt="a cat"), "the demo model knows prompts like"),
    "never shown": (
        lambda: JobSpec.from_dict({"prompts": {0: RED, 9: YELLOW}, "frames": 3, "out": "b.mp4"}),
        "prompts: the prompt at 9 seconds is never shown",
    ),
    "for checkpoints": (lambda: spec("b.mp4", ema=False), "ema is for checkpoints: name what weights are with model"),
    "no prompt": (
        lambda: JobSpec(model="longlive", weights=Path("x"), frames=3, out=Path("b.mp4")),
        "model longlive needs prompt or prompts",
    ),
    "no weights": (lambda: spec("b.mp4", model="longlive"), "model longlive needs weights PATH"),
    "no folder": (lambda: spec("none/b.mp4"), "there is no folder none"),
    "a device": (lambda: spec("b.mp4", device="cuda:77"), "there is no device 'cuda:77'"),
    "its weights": (lambda: spec("b.mp4", weights=Path("b.mp4")), "b.mp4 would be overwritten: it is also weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_before_anything_is_loaded(folder, case):
    Path("a.mp4").write_bytes(b"somebody's")
    job, words = REFUSED[case][0](), REFUSED[case][1]
    worker = Worker()
    with pytest.raises((ValueError, OSError)) as caught:
        worker.check(job)
    assert str(caught.value).startswith(words)
    outcome = worker.run(job)
    assert (outcome.status, outcome.code, outcome.pictures) == ("refused", 2, 0)
    assert outcome.message.startswith(words) and not folder.loaded


def test_a_worker_for_no_device_is_refused():
    with pytest.raises(ValueError, match="device must be cpu"):
        Worker(device="tpu")
    with pytest.raises(ValueError, match="threads must be at least 0"):
        Worker(threads=-1)
