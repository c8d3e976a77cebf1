"""A video in segments: each final and playable, joined without encoding, the same however often it was stopped."""

import signal
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from flexkern.render import validate_target
from flexkern.render.parts import Parts
from flexkern.render.segments import SegmentWriter
from flexkern.render.target import parts_name

SIDE = 32
LENGTH = 32  # pictures of a segment at 16 a second


def moving(pictures):
    """A bar that crosses coarse noise: every picture differs from its neighbours, and none is small."""
    coarse = np.random.default_rng(0).integers(0, 256, (pictures, 4, 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)
    for number in range(pictures):
        pixels[number, :, number % SIDE] = 255
    return pixels


def begin(path, **options):
    parts = Parts(path)
    return parts, SegmentWriter(parts, width=SIDE, height=SIDE, **options)


def write(path, pixels, **options):
    parts, writer = begin(path, **options)
    writer.write(pixels)
    writer.finish()
    parts.clear()
    parts.release()


def decoded(path):
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pictures", [1, 2, 31, 32, 33, 65, 97])
def test_segments_become_one_plain_video(tmp_path, pictures):
    write(tmp_path / "v.mp4", moving(pictures))
    assert names(tmp_path) == ["v.mp4"]
    with av.open(str(tmp_path / "v.mp4")) as video:
        (stream,) = video.streams
        assert stream.frames == pictures and stream.start_time == 0 and stream.average_rate == 16
        assert stream.duration * stream.time_base == Fraction(pictures, 16)
        packets = [packet for packet in video.demux(stream) if packet.size]
        assert all(a.dts < b.dts for a, b in zip(packets, packets[1:], strict=False))
        assert all(packet.dts <= packet.pts for packet in packets)
    with av.open(str(tmp_path / "v.mp4")) as video:
        frames = list(video.decode(video=0))
        video.seek(int(0.9 * pictures / 16 * 1e6))  # microseconds: an index that players can use
        assert next(video.decode(video=0)).time <= 0.9 * pictures / 16
    assert [frame.time * 16 for frame in frames] == list(range(pictures))
    assert {number for number in range(0, pictures, LENGTH)} <= {n for n, f in enumerate(frames) if f.key_frame}
    assert np.abs(np.stack([f.to_ndarray(format="rgb24") for f in frames]).astype(int) - moving(pictures)).mean() < 9


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 25, 1])
def test_rates_are_kept(tmp_path, fps):
    write(tmp_path / "v.mp4", moving(120), fps=fps)
    with av.open(str(tmp_path / "v.mp4")) as video:
        (stream,) = video.streams
        assert stream.average_rate == fps and stream.frames == 120
        assert [frame.pts * frame.time_base * fps for frame in video.decode(stream)] == list(range(120))


def test_metadata_are_told(tmp_path):
    write(tmp_path / "v.mp4", moving(3), about={"title": "a cat", "comment": "seed 3"})
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert (video.metadata["title"], video.metadata["comment"]) == ("a cat", "seed 3")


@pytest.mark.parametrize("stops", [[0], [5], [32], [40, 40], [7, 33, 64, 96]])
def test_the_bytes_are_the_same_however_often_it_was_stopped(tmp_path, stops):
    """Each time the writer goes on from a state of before the stop, so that some pictures are written twice."""
    pixels = moving(100)
    write(tmp_path / "whole.mp4", pixels)
    state = {"segments": 0, "digest": ""}
    for stop in stops:
        parts, writer = begin(tmp_path / "v.mp4")
        writer.restore(state)
        writer.write(pixels[writer.pictures : stop])
        state = writer.state()
        writer.write(pixels[stop : stop + 9])
        writer.stop()
        assert len(decoded(writer.kept)) == min(100, stop + 9) and writer.kept.name == "v.unfinished.mp4"
        parts.release()
    parts, writer = begin(tmp_path / "v.mp4")
    writer.restore(state)
    assert writer.pictures == stops[-1]
    writer.write(pixels[writer.pictures :])
    writer.finish()
    parts.clear()
    parts.release()
    assert names(tmp_path) == ["v.mp4", "whole.mp4"]
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_what_was_put_beside_the_parts_stays(tmp_path):
    parts, writer = begin(tmp_path / "v.mp4")
    (parts.folder / "notes.txt").write_text("of somebody else")
    writer.write(moving(3))
    writer.finish()
    parts.clear()
    parts.release()
    assert names(parts.folder) == ["lock", "notes.txt"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_segments import begin, moving
parts, writer = begin(sys.argv[1])
writer.write(moving(90))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_every_closed_segment(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "v.mp4"), __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "v.mp4.parts"
    assert names(folder) == ["000000.mp4", "000001.mp4", "000002.unfinished.mp4", "lock"]
    assert [len(decoded(folder / f"00000{number}.mp4")) for number in (0, 1)] == [LENGTH, LENGTH]


def test_other_segments_are_refused(tmp_path):
    parts, writer = begin(tmp_path / "v.mp4")
    writer.write(moving(70))
    state = writer.state()
    writer.stop()
    _, other = parts, SegmentWriter(parts, width=SIDE, height=SIDE)
    first = parts.folder / "000000.mp4"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(ValueError, match="the first 2 segments in .*v.mp4.parts are not those that were written"):
        other.restore(state)
    first.unlink()
    with pytest.raises(ValueError, match="000000.mp4 is not there, one of 2 segments"):
        other.restore(state)


def test_a_disk_that_is_full_keeps_what_fitted(tmp_path, monkeypatch):
    parts, writer = begin(tmp_path / "v.mp4")
    writer.write(moving(70))
    full = OSError(28, "No space left on device")
    writer._segment._stream._sink.error = full
    with pytest.raises(OSError, match=r"No space left on device: '.*/v.mp4'"):
        writer.write(moving(20))
    monkeypatch.setattr("flexkern.render.segments.join", lambda *_, **__: (_ for _ in ()).throw(full))
    writer.stop()
    assert writer.kept == parts.folder and writer.pictures == 2 * LENGTH
    assert names(parts.folder) == ["000000.mp4", "000001.mp4", "lock"] and names(tmp_path) == ["v.mp4.parts"]
    with pytest.raises(ValueError, match="v.mp4 is closed"):
        writer.write(moving(1))


def test_a_disk_that_is_full_while_joining_keeps_every_segment(tmp_path, monkeypatch):
    parts, writer = begin(tmp_path / "v.mp4")
    writer.write(moving(70))
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("flexkern.render.segments.join", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match=r"No space left on device: '.*/v.mp4'"):
            writer.finish()
        writer.stop()
    assert writer.kept == parts.folder and writer.pictures == 70 and names(tmp_path) == ["v.mp4.parts"]
    assert [len(decoded(parts.folder / f"00000{number}.mp4")) for number in range(3)] == [LENGTH, LENGTH, 6]


def test_one_render_a_file(tmp_path):
    parts, writer = begin(tmp_path / "v.mp4")
    for refused in (lambda: Parts(tmp_path / "v.mp4"), lambda: validate_target(tmp_path / "v.mp4")):
        with pytest.raises(BlockingIOError, match="another render is writing .*v.mp4"):
            refused()
    writer.stop()
    parts.release()
    assert not names(tmp_path)
    Parts(tmp_path / "v.mp4").release()
    assert not names(tmp_path)


def test_folders_of_parts_have_names_that_file_systems_take(tmp_path):
    assert parts_name(tmp_path / "v.mp4").name == "v.mp4.parts"
    long = [parts_name(tmp_path / f"{'x' * 250}{letter}.mp4").name for letter in "ab"]
    assert all(len(name) == 255 and name.endswith(".parts") for name in long) and long[0] != long[1]
