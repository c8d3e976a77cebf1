"""Names of files are names, whatever they look like; one writer a name; a name holds a whole file or what it held."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from flexkern.metrics.video import inspect_video, pictures_at, read_pictures
from flexkern.render import LatentsFile, VideoWriter, validate_latents_target, validate_target
from flexkern.render.sidecar import sidecar_path
from flexkern.render.signals import stoppable, uninterrupted
from flexkern.render.target import LONGEST, Target, make_folder, unfinished_name, write_json

SIDE = 32
PICTURES = np.arange(3 * SIDE * SIDE * 3, dtype=np.uint8).reshape(3, SIDE, SIDE, 3)
NAMES = ["file:b.mp4", "md5:x.mp4", "take-12:30.mp4", "pipe:1.mp4", "http:x.mp4", "concat:b.mp4|b.mp4", "crypto:b.mp4"]
NAMES += [
    "shot-%03d.mp4",
    "100%.mp4",
    "-.mp4",
    "-o.mp4",
    "~.mp4",
    "a?b#c&d.mp4",
    "*.mp4",
    "über Größe 猫 🎬.mp4",
    " .mp4",
]
NAMES += ["e\u0301.mp4", "a\nb.mp4", "'\"\\.mp4", "x" * (LONGEST - 4) + ".mp4", "猫" * 83 + ".mp4", "UPPER.MP4"]


def write(path):
    with VideoWriter(path, SIDE, SIDE) as writer:
        writer.write(PICTURES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
def test_every_name_is_the_name_of_that_file(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    others = ("b.mp4", "x.mp4", "1.mp4", "shot-000.mp4", "shot-001.mp4")
    for other in others:
        (tmp_path / other).write_bytes(b"of somebody else")
    path = name if relative else tmp_path / name
    write(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {*others, name}
    assert all((tmp_path / other).read_bytes() == b"of somebody else" for other in others)
    assert inspect_video(path).pictures == len(list(read_pictures(path))) == 3
    assert pictures_at(path, [0.0])[0].shape == (SIDE, SIDE, 3)


def test_latents_have_names_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("file:b.safetensors", "take-12:30.safetensors", "-%d.safetensors"):
        with LatentsFile(name, fps=16, per_frame=4, about={}) as file:
            file.write(torch.zeros(1, 1, 2, 2), 1)
        assert [entry.name for entry in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_a_name_that_no_file_system_takes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 255 bytes, got 256: xxx"):
        validate_target(tmp_path / ("x" * 252 + ".mp4"))
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="pipe.mp4 is no ordinary file"):
        validate_target(tmp_path / "pipe.mp4")


def test_what_lies_beside_a_file_has_a_name_that_fits():
    video = Path("/a") / ("x" * (LONGEST - 4) + ".mp4")
    assert sidecar_path(Path("/a/v.mp4")) == Path("/a/v.mp4.json")
    found = {sidecar_path(video), sidecar_path(video.with_name("y" + video.name[1:]))}
    assert {len(path.name) for path in found} == {LONGEST} and {path.suffix for path in found} == {".json"}
    assert len(found) == 2  # two videos whose names differ have two


def test_a_file_of_the_longest_name_is_written_whole(tmp_path):
    path = tmp_path / ("x" * (LONGEST - 5) + ".json")
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_unfinished_names_are_of_the_same_folder_and_suffix():
    assert unfinished_name("/a/v.mp4").name == "v.unfinished.mp4"
    long = [unfinished_name(f"/a/{'猫' * 80}{letter}.mp4").name for letter in "ab"]
    assert all(len(os.fsencode(name)) <= LONGEST and name.endswith(".unfinished.mp4") for name in long)
    assert long[0] != long[1]


def test_an_aim_behind_a_link_is_written_where_it_is(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real.mp4").write_bytes(b"old")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "elsewhere" / "real.mp4")
    write(tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink() and inspect_video(tmp_path / "elsewhere" / "real.mp4").pictures == 3


def test_a_name_holds_what_it_held_until_the_new_file_is_whole(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"old")
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        writer.write(PICTURES)
        assert (tmp_path / "v.mp4").read_bytes() == b"old"
    assert inspect_video(tmp_path / "v.mp4").pictures == 3


OPEN = """
import sys, time
from flexkern.render import VideoWriter
writer = VideoWriter(sys.argv[1], 32, 32)
print("open", flush=True)
time.sleep(60)
"""


def test_another_writer_of_the_same_name_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, SIDE, SIDE) as writer:
        for refused in (lambda: VideoWriter(path, SIDE, SIDE), lambda: validate_target(path), lambda: Target(path)):
            with pytest.raises(BlockingIOError, match="another render is writing .*v.mp4"):
                refused()
        writer.write(PICTURES)
    write(path)  # it is free again
    with subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(BlockingIOError, match="another render"):
            validate_target(path)
        process.kill()
    validate_target(path)  # the system unlocks what a killed process held
    write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.mp4"]


def test_writers_that_race_leave_one_whole_file(tmp_path):
    outcomes = []

    def attempt():
        try:
            write(tmp_path / "v.mp4")
            outcomes.append("written")
        except BlockingIOError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8 and "written" in outcomes
    assert inspect_video(tmp_path / "v.mp4").pictures == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("made", [VideoWriter, None])
def test_a_writer_that_is_forgotten_leaves_nothing(tmp_path, made):
    writer = (
        VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
        if made
        else LatentsFile(tmp_path / "l.safetensors", fps=16, per_frame=4, about={})
    )
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert not list(tmp_path.iterdir())


def test_a_check_creates_nothing(tmp_path):
    validate_target(tmp_path / "v.mp4")
    validate_latents_target(tmp_path / "l.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_stop_as_ctrl_c_does_between_pictures(number):
    done = []
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # the suite may itself run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), stoppable() as came:
            with uninterrupted():
                signal.raise_signal(number)
                done.append("the picture")
            done.append("the next one")
        assert done == ["the picture"] and came == [number] and signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)


def test_what_others_handle_stays_theirs(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("theirs"))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stoppable() as came:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
        assert heard == ["theirs"] and not came
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hangup)


def test_reading_closes_and_names_what_is_no_video(tmp_path):
    (tmp_path / "file:n.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="file:n.mp4 is no video"):
        inspect_video(tmp_path / "file:n.mp4")
    assert issubclass(av.error.InvalidDataError, ValueError)


def test_a_folder_is_made_or_it_is_said_why_not(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*/file: it is a file$"):
        make_folder(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write to .*/file/c: Not a directory$"):
        make_folder(tmp_path / "file" / "c")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root is denied nothing
    with pytest.raises(PermissionError, match="no permission to write to .*/a$"):
        make_folder(tmp_path / "a")
