"""Latents on disk: readable after every chunk, however the process ends; the same as what was written; decoded."""

import errno
import signal
import subprocess
import sys

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flexkern.finite import NotFiniteError
from flexkern.render import Encoding, LatentsFile, VideoWriter, validate_output
from flexkern.render.decoding import decode_latents, inspect_latents
from flexkern.render.parts import Parts

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


class Brighten:
    """A decoder that looks back: four pictures a frame but the first, each with what was before."""

    def __init__(self):
        self.last = None

    def __call__(self, latents):
        made = []
        for latent in latents[0]:
            before = torch.zeros_like(latent) if self.last is None else self.last
            count = 1 if self.last is None else 4
            made += [((latent + before)[:3] * 20 + 100).clamp(0, 255)] * count
            self.last = latent
        return torch.stack(made)[None].repeat_interleave(8, -1).repeat_interleave(8, -2).to(torch.uint8).movedim(2, -1)


def pictures_of(path):
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def test_latents_become_the_video_that_was_ordered(tmp_path):
    latents = torch.randn(8, 16, 4, 6)
    with begin(tmp_path / "l.safetensors", about={"pictures": "27", "model": "wan"}) as file:
        file.write(latents, 1000)
    held = inspect_latents(tmp_path / "l.safetensors")
    assert (held.frames, held.channels, held.size, held.model, held.pictures) == (8, 16, (4, 6), "wan", 27)
    heard = []
    assert decode_latents(held, Brighten(), tmp_path / "v.mp4", told=heard.append) == 27 and heard == [3, 6, 8]
    with VideoWriter(tmp_path / "at once.mp4", 48, 32) as writer:
        writer.write(Brighten()(latents[None])[0, :27])
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "at once.mp4").read_bytes()
    assert len(pictures_of(tmp_path / "v.mp4")) == 27


def test_latents_of_a_stopped_render_are_decoded_as_far_as_they_go(tmp_path):
    file = begin(tmp_path / "l.safetensors", about={"pictures": "99"})
    file.write(torch.randn(5, 16, 4, 6), 1000)
    file.stop()
    held = inspect_latents(tmp_path / "l.unfinished.safetensors")
    assert decode_latents(held, Brighten(), tmp_path / "v.mp4") == 17


def test_a_video_that_cannot_be_decoded_leaves_nothing(tmp_path):
    with begin(tmp_path / "l.safetensors") as file:
        file.write(torch.randn(5, 16, 4, 6), 1000)
    (tmp_path / "v.mp4").write_bytes(b"old")
    decoder, calls = Brighten(), []

    def stopped(latents):
        calls.append(len(latents))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decoder(latents)

    with pytest.raises(KeyboardInterrupt):
        decode_latents(inspect_latents(tmp_path / "l.safetensors"), stopped, tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_a_video_that_is_decoded_takes_the_place_of_one_that_was_begun(tmp_path):
    with begin(tmp_path / "l.safetensors") as file:
        file.write(torch.randn(5, 16, 4, 6), 1000)
    held, out = inspect_latents(tmp_path / "l.safetensors"), tmp_path / "video.mp4"
    parts = Parts(out)
    parts.checkpoint(3).write_bytes(b"")  # of a render that was killed
    parts.release()
    once = iter([Brighten()(torch.randn(1, 3, 16, 4, 6))])
    with pytest.raises(StopIteration):
        decode_latents(held, lambda latents: next(once), out)
    assert parts.checkpoint(3).exists() and not out.exists()
    assert decode_latents(held, Brighten(), out) == 17
    assert len(pictures_of(out)) == 17 and not parts.folder.exists()


def test_pictures_of_latents_are_written_by_one_at_a_time(tmp_path):
    """Whoever comes later is told before any work; at the latest when he would write."""
    with begin(tmp_path / "l.safetensors") as file:
        file.write(torch.randn(5, 16, 4, 6), 1000)
    held, out = inspect_latents(tmp_path / "l.safetensors"), tmp_path / "shots" / "%03d.png"
    refused = pytest.raises(BlockingIOError, match=r"another render is writing .*/shots/%03d.png")

    def other(frames):
        with refused:
            validate_output(out, Encoding())
        with refused:
            decode_latents(held, Brighten(), out)

    assert decode_latents(held, Brighten(), out, told=other) == 17
    assert [path.name for path in sorted(out.parent.iterdir())] == [f"{i:03}.png" for i in range(17)]
    parts = Parts(out)
    with refused:
        decode_latents(held, Brighten(), out)
    assert len(list(out.parent.glob("*.png"))) == 17
    parts.checkpoint(3).write_bytes(b"")  # of a render that was killed: its pictures are replaced
    parts.release()
    assert decode_latents(held, Brighten(), out) == 17 and not parts.folder.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": torch.zeros(1)}, "holds no tensor named latents"),
        ({"latents": torch.zeros(3, 16, 4, 6)}, r"\[1, F, C, h, w\], .* holds F32 \[3, 16, 4, 6\]"),
        ({"latents": torch.zeros(1, 3, 16, 4, 6, dtype=torch.int32)}, "holds I32"),
        (b"no safetensors", "l.safetensors is a text of 14 bytes that begins 'no safetensors'"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "is a Git LFS pointer for a file of 5 bytes"),
        (save({"latents": torch.zeros(1, 3, 16, 4, 6)})[:-8], "is cut off: 8 of 4,688 bytes are missing"),
    ],
)
def test_what_holds_no_latents_is_refused(tmp_path, content, words):
    path = tmp_path / "l.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(ValueError, match=words):
        inspect_latents(path)
    with pytest.raises(FileNotFoundError, match="there are no latents"):
        inspect_latents(tmp_path / "none.safetensors")


class Overflowing(Brighten):
    """A decoder whose pictures are not finite after some frames, which rounding to bytes hides."""

    def __call__(self, latents):
        self.finite = (latents.abs() < 1e30).all()
        return super().__call__(latents)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            float("nan"),
            "the latents of frames from 3 of .*l.safetensors are not finite in float32; it was handed in so",
        ),
        (float("inf"), "the latents of frames from 3 of .*l.safetensors are not finite"),
        (
            1e35,
            "the pictures of frames from 3 of .* are not finite in float32: they began in the decoder, the latents are",
        ),
    ],
)
@pytest.mark.parametrize("name", ["v.mp4", "%d.png"])
def test_what_is_not_finite_becomes_no_video(tmp_path, value, words, name):
    latents = torch.randn(1, 6, 16, 4, 6)
    latents[0, 4, 0, 0, 0] = value
    save_file({"latents": latents}, tmp_path / "l.safetensors")
    with pytest.raises(NotFiniteError, match=words):
        decode_latents(inspect_latents(tmp_path / "l.safetensors"), Overflowing(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]
