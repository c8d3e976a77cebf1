"""What is written besides an MP4: ProRes, a picture each, and streams; and which names and numbers will do."""

import hashlib
import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flexkern.render import Encoding, PipeWriter, SequenceWriter, VideoWriter, validate_output
from flexkern.render.encoding import STDOUT, numbered
from flexkern.render.outputs import validate_form
from flexkern.render.parts import Parts
from flexkern.render.segments import SegmentWriter

SIDE = 32


def moving(count):
    """Pictures of a bright bar that moves to the right."""
    pictures = np.full((count, SIDE, SIDE, 3), 40, dtype=np.uint8)
    for i in range(count):
        pictures[i, :, i % SIDE : i % SIDE + 6] = (220, 120, 30)
    return pictures


def decoded(source, **options):
    with av.open(source, **options) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def luma_is_right(path, pictures):
    """Whether the ten bits of luma are those of BT.709; swscale's way back to RGB of 8 bits cuts them off."""
    with av.open(str(path)) as video:
        frames = [np.frombuffer(frame.planes[0], np.uint16).reshape(SIDE, -1) for frame in video.decode(video=0)]
    expected = 64 + pictures @ np.array([0.2126, 0.7152, 0.0722]) * 876 / 255
    return np.abs(np.stack(frames)[:, :, :SIDE] - expected).mean() < 2


NAMES = {
    "a.mp4": "mp4", "a.MOV": "mov", "shots/%06d.png": "png", "s_%d.png": "png", "-": "mp4", "take-12:30.mp4": "mp4",
    "a%d.mp4": "mp4",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_form_is_as_the_output_is_named(name):
    assert Encoding().form(Path(name)) == Encoding(format=NAMES[name]).form(Path(name)) == NAMES[name]


WRONG = [
    ("a.gif", None, "must be named .mp4, .mov, or FOLDER/%06d.png"), ("a.mp4", "mov", "contradicts the name"),
    ("a.mp4", "y4m", "written to stdout alone"), ("-", "mov", "written to stdout: expected mp4 or y4m or rgb24"),
    ("-", "png", "cannot be written to stdout"), ("a.png", None, "must be named"), ("%d%d.png", None, "must be named"),
    ("%6d.png", None, "must be named"), ("%s.png", None, "must be named"), ("a", None, "must be named"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "words"), WRONG)
def test_another_name_is_refused(name, form, words):
    with pytest.raises(ValueError, match=words):
        Encoding(format=form).form(Path(name))


@pytest.mark.parametrize("bad", [{"crf": 52}, {"crf": -1}, {"fps": 0.5}, {"fps": 1001.0}, {"format": "gif"}])
def test_a_number_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=f"Encoding.{next(iter(bad))} must be"):
        Encoding(**bad)


def test_a_rate_and_how_much_faster_it_shows_the_video():
    assert Encoding().rate(16) == 16 and Encoding().speed(16) == 1
    assert Encoding(fps=23.976).rate(16) == Fraction(24000, 1001) and Encoding(fps=24.0).speed(16) == 1.5


def test_a_number_in_a_name():
    assert numbered("shot_%04d.png") == ("shot_", 4, ".png") and numbered("%d.png") == ("", 0, ".png")
    assert numbered("a.png") is numbered("%.png") is numbered("%04d%04d.png") is numbered("%099d.png") is None


def test_prores_keeps_ten_bits_and_every_picture(tmp_path):
    for name in ("a", "b"):
        with VideoWriter(tmp_path / f"{name}.mov", SIDE, SIDE, 24) as writer:
            writer.write(moving(30))
    assert (tmp_path / "a.mov").read_bytes() == (tmp_path / "b.mov").read_bytes()
    with av.open(str(tmp_path / "a.mov")) as video:
        stream = video.streams.video[0]
        about = stream.codec_context
        assert (about.name, about.pix_fmt, stream.average_rate) == ("prores", "yuv422p10le", 24)
        assert about.colorspace == 1 and "creation_time" not in video.metadata
        assert all(packet.is_keyframe for packet in video.demux(stream) if packet.size)
    assert luma_is_right(tmp_path / "a.mov", moving(30))


def test_prores_in_segments_is_one_film(tmp_path):
    parts = Parts(tmp_path / "a.mov")
    writer = SegmentWriter(parts, width=SIDE, height=SIDE, fps=16, about={"title": "bar"})
    for start in range(0, 75, 5):
        writer.write(moving(75)[start : start + 5])
    writer.finish()
    parts.clear()
    parts.release()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mov"]
    with av.open(str(tmp_path / "a.mov")) as video:
        assert video.metadata["title"] == "bar"
        times = [float(packet.pts * packet.time_base) for packet in video.demux(video=0) if packet.size]
    assert np.allclose(times, np.arange(75) / 16)
    assert luma_is_right(tmp_path / "a.mov", moving(75))


def test_a_picture_each_is_what_was_written(tmp_path):
    writer = SequenceWriter(tmp_path / "s_%03d.png", width=SIDE, height=SIDE)
    writer.write(moving(12)[:5])
    writer.write(moving(12)[5])
    writer.write(moving(12)[6:])
    writer.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"s_{number:03}.png" for number in range(12)] and writer.pictures == 12
    assert np.array_equal(np.stack([np.asarray(Image.open(tmp_path / name)) for name in names]), moving(12))


def test_pictures_of_a_longer_render_before_are_gone(tmp_path):
    for count in (9, 4):
        SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE).write(moving(count))
    (tmp_path / "note.png").write_bytes(b"")
    SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE).write(moving(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.png", "01.png", "note.png"]


def test_a_sequence_goes_on_from_its_state(tmp_path):
    first = SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE)
    first.write(moving(6))
    state = first.state()
    again = SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE)
    again.restore(state)
    again.write(moving(9)[6:])
    assert again.pictures == 9 and len(list(tmp_path.iterdir())) == 9
    (tmp_path / "03.png").unlink()
    with pytest.raises(ValueError, match="03.png is not there, one of 6 pictures"):
        SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE).restore(state)


def test_a_sequence_that_cannot_be_written_leaves_whole_pictures(tmp_path, monkeypatch):
    writer = SequenceWriter(tmp_path / "%02d.png", width=SIDE, height=SIDE)
    writer.write(moving(2))

    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*02.png'"):
        writer.write(moving(1))
    assert writer.pictures == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["00.png", "01.png"]


def piped(form, count=20, fps=16):
    stream = io.BytesIO()
    writer = PipeWriter(stream, width=SIDE, height=SIDE, fps=fps, encoding=Encoding(format=form, crf=10))
    for start in range(0, count, 3):
        writer.write(moving(count)[start : start + 3])
    writer.close()
    assert writer.pictures == count and not stream.closed
    return stream.getvalue()


def test_a_stream_of_rgb_is_its_bytes():
    assert piped("rgb24") == moving(20).tobytes()


def test_a_stream_of_y4m_says_what_it_is():
    data = piped("y4m", fps=23.976)
    head, _, _ = data.partition(b"\n")
    assert head == b"YUV4MPEG2 W32 H32 F24000:1001 Ip A1:1 C420mpeg2 XCOLORRANGE=LIMITED"
    size = SIDE * SIDE * 3 // 2
    assert len(data) == len(head) + 1 + 20 * (len(b"FRAME\n") + size)
    with av.open(io.BytesIO(data), format="yuv4mpegpipe") as video:
        assert sum(1 for _ in video.decode(video=0)) == 20
        assert video.streams.video[0].average_rate == Fraction(24000, 1001)


def test_a_stream_of_mp4_never_goes_back():
    class Pipe(io.RawIOBase):
        def __init__(self):
            super().__init__()
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    writer = PipeWriter(pipe, width=SIDE, height=SIDE, fps=16, encoding=Encoding(crf=10))
    writer.write(moving(40))
    assert pipe.data, "a second of pictures is not kept back"
    writer.close()
    left = decoded(io.BytesIO(pipe.data))
    assert len(left) == 40 and np.abs(left.astype(int) - moving(40)).mean() < 4
    assert hashlib.sha256(pipe.data).digest() == hashlib.sha256(piped("mp4", 40)).digest()


def test_a_reader_that_leaves_is_an_error():
    class Gone(io.RawIOBase):
        def writable(self):
            return True

        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    for form in ("rgb24", "mp4"):
        writer = PipeWriter(Gone(), width=SIDE, height=SIDE, fps=16, encoding=Encoding(format=form))
        with pytest.raises(BrokenPipeError):
            writer.write(moving(40))
            writer.close()


def test_targets_are_looked_at_before_any_work(tmp_path, monkeypatch):
    validate_output(tmp_path / "new" / "%d.png", Encoding())
    validate_output(tmp_path / "a.mov", Encoding())
    with pytest.raises(FileNotFoundError, match="there is no folder .*none to make new in"):
        validate_output(tmp_path / "none" / "new" / "%d.png", Encoding())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder"):
        validate_output(tmp_path / "file" / "%d.png", Encoding())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="not written to a terminal"):
        validate_output(STDOUT, Encoding())


def test_odd_sizes_are_refused_where_they_do_not_fit():
    for name, form in (("a.mp4", None), ("-", "y4m")):
        with pytest.raises(ValueError, match="width and height must be even"):
            validate_form(33, 32, 16, Encoding(format=form), Path(name))
    with pytest.raises(
        ValueError, match="a width that is a multiple of 32, and a height of 16, got pictures 144 wide and 64 high"
    ):
        validate_form(144, 64, 16, Encoding(), Path("a.mov"))
    validate_form(33, 31, 16, Encoding(format="rgb24"), STDOUT)
    validate_form(33, 31, 16, Encoding(), Path("%d.png"))


RENDER = "import sys; from flexkern.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("form", ["mp4", "rgb24"])
def test_the_command_writes_pictures_and_nothing_else_to_stdout(tmp_path, form):
    words = ["render", "--frames", "3", "--out", "-", "--format", form]
    done = subprocess.run([sys.executable, "-c", RENDER, *words], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"flexkern: -: demo, preset flex" in done.stderr and b"-: 3 pictures" in done.stderr
    assert not list(tmp_path.iterdir())
    count = len(done.stdout) / 288**2 / 3 if form == "rgb24" else len(decoded(io.BytesIO(done.stdout)))
    assert count == 3
