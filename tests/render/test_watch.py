"""What is seen of a render: lines where nothing can move, a bar on a terminal, previews now and then, a log."""

import errno
import io
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flexkern import demo
from flexkern.render import EventLog, PromptSwitch, Watch
from flexkern.render.watch import Listeners, Made, append_line, peak_bytes


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chunk(index):
    return Made(index=index, frames=3, pictures=3, denoise_seconds=2.0, decode_seconds=1.0, waited_seconds=0.25,
                peak_bytes=7)  # fmt: skip


def picture(colour):
    return np.full((4, 6, 3), colour, dtype=np.uint8)


@pytest.fixture
def clock():
    """A clock that stands until it is set."""
    told = lambda: told.now
    told.now = 100.0
    return told


def watched(clock, steps, pictures=120, made=0, **options):
    """What a render of chunks of 3 pictures shows, each of which takes 4 seconds."""
    stream = options.pop("stream", io.StringIO())
    watch = Watch(stream=stream, clock=clock, **options)
    watch.begin(pictures=pictures, made=made, waits_for="chunk 0")
    for index in range(steps):
        clock.now += 4
        watch.wrote(chunk(index), 0.5)
    watch.waited = 1.25
    return watch, stream


def test_a_file_gets_a_line_every_ten_seconds_and_the_time_left(clock):
    watch, stream = watched(clock, 40)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 14 and "\r" not in stream.getvalue()
    assert lines[0] == "flexkern: chunk 3, 9 of 120 pictures (8 %), 0.75 pictures/s, 2:28 left"
    assert lines[-1] == "flexkern: chunk 40, 120 of 120 pictures (100 %), 0.75 pictures/s, done"
    watch.finished(Path("a.mp4"))
    fast = "denoising 1.5 pictures/s, end to end 0.75 pictures/s; encoding 20 s, of which 1.25 s were waited for"
    assert stream.getvalue().splitlines()[-1] == f"flexkern: 120 pictures in 2:40: {fast}"


def test_a_render_that_goes_on_counts_its_own_pictures_alone(clock):
    watch, stream = watched(clock, 3, pictures=3609, made=3000)
    assert stream.getvalue() == "flexkern: chunk 3, 3009 of 3609 pictures (83 %), 0.75 pictures/s, 13:20 left\n"
    assert watch.timings() == {
        "seconds": 12.0, "denoise_seconds": 6.0, "decode_seconds": 3.0, "encode_seconds": 1.5, "waited_seconds": 1.25,
        "pictures_per_second": 0.75, "denoise_pictures_per_second": 1.5,
    }  # fmt: skip


def test_a_terminal_gets_a_bar(clock):
    watch, stream = watched(clock, 4, pictures=12, stream=Terminal())
    watch.end()
    assert "12/12 pictures" in stream.getvalue() and "flexkern:" not in stream.getvalue()


def test_nothing_is_shown_where_nothing_is_wanted(clock):
    watch, stream = watched(clock, 40, progress=False)
    watch.finished(Path("a.mp4"))
    assert stream.getvalue() == ""


def test_the_preview_is_the_newest_picture_once_a_second_at_most(clock, tmp_path, monkeypatch):
    saved, path = [], tmp_path / "now.png"
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, where: saved.append(Path(where).name) or save(self, where))
    watch = Watch(preview=path, clock=clock, progress=False)
    watch.begin(pictures=300, made=0, waits_for="chunk 0")
    for index in range(10):
        clock.now += 0.3
        watch.wrote(chunk(index), newest=picture(index))
    assert len(saved) == 3 and set(saved) == {"now.unfinished.png"} and list(tmp_path.iterdir()) == [path]
    assert np.array_equal(np.asarray(Image.open(path)), picture(8))


def test_a_preview_that_cannot_be_written_stops_nothing(clock, tmp_path):
    (tmp_path / "gone").mkdir()
    watch = Watch(preview=tmp_path / "gone" / "now.jpg", clock=clock, progress=False)
    (tmp_path / "gone").rmdir()
    watch.begin(pictures=3, made=0, waits_for="chunk 0")
    watch.wrote(chunk(0), newest=picture(0))


@pytest.mark.parametrize(("name", "error"), [("now.gif", ValueError), ("none/now.png", FileNotFoundError)])
def test_a_preview_is_refused_before_any_work(tmp_path, name, error):
    with pytest.raises(error):
        Watch(preview=tmp_path / name)


def test_the_log_has_a_line_for_each_event_with_its_fields(clock, tmp_path):
    log = EventLog(tmp_path / "l.jsonl")
    watch, _ = watched(clock, 1, pictures=6, log=log, about={"seed": 3})
    watch.switched(PromptSwitch(at=1.5, prompt="b", cut=True), 0.25)
    watch.kept(3, 0.5, 0.75)
    watch.warn("warm")
    watch.finished(Path("a.mp4"))
    watch.failed(Path("a.mp4"), "full")
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert all(line.pop("time").endswith("Z") for line in lines)
    assert lines[:5] == [
        {"event": "started", "pictures": 6, "made": 0, "prompt_seconds": 0.0, "seed": 3},
        {"event": "chunk", "chunk": 1, "made": 3, "pictures": 6, "frames": 3, "denoise_seconds": 2.0,
         "decode_seconds": 1.0, "encode_seconds": 0.5, "waited_seconds": 0.25, "peak_bytes": 7, "left_seconds": 4.0},
        {"event": "switch", "at": 1.5, "prompt": "b", "cut": True, "seconds": 0.25},
        {"event": "checkpoint", "pictures": 3, "copy_seconds": 0.5, "write_seconds": 0.75},
        {"event": "warning", "message": "warm"},
    ]  # fmt: skip
    assert lines[5].keys() == {
        "event", "target", "made", "seconds", "denoise_seconds", "encode_seconds", "waited_seconds",
        "pictures_per_second", "denoise_pictures_per_second",
    }  # fmt: skip
    assert lines[6] == {"event": "failed", "target": "a.mp4", "made": 3, "message": "full"}


class Full(io.StringIO):
    """A stream of a disk that is full, or of a terminal that is gone."""

    def write(self, _):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


class FullTerminal(Full):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Full(), FullTerminal()])
def test_a_stream_that_cannot_be_written_ends_no_render(clock, stream):
    watch, _ = watched(clock, 4, pictures=12, stream=stream)
    watch.finished(Path("a.mp4"))
    assert watch.made == 12


def test_a_reader_who_has_left_is_told_of(clock):
    class Left(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        watched(clock, 4, pictures=12, stream=Left())


def test_a_log_that_cannot_be_written_is_said_once_and_ends_no_render(clock, tmp_path):
    """What else listens hears all of it."""
    (tmp_path / "gone").mkdir()
    first, second = EventLog(tmp_path / "gone" / "l.jsonl"), EventLog(tmp_path / "l.jsonl")
    shutil.rmtree(tmp_path / "gone")
    watch, stream = watched(clock, 4, pictures=12, log=Listeners(first, second))
    watch.finished(Path("a.mp4"))
    assert stream.getvalue().count("flexkern: the log cannot be written: ") == 1
    assert len(second.path.read_text().splitlines()) == 6


def test_memory_is_that_of_the_gpu_which_took_most_or_of_the_process(monkeypatch):
    taken = {0: 0, 1: 7}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda number: taken[number])
    assert peak_bytes() == 7  # as of --device cuda:1
    taken[1] = 0  # a render on the CPU, in a process that has seen its GPUs
    assert peak_bytes() > 1 << 20
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert peak_bytes() > 1 << 20


def test_lines_of_several_writers_are_not_torn(tmp_path):
    path = tmp_path / "m.jsonl"
    write = lambda letter: [append_line(path, letter * 5000) for _ in range(20)]
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 80 and all(line == line[0] * 5000 for line in lines)


def test_a_chunk_tells_what_its_steps_took(monkeypatch):
    session = demo.load_engine().session("a red disc and a blue square on dark green, fast", frames=3)
    moments = iter([10.0, 17.0, 19.0])  # it begins, its latents are clean, its pictures are there
    monkeypatch.setattr("flexkern.stopwatch.time", SimpleNamespace(perf_counter=lambda: next(moments)))
    made = session.step()
    assert (made.spent.denoise, made.spent.decode) == (7.0, 2.0)
