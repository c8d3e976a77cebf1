"""Every file of flexkern/docs/examples does what it says."""

import runpy
import sys
from pathlib import Path

import pytest

import flexkern.cli
from flexkern.demo import encode_prompts
from flexkern.engine import Session

av = pytest.importorskip("av")
pytest.importorskip("tyro")

from flexkern.render import read_schedule

EXAMPLES = Path(__file__).parent.parent.parent / "flexkern" / "docs" / "examples"


def run_script(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def count_pictures(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_no_example_is_untried():
    tried = {"own_preset.py", "prompts.txt", "render_loop.py", "schedule.yaml"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tried


def test_the_loop_writes_its_video_and_follows_the_second_prompt(tmp_path, monkeypatch, capsys):
    follow, asked = Session.switch, []
    monkeypatch.setattr(Session, "switch", lambda self, prompt: asked.append(prompt) or follow(self, prompt))
    run_script("render_loop.py", monkeypatch, "--frames", "9", "--out", str(tmp_path / "loop.mp4"))
    assert "9 pictures of 288x288" in capsys.readouterr().out
    assert count_pictures(tmp_path / "loop.mp4") == 9
    assert [prompt.split()[1] for prompt in asked] == ["yellow"]


def test_the_preset_slows_fewer_bands(monkeypatch, capsys):
    run_script("own_preset.py", monkeypatch)
    first, second = (line.split(":")[1].split() for line in capsys.readouterr().out.splitlines() if "bands" in line)
    assert len(first) == len(second) == 22
    assert first[0] == second[0] == "1.00"
    assert sum(map(float, first)) < sum(map(float, second))


@pytest.mark.parametrize(
    ("options", "made"),
    [
        (["--prompts", "schedule.yaml", "--out", "out.mp4"], ["out.mp4"]),
        (["--data_path", "prompts.txt", "--output_folder", "videos"], ["videos/0000.mp4", "videos/0001.mp4"]),
    ],
)
def test_the_files_of_prompts_render(options, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [str(EXAMPLES / word) if (EXAMPLES / word).is_file() else word for word in options]
    assert flexkern.cli.main(["render", *options, "--frames", "3", "--no-progress"]) == 0
    assert [count_pictures(tmp_path / name) for name in made] == [3] * len(made)


def test_the_schedule_can_be_followed_to_its_end():
    switches = read_schedule(EXAMPLES / "schedule.yaml")
    assert [switch.at for switch in switches] == [0, 5, 10]
    assert len(encode_prompts([switch.prompt for switch in switches])) == 3
