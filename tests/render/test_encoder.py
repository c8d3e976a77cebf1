"""The encoder is tried before it is needed, takes what people have, and a full disk is an error, never a crash."""

import io
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from flexkern.render import VideoWriter, validate_encoder
from flexkern.render.encoding import exact_rate
from flexkern.render.writer import MOVFLAGS, SAME_EVERYWHERE, Sink

SIDE = 64
NTSC = Fraction(24000, 1001)


def noise(pictures, seed=0):
    """Coarse noise, of which no picture compresses to little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (pictures, SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def decoded(path):
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


@pytest.fixture
def fresh():
    validate_encoder.cache_clear()
    yield
    validate_encoder.cache_clear()


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (16, 16), (16.0, 16), (np.float32(16), 16), (np.int64(24), 24), (23.976, NTSC), (23.976023976, NTSC),
        (29.97, Fraction(30000, 1001)), (np.float64(59.94), Fraction(60000, 1001)), (NTSC, NTSC),
        (Fraction(48, 2), 24), (12.5, Fraction(25, 2)), (1, 1), (7.25, Fraction(29, 4)), (1000, 1000),
    ],
)  # fmt: skip
def test_rates_are_what_players_are_told(tmp_path, fps, rate):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE, fps=fps) as writer:
        writer.write(noise(5))
    assert writer.fps == rate == exact_rate(fps) and isinstance(writer.fps, int | Fraction)
    with av.open(str(tmp_path / "v.mp4")) as video:
        (stream,) = video.streams
        assert stream.average_rate == rate and stream.frames == 5
        times = [Fraction(frame.pts) * frame.time_base for frame in video.decode(stream)]
    assert times == [number / Fraction(rate) for number in range(5)]


@pytest.mark.parametrize(
    ("fps", "words"),
    [
        ("16", "fps must be a number of pictures per second, .* got '16'"), (None, "must be a number"),
        (True, "must be a number"), (float("nan"), "must be a number"), (float("inf"), "at most 1000, got inf"),
        (0, "at least 1, got 0"), (0.5, "at least 1"), (-16.0, "at least 1"), (1001, "at most 1000, got 1001"),
        (Fraction(10**9 + 7, 10**8), "denominator of at most 100000"), (16j, "must be a number"),
    ],
)  # fmt: skip
def test_rates_that_are_none_are_refused(tmp_path, fps, words):
    with pytest.raises(ValueError, match=words):
        VideoWriter(tmp_path / "v.mp4", SIDE, SIDE, fps=fps)
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_those_that_ffmpeg_writes_by_itself(tmp_path):
    options = {"movflags": MOVFLAGS, "flush_packets": "1"}
    with av.open(str(tmp_path / "theirs.mp4"), "w", format="mp4", options=options) as container:
        x264 = {"crf": "18", "g": "16", "threads": "1", "x264-params": SAME_EVERYWHERE}
        stream = container.add_stream("libx264", rate=16, options=x264)
        stream.width = stream.height = SIDE
        stream.pix_fmt, tags = "yuv420p", stream.codec_context
        tags.color_primaries = tags.color_trc = tags.colorspace = 1
        tags.color_range = ColorRange.MPEG
        for number, picture in enumerate(noise(50)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            colours = dict(dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame = frame.reformat(format="yuv420p", **colours)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with VideoWriter(tmp_path / "ours.mp4", SIDE, SIDE) as writer:
        writer.write(noise(50))
    assert (tmp_path / "ours.mp4").read_bytes() == (tmp_path / "theirs.mp4").read_bytes()


def test_arrays_tensors_and_single_pictures_are_the_same_video(tmp_path, device):
    pictures = noise(6)
    tensor = torch.from_numpy(pictures).to(device)
    with torch.inference_mode():
        inference = tensor.clone()
    ways = {
        "array": [pictures], "single": list(pictures), "tensor": [tensor], "inference": [inference],
        "single tensors": list(tensor), "strided": [torch.stack((tensor, tensor), dim=-1)[..., 0]],
        "flipped": [pictures[:, :, ::-1][:, :, ::-1]], "mixed": [pictures[0], tensor[1:4], pictures[4:0], pictures[4:]],
    }  # fmt: skip
    made = {}
    for name, parts in ways.items():
        with VideoWriter(tmp_path / f"{name}.mp4", SIDE, SIDE) as writer:
            for part in parts:
                writer.write(part)
        assert writer.pictures == 6
        made[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert len(set(made.values())) == 1


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(2, SIDE, SIDE, 3), r"uint8 \[pictures, 64, 64, 3\], got torch.float32 \[2, 64, 64, 3\]"),
        (torch.zeros(2, SIDE, SIDE, 3, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 2, SIDE, SIDE, 3, dtype=torch.uint8), r"of a batch, .*pixels\[0\]"),
        (np.zeros((SIDE, 3), dtype=np.uint8), r"got uint8 \[64, 3\]"),
        ([[0]], "got list"), (None, "got NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(tmp_path, pixels, words):
    with VideoWriter(tmp_path / "v.mp4", SIDE, SIDE) as writer, pytest.raises(ValueError, match=words):
        writer.write(pixels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(2, 2), (34, 18), (1280, 2)])
def test_even_sizes_do(tmp_path, size):
    with VideoWriter(tmp_path / "v.mp4", *size) as writer:
        writer.write(np.zeros((2, size[1], size[0], 3), dtype=np.uint8))
    assert decoded(tmp_path / "v.mp4")[1].shape == (size[1], size[0], 3)


def test_what_x264_refuses_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="x264 does not encode pictures of 20000x2 at 16 per second"):
        VideoWriter(tmp_path / "v.mp4", 20_000, 2)
    assert not list(tmp_path.iterdir())


def test_an_av_that_will_not_do_is_told_before_any_work(tmp_path, monkeypatch, fresh):
    monkeypatch.setattr(av, "__version__", "13.1.0")
    with pytest.raises(ImportError, match="writing video needs av 17.1 or newer, got 13.1.0: pip install") as raised:
        VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
    assert raised.value.name is None  # so that the command line shows the sentence
    monkeypatch.setattr(av, "__version__", "18.0rc1")
    validate_encoder(SIDE, SIDE)
    monkeypatch.undo()

    class Container(SimpleNamespace):
        def add_stream(self, name, **options):
            raise av.codec.codec.UnknownCodecError(name)

    validate_encoder.cache_clear()
    monkeypatch.setattr(av, "open", lambda *args, **options: Container())
    with pytest.raises(ImportError, match="was built without libx264: pip install"):
        VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys, numpy as np
sys.dont_write_bytecode = True
from flexkern.render import VideoWriter
sys.path.insert(0, sys.argv[3])
from test_encoder import noise
writer = VideoWriter(sys.argv[1], 64, 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
told = "nothing"
try:
    with writer:
        writer.write(noise(40))
except OSError as error:
    told = f"{error} {writer.pictures}"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
print(told)
"""


@pytest.mark.parametrize("room", [0, 1, 40, 2_000, "half", "last"])
def test_a_full_disk_is_an_error_from_the_first_byte_to_the_last(tmp_path, room):
    """What remains has no picture that was cut short, and can be decoded to its end."""
    (tmp_path / "old.mp4").write_bytes(b"old")
    with VideoWriter(tmp_path / "whole.mp4", SIDE, SIDE) as writer:
        writer.write(noise(40))
    size = (tmp_path / "whole.mp4").stat().st_size
    room = {"half": size // 2, "last": size - 1}.get(room, room)
    command = [sys.executable, "-c", FULL, str(tmp_path / "old.mp4"), str(room), __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "File too large" in done.stdout and "old.mp4" in done.stdout, done.stderr
    kept = int(done.stdout.split()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.mp4", "whole.mp4"]
    if kept:
        assert len(decoded(tmp_path / "old.mp4")) == kept < 40 or room == size - 1
    else:
        assert (tmp_path / "old.mp4").read_bytes() == b"old"
    assert bool(kept) == (room > 2_000)


def test_closing_does_not_hide_the_first_error(tmp_path):
    full = OSError(28, "No space left on device")
    writer = VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
    with pytest.raises(RuntimeError, match="the first"), writer:
        writer.write(noise(1))
        writer._stream._sink.error = full
        raise RuntimeError("the first")
    assert not list(tmp_path.iterdir())
    writer = VideoWriter(tmp_path / "v.mp4", SIDE, SIDE)
    writer.write(noise(1))
    writer._stream._sink.error = full
    with pytest.raises(OSError, match=r"No space left on device: .*v.mp4"):  # where it is the first, it is told
        writer.close()
    writer.close()
    assert not list(tmp_path.iterdir()) and writer.pictures == 0


def test_a_disk_that_takes_a_part_gets_the_rest():
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    memory = Slow()
    assert Sink(memory).write(b"0123456789") == 10 and memory.getvalue() == b"0123456789"
