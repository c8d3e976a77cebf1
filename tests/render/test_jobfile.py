"""Job files: what they hold, in every form, and the line that is blamed for what is wrong."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from flexkern.render import Encoding, JobSpec, PromptSwitch, SpecError, read_jobs

DISC, SQUARE = "a red disc", "a blue square"


@pytest.fixture
def jobs(tmp_path):
    """Reads what is written: (a file's name, its text) to its jobs."""

    def read(text, name="night.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return read_jobs(path)

    return read


def test_a_job_is_its_fields_and_its_paths_start_at_the_file(jobs, tmp_path):
    (entry,) = jobs(
        f"prompt: {DISC}\nout: a.mp4\nweights: /w\nlora: l.pt\nencoding: {{crf: 20, fps: 24}}\nseconds: 1:30"
    )
    assert entry.spec == JobSpec(
        prompt=DISC, out=tmp_path / "a.mp4", weights=Path("/w"), lora=(tmp_path / "l.pt",),
        encoding=Encoding(crf=20, fps=24), seconds=90,
    )  # fmt: skip
    assert entry.where("seconds") == f"{tmp_path / 'night.yaml'}, line 6"
    assert entry.where("seed") == entry.where() == f"{tmp_path / 'night.yaml'}, line 1"


JOBS = [{"prompt": DISC, "out": "a.mp4", "seed": 1}, {"prompt": SQUARE, "out": "b.mp4"}]
FORMS = {
    "list.yaml": f"- {{prompt: {DISC}, out: a.mp4, seed: 1}}\n\n- {{prompt: {SQUARE}, out: b.mp4}}\n",
    "documents.yaml": f"prompt: {DISC}\nout: a.mp4\nseed: 1\n---\nprompt: {SQUARE}\nout: b.mp4\n---\n",
    "merged.yaml": f"- &a {{prompt: {DISC}, out: a.mp4, seed: 1}}\n- {{<<: *a, prompt: {SQUARE}, seed: 0}}\n",
    "list.json": json.dumps(JOBS, indent="\t"),
    "lines.jsonl": "\n".join(map(json.dumps, JOBS)),
    "flow.yaml": f"[{{prompt: {DISC}, out: a.mp4, seed: 1}},\n {{prompt: {SQUARE}, out: b.mp4}}]",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(jobs, name):
    first, second = jobs(FORMS[name], name)
    assert [entry.spec.prompt for entry in (first, second)] == [DISC, SQUARE]
    assert [entry.spec.seed for entry in (first, second)] == [1, 0]
    lines = {"list.yaml": 3, "documents.yaml": 5, "merged.yaml": 2, "list.json": 7, "lines.jsonl": 2, "flow.yaml": 2}
    assert second.where() == f"{second.path}, line {lines[name]}"


def test_text_of_json_comes_through_as_json_has_it(jobs):
    (entry,) = jobs(json.dumps({"prompt": "a \U0001f408 / cat"}), "cat.json")  # a pair of surrogates
    assert entry.spec.prompt == "a \U0001f408 / cat"


def test_prompts_have_times_or_follow_each_other(jobs):
    timed, mapped, plain = jobs(
        f"- prompts: [{{at: 0, prompt: {DISC}}}, {{at: 1m, prompt: {SQUARE}, cut: true}}]\n"
        f"- prompts: {{0: {DISC}, 60: {SQUARE}}}\n"
        f"- prompts: [{DISC}, {SQUARE}]\n"
    )
    switch = PromptSwitch(at=60, prompt=SQUARE)
    assert timed.spec.script == (PromptSwitch(at=0, prompt=DISC), PromptSwitch(at=60, prompt=SQUARE, cut=True))
    assert mapped.spec.script == (PromptSwitch(at=0, prompt=DISC), switch) and not mapped.spec.texts
    assert plain.spec.texts == (DISC, SQUARE) and not plain.spec.script


WRONG = {
    "unknown field": ("prompt: a\nsed: 3", 2, "a job has no field 'sed'; did you mean 'seed'?"),
    "of another type": ("prompt: a\n\nseed: many", 3, "seed must be an int, got 'many'"),
    "out of range": ("frames: 0\nprompt: a", 1, "frames must be at least 1, got 0"),
    "no length": ("prompt: a\nseconds: 0", 2, "seconds must be more than 0, got 0"),
    "no time": ("prompt: a\nseconds: soon", 2, "seconds must be seconds or a time such as 90, .* got 'soon'"),
    "two lengths": ("prompt: a\nseconds: 3\nframes: 3", 3, "give seconds or frames, not both"),
    "two outputs": ("out: a.mp4\nlatents: a.safetensors", 2, "give out or latents, not both"),
    "another preset": ("prompt: a\npreset: flax", 2, "no preset 'flax'"),
    "another override": ("preset: flex\noverrides:\n  retention.snik: 3", 2, "retention.*sink"),
    "an entry": ("prompts:\n- {at: 0, prompt: a}\n- {at: x, prompt: b}", 3, "entry 2: at must be seconds"),
    "a mapped entry": ("prompts:\n  0: a\n  x: b", 3, "entry 2: at must be seconds"),
    "an entry without time": ("prompts:\n- {at: 0, prompt: a}\n- {prompt: b}", 3, "entry 2: expected {at: seconds"),
    "late prompts": ("seed: 1\nprompts: [{at: 1, prompt: a}]", 2, "the first prompt must be at 0 seconds, got 1"),
    "an empty prompt": ("seed: 1\nprompt: ' '", 2, "prompt must be a text"),
    "encoding": ("prompt: a\nencoding: {crf: 52}", 2, "encoding.crf must be at most 51, got 52"),
    "encoding's field": ("prompt: a\nencoding: {crff: 5}", 2, "encoding has no field 'crff'; did you mean 'crf'"),
    "encoding's rate": ("prompt: a\nencoding: {fps: 24 fps}", 2, "fps must be a number .* 24000/1001, got '24 "),
    "scales": ("lora: [a, b]\nlora_scale: 1", 2, "lora_scale has one number for each lora, .* got 2 of lora and 1"),
    "twice": ("seed: 1\nseed: 2", 2, "'seed' is written twice"),
    "no mapping": ("- {prompt: a}\n- 3", 2, "a job must be a mapping of fields, got 3"),
    "no YAML": ("prompt: [", 1, "not YAML"),
    "a second document": ("prompt: a\n---\nsed: 1", 3, "a job has no field 'sed'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_line(jobs, case):
    text, line, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        jobs(text)
    assert re.search(rf"night.yaml, line {line}: .*{words}", str(caught.value)), caught.value


def test_every_job_is_checked_and_the_lines_of_all_that_are_wrong_are_told(jobs):
    with pytest.raises(ValueError, match=r"line 2: .*'sed'.* \(2 more of its jobs will not do: line 5, 6\)"):
        jobs("- prompt: a\n  sed: 1\n- prompt: b\n- prompt: c\n  frames: 0\n- 4")


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]", "---\n---\n"])
def test_a_file_without_jobs_is_refused(jobs, text):
    with pytest.raises(ValueError, match="night.yaml holds no job: expected a mapping of fields"):
        jobs(text)


def test_a_key_twice_in_json_is_refused(jobs):
    with pytest.raises(ValueError, match="night.json: 'seed' is written twice"):
        jobs('{"seed": 1, "seed": 2}', "night.json")


def test_a_job_comes_back_from_what_it_is_written_as():
    spec = JobSpec(
        prompts=(PromptSwitch(at=0, prompt=DISC), PromptSwitch(at=1.5, prompt=SQUARE, cut=True)), seconds=3.0,
        lora=(Path("/a"),), lora_scale=(0.5,), ema=False, preset="infinity-rope", overrides={"position.table": (1.0,)},
        encoding=Encoding(crf=0), out=Path("-"), image=Path("/i.png"), seed=2**64 - 1,
    )  # fmt: skip
    assert JobSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert JobSpec().to_dict() == {}


def test_an_error_names_its_field():
    with pytest.raises(SpecError) as caught:
        JobSpec(frames=0)
    assert caught.value.field == "frames"


def test_a_rate_may_be_a_fraction(jobs):
    (entry,) = jobs("{prompt: a, encoding: {fps: 24000/1001}}")
    assert entry.spec.encoding.rate(16) == Fraction(24000, 1001)
    assert JobSpec.from_dict(entry.spec.to_dict(), Path()) == entry.spec


def test_weights_are_no_job_file(tmp_path):
    """As in --lora a.safetensors b.safetensors, whose second file would be taken for one."""
    (tmp_path / "b.safetensors").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="b.safetensors is not a job file: .* takes one file each time it is given"):
        read_jobs(tmp_path / "b.safetensors")
