"""A render that a signal stops, at every moment: what it keeps, and where it goes on."""

import io
import signal

import pytest
from small_render import PICTURES, small_engine, small_family, small_order

from flexkern.render import Watch, prepare, prepare_pipe, resume
from flexkern.render.encoding import STDOUT
from flexkern.render.ending import carry_out
from flexkern.session import Session

LAST = -(-PICTURES // 3) - 1  # its last chunk


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "v.mp4"
    assert prepare(small_order(target), engine, small_family()).run(progress=False)
    return target.read_bytes()


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request):
    """A signal, handled as Python does at its start: the suite may itself run under nohup."""
    usual = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(request.param, usual)
    yield request.param
    signal.signal(request.param, before)


@pytest.fixture
def comes(monkeypatch):
    """Lets a signal come, once or more often, in the middle of a chunk."""

    def at(chunk, number, times=1):
        step = Session.step

        def interrupted(session):
            if session.chunks == chunk:
                for _ in range(times):
                    signal.raise_signal(number)
            return step(session)

        monkeypatch.setattr(Session, "step", interrupted)

    yield at
    monkeypatch.undo()


def watched(**options):
    return Watch(progress=False, **options)


@pytest.mark.parametrize("chunk", [1, 7, LAST - 1])
def test_a_signal_waits_for_its_chunk_and_a_checkpoint(engine, whole, tmp_path, comes, number, chunk):
    """Long before it is time for the first one; the prompt changes with chunk 7."""
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    comes(chunk, number)
    ending, made = carry_out(job, watched()), 3 * (chunk + 1)
    assert (ending.status, ending.signal, job.session.chunks) == (128 + number, number, chunk + 1)
    kept = f"v.unfinished.mp4 holds the first {made} of {PICTURES} pictures"
    assert f"interrupted: {tmp_path}/{kept}; " in ending.message
    assert ending.message.endswith(f"v.mp4 goes on from picture {made}")
    comes(-1, number)
    again = resume(tmp_path / "v.mp4", engine, small_family(), tell=pytest.fail)
    assert again.writer.pictures == made and carry_out(again, watched()).status == 0
    assert (tmp_path / "v.mp4").read_bytes() == whole


def test_nothing_is_waited_for_before_the_first_chunk(engine, tmp_path, comes, number):
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    comes(0, number)
    ending = carry_out(job, watched())
    told = f"interrupted: nothing was written of {PICTURES} pictures"
    assert (ending.status, ending.signal, ending.message) == (128 + number, number, told)
    assert job.session.chunks == 0 and not list(tmp_path.iterdir())


def test_a_signal_in_the_last_chunk_comes_late(engine, whole, tmp_path, comes, number):
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    comes(LAST, number)
    ending = carry_out(job, watched())
    assert (ending.status, ending.signal) == (0, number) and (tmp_path / "v.mp4").read_bytes() == whole


@pytest.mark.parametrize(("one", "chunks"), [(60.0, 6), (0.0, 5)])
def test_a_second_signal_is_not_waited_for_but_where_both_are_one(
    engine, tmp_path, comes, number, monkeypatch, one, chunks
):
    monkeypatch.setattr("flexkern.render.signals.ONE", one)
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    comes(5, number, times=2)
    ending = carry_out(job, watched())
    assert (ending.status, job.session.chunks, job.writer.pictures) == (128 + number, chunks, 3 * chunks)
    assert job.checkpoints.pictures == (18 if chunks == 6 else 0)


def test_it_is_said_what_is_waited_for(engine, tmp_path, comes, number):
    stream = io.StringIO()
    job = prepare(small_order(tmp_path / "v.mp4"), engine, small_family(), tell=pytest.fail)
    comes(5, number)
    carry_out(job, Watch(stream=stream))
    (line,) = stream.getvalue().splitlines()
    assert line == "flexkern: stopping after this chunk, with a checkpoint; once more, and it is not waited for"


def test_a_stream_has_nothing_to_wait_for(engine, comes, number):
    order = small_order(STDOUT)
    job = prepare_pipe(order, engine, small_family(), io.BytesIO())
    comes(5, number)
    ending = carry_out(job, watched())
    assert (ending.status, ending.signal, job.session.chunks) == (128 + number, number, 5)
