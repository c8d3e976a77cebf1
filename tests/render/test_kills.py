"""A render that is killed at any moment, and goes on, gives the bytes of one that was left alone."""

import os
import subprocess
import sys

import small_render

KILLS = 24


def test_kills_at_random_moments_change_no_byte(tmp_path):
    """Half of them at a random time, half just before something is flushed, renamed or removed.

    Some take a checkpoint after every chunk, some now and then, so that chunks wait to be written.
    """
    command = [sys.executable, small_render.__file__, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed, films = map(int, done.stdout.split())
    assert killed == KILLS and films >= 1
    whole = (tmp_path / "whole.mp4").read_bytes()
    for film in range(films):
        assert (tmp_path / f"film{film}.mp4").read_bytes() == whole
    videos = {f"film{film}.mp4" for film in range(films)} | {"whole.mp4"}
    assert {path.name for path in tmp_path.iterdir()} == videos | {f"{name}.json" for name in videos}
