"""Latents on disk: readable after every chunk, however the process ends; the same as what was written."""

import errno
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flexkern.render import LatentsFile

ABOUT = {"prompt": 'a "cat", über\nall', "seed": "3"}
KILLED = """
import os, signal, sys, torch
from flexkern.render import LatentsFile
file = LatentsFile(sys.argv[1], fps=16, per_frame=4, about={})
for chunk in torch.load(sys.argv[2]).split(3):
    file.write(chunk, 1000)
os.kill(os.getpid(), getattr(signal, sys.argv[3]))
"""


def begin(path, **options):
    return LatentsFile(path, **{"fps": 16, "per_frame": 4, "about": ABOUT, **options})


def read(path):
    return load_file(path)["latents"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunk_by_chunk_is_all_at_once(tmp_path, dtype):
    latents = torch.randn(33, 16, 4, 6).to(dtype)
    with begin(tmp_path / "l.safetensors") as file:
        for chunk in latents.split([3, 1, 29]):
            file.write(chunk, 10_000)
            assert torch.equal(read(tmp_path / "l.unfinished.safetensors")[0], latents[: file.frames])
        assert not (tmp_path / "l.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]
    assert torch.equal(read(tmp_path / "l.safetensors")[0], latents)
    with safe_open(tmp_path / "l.safetensors", framework="pt") as opened:
        assert opened.metadata() == ABOUT and opened.keys() == ["latents"]
    assert file.pictures == 129


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Nothing of what was written stays alive, and the header of a long video fits where that of none stood."""
    chunk = torch.zeros(1000, 1, 2, 2)
    with begin(tmp_path / "l.safetensors") as file:
        for _ in range(120):
            file.write(chunk, 10**9)
        held = [value for value in vars(file).values() if isinstance(value, torch.Tensor | list | bytes)]
        assert not held and file.frames == 120_000
    assert read(tmp_path / "l.safetensors").shape == (1, 120_000, 1, 2, 2)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_leaves_what_was_made(tmp_path, name):
    latents = torch.randn(12, 16, 4, 6)
    torch.save(latents, tmp_path / "given.pt")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "l.safetensors"), str(tmp_path / "given.pt"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -getattr(signal, name), done.stderr
    assert torch.equal(read(tmp_path / "l.unfinished.safetensors")[0], latents)
    with begin(tmp_path / "l.safetensors") as file:  # the next one takes its place
        file.write(latents[:1], 1)
    assert read(tmp_path / "l.safetensors").shape[1] == 1
    assert not (tmp_path / "l.unfinished.safetensors").exists()


class Full:
    """A file with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        fits = max(0, self.room - self.file.tell())
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:fits])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self.file.__enter__()

    def __exit__(self, *error):
        return self.file.__exit__(*error)


@pytest.mark.parametrize("room", [0, 7, 100, 3000, 10_000])
def test_a_full_disk_keeps_whole_chunks(tmp_path, room):
    latents, file = torch.randn(30, 16, 4, 6), begin(tmp_path / "l.safetensors")
    file._target.file = Full(file._target.file, room)
    with pytest.raises(OSError, match=r"No space left on device: .*l.safetensors"), file:
        for chunk in latents.split(1):
            file.write(chunk, 1000)
    if file.frames:
        assert torch.equal(read(tmp_path / "l.safetensors")[0], latents[: file.frames])
    assert file.frames == max(0, (room - 264) // (16 * 4 * 6 * 4)) and bool(list(tmp_path.iterdir())) == bool(
        file.frames
    )


def test_only_frames_that_the_pictures_need_are_written(tmp_path):
    with begin(tmp_path / "l.safetensors") as file:
        file.write(torch.zeros(3, 1, 2, 2), 6)  # 1 + 4 + 1
        assert (file.frames, file.pictures) == (3, 9)
        file.write(torch.zeros(3, 1, 2, 2), 5)
        assert file.frames == 5


def test_nothing_written_leaves_nothing_and_what_was_there(tmp_path):
    (tmp_path / "old.safetensors").write_bytes(b"old")
    for name in ("old", "new"):
        with begin(tmp_path / f"{name}.safetensors"):
            pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.safetensors", b"old")]


def test_what_does_not_belong_is_refused(tmp_path):
    with begin(tmp_path / "l.safetensors") as file:
        file.write(torch.zeros(1, 16, 4, 6), 99)
        for wrong in (torch.zeros(1, 16, 4, 8), torch.zeros(1, 16, 4, 6).half(), torch.zeros(16, 4, 6)):
            with pytest.raises(ValueError, match=r"latents must be float32 \[F, \[16, 4, 6\]\], got "):
                file.write(wrong, 99)
    with pytest.raises(ValueError, match="l.safetensors is closed"):
        file.write(torch.zeros(1, 16, 4, 6), 99)
    assert read(tmp_path / "l.safetensors").shape[1] == 1
    with begin(tmp_path / "m.safetensors") as file, pytest.raises(ValueError, match="must be floating point"):
        file.write(torch.zeros(1, 16, 4, 6, dtype=torch.uint8), 99)
    for name, error in (("l.pt", ValueError), ("none/l.safetensors", FileNotFoundError)):
        with pytest.raises(error):
            begin(tmp_path / name)
