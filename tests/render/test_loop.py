"""While a chunk is written the next is made, and the file, the log and the errors are those of one after the other."""

import json
import os
import signal
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from small_render import PICTURES, small_engine, small_family, small_order

from flexkern.finite import NotFiniteError
from flexkern.hostcopy import HostCopy
from flexkern.render import EventLog, LatentsFile, PromptSwitch, Watch, prepare, render, resume
from flexkern.render.backlog import THREAD
from flexkern.render.checkpoint import Checkpoints
from flexkern.render.segments import SegmentWriter
from flexkern.session import Session as RealSession

FULL = OSError(28, "No space left on device")


class Session:
    """Chunks of three pictures, each of the colour of its number; says when one is begun."""

    def __init__(self, on_step=lambda number: None, spoilt=None):
        self.chunks, self.prompt_seconds, self.spoilt, self._on_step = 0, 0.0, spoilt, on_step
        self.begun = [threading.Event() for _ in range(40)]
        self.engine = SimpleNamespace(backend_name="sdpa")

    def step(self):
        number = self.chunks
        self.begun[number].set()
        self._on_step(number)
        self.chunks += 1
        pixels = torch.full((1, 3, 2, 2, 3), number, dtype=torch.uint8)
        return SimpleNamespace(index=number, frames=range(3), pixels=pixels, latents=None, spent=None)

    def validate_chunks(self):
        if self.chunks - 1 == self.spoilt:
            raise NotFiniteError("the latents of a chunk", torch.float16)

    def switch(self, prompt):
        pass

    def cut(self):
        pass


class Writer:
    """Keeps the colours of pictures; does something before it does."""

    fps = 16

    def __init__(self, before=lambda number: None):
        self.colours, self._before, self.threads = [], before, set()

    @property
    def pictures(self):
        return len(self.colours)

    def write(self, pixels):
        number = int(pixels[0, 0, 0, 0])
        self._before(number)
        self.threads.add(threading.current_thread())
        self.colours += [int(picture[0, 0, 0]) for picture in pixels]


def colours(count):
    return [number // 3 for number in range(count)]


def test_the_next_chunk_is_begun_before_one_is_written():
    session = Session()
    writer = Writer(lambda number: number == 9 or session.begun[number + 1].wait(10) or pytest.fail("it waited"))
    assert render(session, writer, pictures=29, progress=False)
    assert writer.colours == colours(29) and session.chunks == 10
    (thread,) = writer.threads
    assert thread.name.startswith(THREAD) and not thread.is_alive()


def test_no_more_than_three_chunks_are_held():
    """One is written, one waits, one is made."""
    most, writer = [], Writer()
    session = Session(lambda number: most.append(number - writer.pictures // 3))
    writer._before = lambda number: session.begun[min(number + 2, 29)].wait(10)  # as late as it may be
    assert render(session, writer, pictures=90, progress=False)
    assert writer.colours == colours(90) and max(most) == 2


def test_an_error_of_the_writer_ends_the_render_at_the_next_chunk():
    failed = threading.Event()

    def full(number):
        if number == 4:
            failed.set()
            raise FULL

    session = Session(lambda number: number == 5 and failed.wait(10))
    writer = Writer(full)
    with pytest.raises(OSError) as told:
        render(session, writer, pictures=60, progress=False)
    assert told.value is FULL and writer.colours == colours(12) and session.chunks <= 7


def test_an_error_with_the_last_chunk_is_not_lost():
    def full(number):
        if number == 9:
            raise FULL

    writer = Writer(full)
    with pytest.raises(OSError, match="No space left"):
        render(Session(), writer, pictures=30, progress=False)
    assert writer.colours == colours(27)


def test_a_chunk_that_is_not_finite_is_not_written_and_those_before_it_are():
    session = Session(spoilt=4)
    writer = Writer(lambda number: number < 3 or session.begun[4].wait(10))
    with pytest.raises(NotFiniteError):
        render(session, writer, pictures=60, progress=False)
    assert writer.colours == colours(12)


def test_two_interrupts_lose_no_chunk_that_was_made():
    """The second comes while what was made before the first is still being written."""

    def stop(number):
        if number == 5:
            raise KeyboardInterrupt

    session, interrupted = Session(stop), []

    def again(number):
        if number == 4:
            session.begun[5].wait(10)
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.append(number)

    writer = Writer(again)
    assert not render(session, writer, pictures=60, progress=False)
    assert writer.colours == colours(15) and interrupted == [4]


def test_after_and_stop_can_wait_for_the_file():
    seen, session = [], Session()
    writer = Writer(lambda number: None)

    def after(followed, written):
        written()
        seen.append((session.chunks, writer.pictures))

    def stop(followed, written):
        if session.chunks == 5:
            written()
            assert writer.pictures == 15
        return session.chunks == 5

    assert not render(session, writer, pictures=60, progress=False, after=after, stop=stop)
    assert seen == [(made, 3 * made) for made in range(1, 6)] and writer.colours == colours(15)


def test_events_are_told_in_their_order_and_with_what_was_waited_for(tmp_path):
    log, session = EventLog(tmp_path / "l.jsonl"), Session()
    writer = Writer(lambda number: session.begun[min(number + 1, 9)].wait(10))
    watch = Watch(progress=False, log=log)
    script = [PromptSwitch(at=6 / 16, prompt="b"), PromptSwitch(at=18 / 16, prompt="c")]
    assert render(session, writer, pictures=30, script=script, watch=watch)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    told = [line.get("chunk", line["event"]) for line in lines]
    assert told == ["started", 1, 2, "switch", 3, 4, 5, 6, "switch", 7, 8, 9, 10]
    made = [line["made"] for line in lines if line["event"] == "chunk"]
    assert made == list(range(3, 33, 3)) and watch.made == 30
    waited = sum(line["waited_seconds"] for line in lines if line["event"] == "chunk")
    assert 0 <= waited <= watch.timings()["waited_seconds"] + 0.01 and watch.timings()["encode_seconds"] >= 0


def test_only_the_thread_that_writes_waits_for_a_copy(monkeypatch, tmp_path):
    waited, wait = set(), HostCopy.wait
    monkeypatch.setattr(HostCopy, "wait", lambda copy: waited.add(threading.current_thread().name) or wait(copy))
    watch = Watch(progress=False, preview=tmp_path / "now.png")
    assert render(Session(), Writer(), pictures=30, watch=watch)
    assert (tmp_path / "now.png").is_file()
    assert len(waited) == 1 and waited.pop().startswith(THREAD)


@pytest.mark.parametrize("per_frame", [1, 4])
@pytest.mark.parametrize("pictures", [1, 4, 5, 20, 45, 46])
def test_the_count_of_latents_is_known_before_they_are_written(tmp_path, per_frame, pictures):
    class Latents(Session):
        def step(self):
            made = super().step()
            made.latents = torch.full((1, 3, 2, 2, 2), float(made.index))
            return made

    session = Latents()
    with LatentsFile(tmp_path / "l.safetensors", fps=16, per_frame=per_frame, about={}) as file:
        watch = Watch(progress=False)
        assert render(session, file, pictures=pictures, watch=watch)
        assert watch.made == pictures <= file.pictures < pictures + per_frame
    frames = 1 + -(-(pictures - 1) // per_frame)
    assert file.frames == frames and session.chunks == -(-frames // 3)


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.mark.parametrize("when", [11, 20])
def test_a_checkpoint_is_of_what_is_written_though_writing_is_late(engine, tmp_path, monkeypatch, stop, when):
    """No chunk is written before the next is begun, or somebody waits; every fifth has a checkpoint."""
    assert prepare(small_order(tmp_path / "whole.mp4"), engine, small_family()).run(progress=False)
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    session, begun, written = job.session, [threading.Event() for _ in range(40)], []
    step, result, write = RealSession.step, Future.result, SegmentWriter.write

    def late(writer, pixels):
        begun[len(written) + 1].wait(10)
        write(writer, pixels)
        written.append(writer.pictures)

    monkeypatch.setattr(RealSession, "step", lambda own: begun[own.chunks].set() or step(own))
    monkeypatch.setattr(Future, "result", lambda own: begun[session.chunks].set() or result(own))
    monkeypatch.setattr(SegmentWriter, "write", late)
    monkeypatch.setattr(Checkpoints, "is_due", lambda own, now=False: session.chunks % 5 == 0)
    stop(when)
    assert not job.run(progress=False)
    kept = 15 * (when // 5)
    assert job.checkpoints.pictures == kept and written == list(range(3, 3 * when + 3, 3))
    monkeypatch.undo()
    again = resume(tmp_path / "v.mp4", engine, small_family(), tell=pytest.fail)
    assert again.writer.pictures == kept and again.run(progress=False)
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_pictures_are_those_of_one_chunk_after_the_other(engine, tmp_path):
    """Of a sequence, byte for byte, where every chunk is waited for and where none is."""
    for name, every in (("waits", 0.0), ("never", 1e9)):
        (tmp_path / name).mkdir()
        order = small_order(tmp_path / name / "%03d.png")
        assert prepare(order, engine, small_family(), every=every).run(progress=False)
    files = sorted(path.name for path in (tmp_path / "waits").iterdir() if path.suffix == ".png")
    assert len(files) == PICTURES
    for name in files:
        assert (tmp_path / "waits" / name).read_bytes() == (tmp_path / "never" / name).read_bytes()
