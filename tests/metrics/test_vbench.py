"""VBench-Long: what it is given, what is read of its results, and the command; VBench itself is a stand-in."""

import json
import sys

import pytest

from flexkern.cli import main
from flexkern.metrics import vbench

LONG_RESULTS = {  # of eval_long.py: the score over all, then single videos
    "subject_consistency": [0.9713, [{"video_path": "a.mp4", "video_results": 0.9713}]],
    "dynamic_degree": [0.5, [], []],
    "imaging_quality": [0.6756, [], []],
}
STAND_IN = """
import json
from pathlib import Path
class VBenchLong:
    def __init__(self, device, info, output):
        self.output = Path(output)
        assert Path(info).name == "VBench_full_info.json" and str(device) == "cpu"
    def evaluate(self, videos_path, name, dimension_list, mode, **settings):
        names = sorted(path.name for path in Path(videos_path).iterdir())
        found = {one: [0.5, names, mode, settings] for one in dimension_list}
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(found))
"""


@pytest.fixture
def videos(tmp_path):
    files = {name: tmp_path / f"{name}.mp4" for name in ("one", "two", "three")}
    for name, path in files.items():
        path.write_text(name)
    order = {"script": [{"at": 0, "prompt": "a cat", "cut": False}, {"at": 3, "prompt": "a dog", "cut": False}]}
    for name in ("one", "two"):
        (tmp_path / f"{name}.mp4.json").write_text(json.dumps({"format": 1, "order": order}))
    return files


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that answers as VBench-Long does."""
    home = tmp_path / "packages"
    for name in ("vbench", "vbench2_beta_long", "vbench2_beta_long/configs"):
        (home / name).mkdir(parents=True)
    (home / "vbench" / "__init__.py").write_text("")
    (home / "vbench" / "VBench_full_info.json").write_text("[]")
    (home / "vbench2_beta_long" / "__init__.py").write_text(STAND_IN)
    for name in ("clip_length_mix", "slow_fast_params"):
        (home / "vbench2_beta_long" / "configs" / f"{name}.yaml").write_text("")
    monkeypatch.syspath_prepend(home)
    yield home
    for name in ("vbench", "vbench2_beta_long"):
        sys.modules.pop(name, None)


def test_videos_are_laid_out_under_their_prompts(videos, tmp_path):
    laid = vbench.lay_out({path: "a cat" if name != "three" else "three" for name, path in videos.items()}, tmp_path)
    assert [path.name for path in laid] == ["a cat-0.mp4", "a cat-1.mp4", "three-0.mp4"]
    assert [path.read_text() for path in laid] == ["one", "two", "three"]
    assert json.loads((tmp_path / "prompts.json").read_text())["a cat-1.mp4"] == "a cat"
    with pytest.raises(FileExistsError, match="would take the clips in it"):
        vbench.lay_out({videos["one"]: "x"}, tmp_path)


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("../../etc/passwd", "etc passwd"), ("a/b\\c.mp4", "a b c mp4"), ("split_clip", "split clip"),
        ("night-Scene-3", "night Scene 3"), ("take-12", "take 12"), ("...", "video"), ("x" * 300, "x" * 100),
        ("一" * 90, "一" * 33),
    ],
)  # fmt: skip
def test_a_file_name_is_what_vbench_can_read(prompt, stem):
    assert vbench.file_stem(prompt) == stem


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [("film.mov", ValueError, "names the clips of .mp4 files"), ("none.mp4", FileNotFoundError, "there is no video")],
)
def test_what_cannot_be_laid_out_is_refused_before_any_file(tmp_path, name, error, says):
    (tmp_path / "film.mov").write_text("")
    with pytest.raises(error, match=says):
        vbench.lay_out({tmp_path / name: "x"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_runs_with_the_settings_of_its_own_script(videos, tmp_path, installed, capsys):
    out = tmp_path / "out"
    command = ["eval", "vbench", *map(str, videos.values()), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--dimensions", "dynamic_degree", "aesthetic_quality"]) == 0
    found = json.loads((out / "results" / "vbench_long_eval_results.json").read_text())
    assert list(found) == ["dynamic_degree", "aesthetic_quality"]
    _, names, mode, settings = found["dynamic_degree"]
    assert names == ["a cat-0.mp4", "a cat-1.mp4", "three-0.mp4"] and mode == "long_custom_input"
    assert settings["sb_clip2clip_feat_extractor"] == "dino" and settings["w_inclip"] == 1.0
    printed = capsys.readouterr().out
    assert "| **out** | | – | – | – | 50.00 | 50.00 | – | this run |" in printed
    assert "| LongLive | 60 | 97.13 | 95.89 | 98.61 | 44.56 | 58.17 | 67.56 | LongLive-2.0, table 5 |" in printed
    assert "Comparable with a published row only on the same prompts" in printed


def test_without_it_the_layout_is_left_and_the_way_on_is_said(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vbench, "is_installed", lambda: False)
    out = tmp_path / "out"
    assert main(["eval", "vbench", str(videos["one"]), "--out", str(out)]) == 0
    assert (out / "videos" / "a cat-0.mp4").is_file()
    assert f"--videos_path {out / 'videos'} --dimension subject_consistency" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match="VBench-Long is not installed"):
        vbench.run(out)


def test_a_wheel_without_its_configurations_is_told(tmp_path, installed):
    (installed / "vbench2_beta_long" / "configs" / "slow_fast_params.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"installed without .*slow_fast_params.yaml: put a clone"):
        vbench.run(tmp_path, device="cpu")


def test_results_of_a_run_elsewhere_are_shown(tmp_path, capsys):
    path = tmp_path / "night.json"
    path.write_text(json.dumps(LONG_RESULTS))
    assert vbench.read_results(path) == pytest.approx({"subject": 97.13, "dynamic": 50, "imaging": 67.56})
    assert main(["eval", "vbench", "--results", str(path)]) == 0
    assert "| **night** | | 97.13 | – | – | 50.00 | – | 67.56 | this run |" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", "no", '{"dynamic_degree": []}', '{"dynamic_degree": {"a": 1}}'])
def test_what_is_no_results_file_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.json (is no results file|has none)"):
        vbench.read_results(path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give videos to score, or --results FILE to show, one of both"),
        (["a.mp4", "--results", "r.json"], "one of both"),
        (["a.mp4", "--dimensions", "beauty"], "on videos of one's own, got beauty"),
        (["nowhere.mp4"], "there is no video nowhere.mp4"),
    ],
)
def test_bad_commands_are_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "vbench", *words])
    assert stopped.value.code == 2 and says in capsys.readouterr().err
