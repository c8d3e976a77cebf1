"""File names as disks have them: of every length that a file system takes, and of any bytes."""

import json
import os
import subprocess
import sys


def test_a_video_of_the_longest_name_is_rendered_whole(flexkern_, tiny, tmp_path):
    """Its sidecar has no room for a longer one: once the film was made, and the status 75."""
    name = "x" * 251 + ".mp4"
    render = ("render", "--model", tiny, "--frames", 3, "--out", name, "--preview", "y" * 251 + ".png")
    assert flexkern_(*render)[0] == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".mp4", ".png"]
    status, _, error = flexkern_(*render)
    assert status == 2 and "exists already" in error


def test_a_file_name_of_any_bytes_is_a_name(tiny, tmp_path):
    """Such as one of Latin-1, on a disk of long ago."""
    video, log = b"gr\xfcn.mp4", b"gr\xfcn.jsonl"
    words = ("render", "--model", tiny, "--frames", "3", "--out", video, "--log", log)
    command = [sys.executable, "-m", "flexkern", *words]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {os.fsencode(path.name) for path in tmp_path.iterdir()} == {video, log, video + b".json"}
    assert done.stdout.startswith(video + b": 3 pictures")
    first, *_ = (tmp_path / os.fsdecode(log)).read_text(encoding="utf-8").splitlines()
    assert os.fsencode(json.loads(first)["target"]) == video
