"""Every file of flexkern/docs/examples does what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from videos import pictures_in

import flexkern.cli
from flexkern.engine import Session

av = pytest.importorskip("av")
pytest.importorskip("tyro")

EXAMPLES = Path(__file__).parent.parent.parent / "flexkern" / "docs" / "examples"


def run_script(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_no_example_is_untried():
    tried = {
        "fleet.jsonl",
        "interactive.jsonl",
        "jobs.yaml",
        "own_preset.py",
        "prompts.txt",
        "prompts_over_time.yaml",
        "render_loop.py",
    }
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tried


def test_the_loop_writes_its_video_and_follows_the_second_prompt(tmp_path, monkeypatch, capsys):
    follow, asked = Session.switch, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: asked.append(prompt) or follow(self, prompt))
    run_script("render_loop.py", monkeypatch, "--frames", "9", "--out", str(tmp_path / "loop.mp4"))
    assert "9 pictures of 288x288" in capsys.readouterr().out
    assert pictures_in(tmp_path / "loop.mp4") == 9
    assert [prompt.split()[1] for prompt in asked] == ["yellow"]


def test_the_preset_slows_fewer_bands(monkeypatch, capsys):
    run_script("own_preset.py", monkeypatch)
    first, second = (line.split(":")[1].split() for line in capsys.readouterr().out.splitlines() if "bands" in line)
    assert len(first) == len(second) == 22
    assert first[0] == second[0] == "1.00"
    assert sum(map(float, first)) < sum(map(float, second))


def test_every_prompt_is_rendered_to_a_video_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data_path", str(EXAMPLES / "prompts.txt"), "--output_folder", "videos"]
    assert flexkern.cli.main(["render", *options, "--frames", "3", "--no-progress"]) == 0
    assert [pictures_in(tmp_path / "videos" / name) for name in ("0000.mp4", "0001.mp4")] == [3, 3]


def test_the_prompts_over_time_are_followed_to_the_last(tmp_path, monkeypatch):
    follow, asked = Session.switch, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: asked.append(prompt) or follow(self, prompt))
    text = (EXAMPLES / "prompts_over_time.yaml").read_text()
    assert "{at: 5," in text and "{at: 10," in text
    path = tmp_path / "sooner.yaml"
    path.write_text(text.replace("{at: 5,", "{at: 0.1,").replace("{at: 10,", "{at: 0.3,"))
    options = ["--prompts", str(path), "--frames", "9", "--no-progress", "--out", str(tmp_path / "out.mp4")]
    assert flexkern.cli.main(["render", *options]) == 0
    assert pictures_in(tmp_path / "out.mp4") == 9
    assert [prompt.split()[1] for prompt in asked] == ["yellow", "red"]


def test_the_jobs_of_a_fleet_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_text((EXAMPLES / "fleet.jsonl").read_text().replace('"frames": 24', '"frames": 6'))
    assert flexkern.cli.main(["fleet", "jobs.jsonl", "--out", "films", "--shard", "0/1"]) == 0
    made = sorted(path.relative_to("films") for path in Path("films").rglob("*.mp4"))
    assert len(made) == 4 and Path("two/two.mp4") in made
    assert {pictures_in(tmp_path / "films" / path) for path in made} == {6}


def test_the_prompts_of_a_line_follow_each_other_in_one_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow, asked = Session.switch, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: asked.append(prompt) or follow(self, prompt))
    options = ["--data_path", str(EXAMPLES / "interactive.jsonl"), "--output_folder", "videos"]
    assert flexkern.cli.main(["render", *options, "--frames", "6", "--no-progress"]) == 0
    assert [pictures_in(tmp_path / "videos" / name) for name in ("0000.mp4", "0001.mp4")] == [6, 6]
    assert [prompt.split()[1] for prompt in asked] == ["yellow", "red"]
