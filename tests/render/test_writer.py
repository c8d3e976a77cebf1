"""The file a render leaves: its form, its colours, what survives a kill; and the loop that fills it."""

import signal
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from flexkern.finite import NotFiniteError
from flexkern.render import PromptSwitch, VideoWriter, render, validate_switches
from flexkern.render.writer import SAME_EVERYWHERE, uninterrupted

SIDE = 64
LOST = 40  # pictures of a killed process: one group of 16, the look-ahead of 16, B-frames
KILLED = f"""
import os, signal, sys
import numpy as np
from flexkern.render.writer import VideoWriter
assert "torch" not in sys.modules
writer = VideoWriter(sys.argv[1], {SIDE}, {SIDE})
writer.write(np.load(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def moving(pictures):
    """A bright bar that crosses a gradient: every picture differs from its neighbours."""
    pixels = np.zeros((pictures, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[..., 2] = np.arange(SIDE, dtype=np.uint8) * 2
    for number in range(pictures):
        pixels[number, :, (2 * number) % SIDE :][:, :8] = 200
    return pixels


def decoded(path):
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def write(path, pixels, **options):
    with VideoWriter(path, SIDE, SIDE, **options) as writer:
        writer.write(pixels)


def close_enough(got, expected):
    return np.abs(np.stack(got).astype(int) - expected).mean() < 4


def test_the_file_is_what_players_expect(tmp_path):
    write(tmp_path / "v.mp4", moving(50))
    with av.open(str(tmp_path / "v.mp4")) as video:
        (stream,) = video.streams
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        assert stream.frames == 50 and stream.start_time == 0 and stream.duration * stream.time_base == 50 / 16
        frames = list(video.decode(stream))
    assert [round(frame.time * 16, 6) for frame in frames] == list(range(50))
    keys = [number for number, frame in enumerate(frames) if frame.key_frame]
    assert keys[0] == 0 and max(np.diff([*keys, 50])) <= 16
    assert close_enough([frame.to_ndarray(format="rgb24") for frame in frames], moving(50))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (40, 180, 220)])
def test_colours_are_those_of_bt709(tmp_path, colour):
    write(tmp_path / "v.mp4", np.full((2, SIDE, SIDE, 3), colour, dtype=np.uint8))
    with av.open(str(tmp_path / "v.mp4")) as video:
        luma = next(video.decode(video=0)).to_ndarray()[SIDE // 2, SIDE // 2]
    assert abs(luma - (16 + 219 * np.dot(colour, (0.2126, 0.7152, 0.0722)) / 255)) <= 2
    assert np.abs(decoded(tmp_path / "v.mp4")[0].astype(int) - colour).max() <= 4


def test_equal_pictures_give_equal_bytes_on_any_cpu(tmp_path, monkeypatch):
    """asm=0 is x264 without vector code; pictures that change much are where the two tend to differ."""
    blocks = np.random.default_rng(3).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    pixels = blocks.repeat(SIDE // 16, axis=1).repeat(SIDE // 16, axis=2)
    for name, cpu in (("a", ""), ("b", ""), ("c", ":asm=0")):
        monkeypatch.setattr("flexkern.render.writer.SAME_EVERYWHERE", SAME_EVERYWHERE + cpu)
        write(tmp_path / f"{name}.mp4", pixels)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b == c


def test_a_closed_file_stays_as_it_is(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        writer.write(moving(5))
    writer.close()
    with pytest.raises(ValueError, match="v.mp4 is closed"):
        writer.write(moving(5))
    assert len(decoded(tmp_path / "v.mp4")) == 5


def test_crf_says_how_many_bytes(tmp_path):
    for crf in (18, 40):
        write(tmp_path / f"{crf}.mp4", moving(20), crf=crf)
    assert (tmp_path / "40.mp4").stat().st_size < (tmp_path / "18.mp4").stat().st_size


def test_pictures_reach_the_file_as_they_are_written(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        counts = []
        for start in range(0, 160, 40):
            writer.write(moving(160)[start : start + 40])
            counts.append(len(decoded(tmp_path / "v.unfinished.mp4")) if start else 0)
    assert all(40 * (k + 1) - LOST <= count for k, count in enumerate(counts)) and counts[-1] < 160
    assert len(decoded(tmp_path / "v.mp4")) == 160


def test_a_killed_process_leaves_what_was_finished(tmp_path):
    np.save(tmp_path / "pixels.npy", moving(120))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "v.mp4"), str(tmp_path / "pixels.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = decoded(tmp_path / "v.unfinished.mp4")
    assert 120 - LOST <= len(left) < 120 and close_enough(left, moving(120)[: len(left)])


def test_an_error_leaves_a_finished_file(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        writer.write(moving(7))
        raise RuntimeError("boom")
    assert len(decoded(tmp_path / "v.mp4")) == 7


def test_where_nothing_is_written_nothing_changes(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"older")
    for name in ("old.mp4", "new.mp4"):
        write(tmp_path / name, moving(0))
    assert (tmp_path / "old.mp4").read_bytes() == b"older" and not (tmp_path / "new.mp4").exists()
    write(tmp_path / "old.mp4", moving(3))
    assert len(decoded(tmp_path / "old.mp4")) == 3


def test_ctrl_c_waits_for_the_picture():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_can_write(tmp_path):
    thread = threading.Thread(target=write, args=(tmp_path / "v.mp4", moving(5)))
    thread.start()
    thread.join()
    assert len(decoded(tmp_path / "v.mp4")) == 5


@pytest.mark.parametrize(
    ("name", "sizes", "options", "error", "words"),
    [
        ("v.mp4", (63, 64), {}, ValueError, "even, .* got 63x64"),
        ("v.mp4", (64, 0), {}, ValueError, "got 64x0"),
        ("v.mp4", (64, 64), {"fps": 0}, ValueError, "fps must be at least 1, got 0"),
        ("v.mp4", (64, 64), {"crf": 52}, ValueError, "crf must be in 0..51, got 52"),
        ("v.avi", (64, 64), {}, ValueError, "named .mp4, got 'v.avi'"),
        ("folder.mp4", (64, 64), {}, ValueError, "is a folder"),
        ("none/v.mp4", (64, 64), {}, FileNotFoundError, "there is no folder .*none"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, sizes, options, error, words):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(error, match=words):
        VideoWriter(tmp_path / name, *sizes, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root is denied nothing
    with pytest.raises(PermissionError, match="no permission to write"):
        VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)


@pytest.mark.parametrize(
    "pixels", [moving(2)[..., :2], moving(2)[:, 1:], moving(2)[None], moving(2).astype(np.float32)]
)
def test_wrong_pixels_are_refused(tmp_path, pixels):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer, pytest.raises(ValueError, match="pixels must be uint8"):
        writer.write(pixels)


class FakeSession:
    """Chunks of three pictures; remembers what was asked of it, and how many chunks were alive at once."""

    def __init__(self, pictures=60, interrupt=None, spoilt=None):
        self.pixels, self.interrupt, self.spoilt = torch.from_numpy(moving(pictures)), interrupt, spoilt
        self.chunks, self.asked, self.most, self.prompt_seconds = 0, [], 0, 0.0
        self.alive = weakref.WeakSet()
        self.engine = SimpleNamespace(encode=lambda prompt: self.asked.append(prompt), backend_name="sdpa")
        self.preset = SimpleNamespace(position=SimpleNamespace(index="absolute"))

    def switch(self, prompt):
        self.asked.append((self.chunks, prompt))

    def validate_chunks(self):
        if self.chunks - 1 == self.spoilt:
            raise NotFiniteError("the latents of a chunk", torch.float16)

    def cut(self):
        self.asked.append((self.chunks, "cut"))

    def step(self):
        if self.chunks == self.interrupt:
            raise KeyboardInterrupt
        pixels = self.pixels[None, 3 * self.chunks :][:, :3].clone()
        self.alive.add(pixels)
        self.most = max(self.most, len(self.alive))
        self.chunks += 1
        frames = range(3 * self.chunks - 3, 3 * self.chunks)
        return SimpleNamespace(index=self.chunks - 1, frames=frames, pixels=pixels, spent=None)


def test_render_writes_exactly_what_was_asked_and_keeps_nothing(tmp_path, capsys):
    session = FakeSession()
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        assert render(session, writer, pictures=50)
    left = decoded(tmp_path / "v.mp4")
    assert len(left) == 50 and close_enough(left, moving(60)[:50])
    assert session.chunks == 17 and session.most <= 2
    assert "flexkern: chunk 17, 50 of 50 pictures (100 %), " in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_finished(tmp_path, capsys):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        assert not render(FakeSession(interrupt=4), writer, pictures=50, progress=False)
    assert len(decoded(tmp_path / "v.mp4")) == 12 and not capsys.readouterr().err


def test_a_chunk_that_is_not_finite_is_not_written(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
    with pytest.raises(NotFiniteError), writer:
        render(FakeSession(spoilt=4), writer, pictures=50, progress=False)
    assert len(decoded(tmp_path / "v.mp4")) == writer.pictures == 12


def test_switches_wait_for_the_next_chunk(tmp_path):
    """Chunks begin at pictures 0, 3, 6 ..., so at 16 pictures per second 0.375 s is the first picture of chunk 2."""
    times = {0.375: "on time", 0.4: "late", 1.0: "skipped", 1.01: "with a cut", 9.0: "never"}
    switches = [PromptSwitch(at=at, prompt=prompt, cut=prompt == "skipped") for at, prompt in times.items()]
    session = FakeSession()
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer:
        render(session, writer, pictures=30, script=switches, progress=False)
    assert session.asked == [(2, "on time"), (3, "late"), (6, "with a cut"), (6, "cut")]


def test_validate_switches_encodes_every_prompt_and_knows_what_can_cut():
    session, switches = FakeSession(), [PromptSwitch(at=1, prompt="a"), PromptSwitch(at=2.5, prompt="b", cut=True)]
    with pytest.raises(ValueError, match="the cut at 2.5 seconds needs position.index 'slot', the preset has 'absol"):
        validate_switches(session, switches)
    session.preset.position.index = "slot"
    validate_switches(session, switches)
    assert session.asked == ["a", "b"] * 2
