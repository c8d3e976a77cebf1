"""Renders that were stopped: what is left, what goes on, and what is refused with the reason."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_render import PICTURES, SCRIPT, small_engine, small_family, small_order

from flexkern.finite import NotFiniteError
from flexkern.render import find_stopped, prepare, render, resume
from flexkern.render.checkpoint import read_checkpoint, write_checkpoint
from flexkern.render.identity import differences, identity
from flexkern.render.parts import checkpoints
from flexkern.render.record import read_record
from flexkern.session import Session

FAMILY = small_family()


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def names(folder):
    """What is in a folder; videos without the sidecars that belong to them."""
    there = {path.name for path in folder.iterdir()}
    return sorted(name for name in there if name.removesuffix(".json") not in there - {name})


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    """The bytes of a render that was left alone."""
    path = tmp_path_factory.mktemp("whole") / "v.mp4"
    assert prepare(small_order(path), engine, FAMILY).run(progress=False)
    assert names(path.parent) == ["v.mp4"]
    return path.read_bytes()


def begin(target, engine, **options):
    return prepare(small_order(target, **options), engine, FAMILY, every=0, tell=pytest.fail)


@pytest.fixture
def stopped(engine, tmp_path, stop, monkeypatch):
    """The path of a render that was interrupted in chunk 20."""
    stop(20)
    job = begin(tmp_path / "v.mp4", engine)
    assert not job.run(progress=False) and job.can_resume and job.checkpoints.pictures == 60
    assert job.kept == f"{tmp_path / 'v.unfinished.mp4'} holds the first 60 of {PICTURES} pictures"
    monkeypatch.undo()
    return tmp_path / "v.mp4"


def go_on(target, engine, told=None, **options):
    return resume(target, engine, FAMILY, every=0, tell=pytest.fail if told is None else told.append, **options)


@pytest.mark.parametrize("chunk", [1, 7, 8, 14, 15, 33])
def test_it_goes_on_bit_for_bit(engine, tmp_path, stop, monkeypatch, whole, chunk):
    """Before, at and behind the change of prompt, which re-caches, and the cut."""
    stop(chunk)
    assert not begin(tmp_path / "v.mp4", engine).run(progress=False)
    assert names(tmp_path) == ["v.mp4.parts", "v.unfinished.mp4"]
    monkeypatch.undo()
    job = go_on(tmp_path / "v.mp4", engine)
    assert job.session.chunks == chunk and job.writer.pictures == 3 * chunk
    assert job.run(progress=False)
    assert names(tmp_path) == ["v.mp4"] and (tmp_path / "v.mp4").read_bytes() == whole
    assert job.record["history"] == [{"picture": 3 * chunk, "anyway": []}]


def test_latents_go_on_bit_for_bit(engine, tmp_path, stop, monkeypatch):
    for name, chunk in (("whole", None), ("l", 11)):
        if chunk:
            stop(chunk)
        job = begin(tmp_path / f"{name}.safetensors", engine, writes="latents")
        assert job.run(progress=False) == (chunk is None)
    monkeypatch.undo()
    left = load_file(tmp_path / "l.unfinished.safetensors")["latents"]
    assert left.shape[1] == 33
    unfinished = tmp_path / "l.unfinished.safetensors"
    unfinished.write_bytes(unfinished.read_bytes() + b"of chunks that were being written" * 1000)
    assert go_on(tmp_path / "l.safetensors", engine).run(progress=False)
    assert (tmp_path / "l.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert names(tmp_path) == ["l.safetensors", "whole.safetensors"]


def test_a_moved_folder_goes_on(engine, stopped, whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "v.mp4.parts", tmp_path / "elsewhere" / "w.mp4.parts")
    assert go_on(tmp_path / "elsewhere" / "w.mp4", engine).run(progress=False)
    assert (tmp_path / "elsewhere" / "w.mp4").read_bytes() == whole


def test_without_a_checkpoint_it_begins_again(engine, tmp_path, stop, monkeypatch, whole):
    stop(5)
    job = prepare(small_order(tmp_path / "v.mp4"), engine, FAMILY)  # half a minute until the first
    assert not job.run(progress=False) and job.can_resume and job.checkpoints.pictures == 0
    monkeypatch.undo()
    told = []
    assert go_on(tmp_path / "v.mp4", engine, told).run(progress=False)
    assert (tmp_path / "v.mp4").read_bytes() == whole
    assert told == [
        f"{tmp_path / 'v.mp4'}: there is no checkpoint to go on from: it begins again with the first picture"
    ]


def flip(path, spot=-40):
    content = bytearray(path.read_bytes())
    content[spot] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(engine, stopped, whole, tmp_path):
    newest, before = checkpoints(tmp_path / "v.mp4.parts")
    flip(newest)
    told = []
    job = go_on(stopped, engine, told)
    assert job.writer.pictures == 57 and job.checkpoints.pictures == 57
    assert told == [
        f"{stopped}: {newest.name} is damaged: its checksum is not that of its bytes: it goes on from the checkpoint "
        "before, at picture 57"
    ]
    assert job.run(progress=False) and stopped.read_bytes() == whole
    assert job.record["history"] == [{"picture": 57, "anyway": []}]


def test_damage_to_all_is_refused_and_begins_again_anyway(engine, stopped, whole, tmp_path):
    newest, before = checkpoints(tmp_path / "v.mp4.parts")
    flip(newest)
    flip(before, 3)
    words = (
        f"v.mp4: {newest.name} is damaged.*; {before.name} is damaged.*; --resume-anyway begins again with the first"
    )
    with pytest.raises(ValueError, match=words):
        go_on(stopped, engine)
    assert len(checkpoints(tmp_path / "v.mp4.parts")) == 2  # somebody may have a copy
    job = go_on(stopped, engine, [], anyway=True)
    assert len(job.record["history"][0]["anyway"]) == 2
    assert job.run(progress=False) and stopped.read_bytes() == whole


def test_a_foreign_checkpoint_is_not_taken(engine, stopped, whole, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(tmp_path / "v.mp4.parts", other / "v.mp4.parts")
    newest, _ = checkpoints(other / "v.mp4.parts")
    state = read_checkpoint(newest)
    state["record"]["id"] = "of another"
    write_checkpoint(tmp_path / "v.mp4.parts" / newest.name, state)
    told = []
    job = go_on(stopped, engine, told)
    assert job.writer.pictures == 57 and f"{newest.name} is of another render" in told[0]
    assert job.run(progress=False) and stopped.read_bytes() == whole


def test_damaged_segments_give_way_to_a_checkpoint_before_them(engine, stopped, whole, tmp_path):
    """The first of them is in every checkpoint: then there is nothing to go on with."""
    flip(tmp_path / "v.mp4.parts" / "000000.mp4")
    with pytest.raises(
        ValueError, match="the first 1 segments in .*v.mp4.parts are not those that were written.*anyway"
    ):
        go_on(stopped, engine)
    job = go_on(stopped, engine, [], anyway=True)
    assert job.run(progress=False) and stopped.read_bytes() == whole


CHANGED = {  # what is not as it was: the engine's options, the order's, what the message says
    "weights": ({"seed": 1}, {}, "weights was '[0-9a-f]{16}', is '[0-9a-f]{16}'"),
    "seed": ({}, {"seed": 4}, "order.seed was 3, is 4"),
    "script": ({}, {"script": SCRIPT[:3]}, r"order.script was \[.*, is \["),
    "backend": ({"backend": "reference"}, {}, "backend was 'sdpa', is 'reference'"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_not_as_it_was_is_refused_with_the_reason(engine, stopped, case):
    made_of, ordered, words = CHANGED[case]
    other, order = small_engine(**made_of) if made_of else engine, small_order(stopped, **ordered)
    with pytest.raises(ValueError, match=rf"v.mp4: {words}.*; --resume-anyway goes on from picture 60$"):
        go_on(stopped, other, order=order)
    if case == "seed":  # noise of another seed has no such state
        with pytest.raises(ValueError, match="v.mp4 cannot go on: .*state must be of seed 4, got 3"):
            go_on(stopped, other, order=order, anyway=True)
        return
    job = go_on(stopped, other, order=order, anyway=True)
    (entry,) = job.record["history"]
    assert entry["picture"] == 60 and len(entry["anyway"]) == 1
    assert job.run(progress=False)


def test_versions_count_from_when_it_last_went_on(engine, stopped, monkeypatch, stop, whole):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(
        ValueError, match=r"v.mp4: torch was '.*', is '2.99.0'; --resume-anyway goes on from picture 60"
    ):
        go_on(stopped, engine)
    stop(25)
    assert not go_on(stopped, engine, anyway=True).run(progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="v.mp4: torch was '2.99.0', is "):
        go_on(stopped, engine)
    job = go_on(stopped, engine, anyway=True)
    assert [entry["picture"] for entry in job.record["history"]] == [60, 75]
    assert job.run(progress=False) and stopped.read_bytes() == whole  # the version was not really another


@pytest.mark.triton(3, 4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CPU on which triton can be chosen, by its interpreter")
def test_the_attention_kernel_and_its_tile_count(monkeypatch):
    from flexkern.kernels.attention import select
    from flexkern.kernels.attention.tiles import frame_attention_config

    engine = small_engine(backend="triton")
    told = []
    for arch, kept in ((80, None), (80, frame_attention_config(120, 64, torch.bfloat16)), (90, None)):
        monkeypatch.setattr(select, "_ask", lambda *_, arch=arch, kept=kept: (arch, kept))
        select.forget()
        told.append(identity(engine, [], writes="latents"))
    select.forget()
    assert len({one["attention kernel"] for one in told}) >= 2 and "portable" in told[0]["attention kernel"]
    (difference,) = differences(told[0], told[1])
    assert difference.startswith("attention kernel was 'portable, ")


def test_another_model_cannot_go_on(engine, stopped):
    other = replace(FAMILY, size=(4, 8))
    wide = small_engine()
    wide.size = (4, 8)
    with pytest.raises(ValueError, match=r"v.mp4 cannot go on: .*size must be \[4, 8\], got \[4, 4\]"):
        resume(stopped, wide, other, anyway=True, tell=pytest.fail)
    assert go_on(stopped, engine).run(progress=False)  # it is still there, and free


@pytest.mark.parametrize("how", ["edited", "no JSON", "absent"])
def test_a_record_that_was_changed_is_refused_and_a_checkpoints_taken_anyway(engine, stopped, whole, how):
    path = stopped.with_name("v.mp4.parts") / "job.json"
    content = json.loads(path.read_bytes())
    content["record"]["order"]["seed"] = 9
    path.unlink() if how == "absent" else path.write_text("{" if how == "no JSON" else json.dumps(content))
    words = "is not there" if how == "absent" else "is damaged, or was changed"
    with pytest.raises(ValueError, match=f"job.json {words}.*; --resume-anyway goes on from picture 60"):
        go_on(stopped, engine)
    assert find_stopped(stopped).order.seed == 3
    assert go_on(stopped, engine, anyway=True).run(progress=False) and stopped.read_bytes() == whole


def test_a_record_that_is_all_there_is_must_be_whole(engine, stopped):
    folder = stopped.with_name("v.mp4.parts")
    for path in checkpoints(folder):
        path.unlink()
    (folder / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="there is no checkpoint that says what it held. --overwrite begins anew"):
        go_on(stopped, engine)


def test_there_must_be_something_to_go_on_with(engine, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing to go on with: no render to .*v.mp4 was stopped"):
        go_on(tmp_path / "v.mp4", engine)
    assert not list(tmp_path.iterdir())


def test_what_exists_or_was_begun_is_replaced_only_if_asked(engine, stopped, whole):
    with pytest.raises(FileExistsError, match="v.mp4 was begun already.*--resume .*v.mp4 goes on with it, --overwrite"):
        begin(stopped, engine)
    assert prepare(small_order(stopped), engine, FAMILY, overwrite=True).run(progress=False)
    with pytest.raises(FileExistsError, match="v.mp4 exists already: --overwrite replaces it"):
        begin(stopped, engine)
    assert names(stopped.parent) == ["v.mp4"] and stopped.read_bytes() == whole


def test_checkpoints_without_their_record_are_not_dropped(engine, stopped):
    (stopped.with_name("v.mp4.parts") / "job.json").unlink()
    with pytest.raises(FileExistsError, match="v.mp4 was begun already"):
        begin(stopped, engine)


def test_a_job_that_is_not_run_loses_nothing(engine, stopped, whole):
    prepare(small_order(stopped), engine, FAMILY, overwrite=True).close()
    go_on(stopped, engine).close()
    assert go_on(stopped, engine).run(progress=False) and stopped.read_bytes() == whole


def test_a_second_render_to_the_same_file_is_refused(engine, stopped):
    job = go_on(stopped, engine)
    for attempt in (lambda: go_on(stopped, engine), lambda: prepare(job.order, engine, FAMILY, overwrite=True)):
        with pytest.raises(BlockingIOError, match="another render is writing .*v.mp4"):
            attempt()
    assert job.run(progress=False)


@pytest.mark.parametrize(
    "error", [NotFiniteError("x", torch.float32), MemoryError(), OSError(28, "full"), ValueError("?")]
)
def test_whatever_stops_it_keeps_what_was_made(engine, tmp_path, stop, monkeypatch, whole, error):
    stop(14, error)
    job = begin(tmp_path / "v.mp4", engine)
    with pytest.raises(type(error)):
        job.run(progress=False)
    assert job.kept.endswith("v.unfinished.mp4 holds the first 42 of 100 pictures") and job.can_resume
    monkeypatch.undo()
    assert go_on(tmp_path / "v.mp4", engine).run(progress=False) and (tmp_path / "v.mp4").read_bytes() == whole


def test_what_stops_before_the_first_picture_leaves_nothing(engine, tmp_path, stop):
    stop(0)
    job = begin(tmp_path / "v.mp4", engine)
    assert not job.run(progress=False) and not job.can_resume
    assert job.kept == "nothing was written of 100 pictures" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("writes", ["video", "latents"])
def test_an_output_folder_that_vanishes_stops_it(engine, tmp_path, monkeypatch, writes):
    folder = tmp_path / "out"
    folder.mkdir()
    step = Session.step

    def stepped(session):
        if session.chunks == 5:
            folder.rename(tmp_path / "gone")  # a disk that is unmounted
        assert session.chunks < 20, "nobody noticed"
        return step(session)

    monkeypatch.setattr(Session, "step", stepped)
    target = folder / ("v.mp4" if writes == "video" else "l.safetensors")
    job = prepare(small_order(target, writes=writes), engine, FAMILY, every=0, tell=lambda _: None)
    with pytest.raises(OSError, match="there is no folder|No such file or directory"):
        job.run(progress=False)
    assert not job.can_resume and job.kept.startswith("nothing was written")
    assert names(tmp_path) == ["gone"]


def test_a_whole_file_whose_parts_are_left_is_whole(engine, stopped, monkeypatch, whole):
    job = go_on(stopped, engine)
    monkeypatch.setattr("flexkern.render.parts.Parts.clear", lambda parts: None)  # killed before
    assert job.run(progress=False) and stopped.read_bytes() == whole
    monkeypatch.undo()
    assert find_stopped(stopped).done and read_record(stopped)["done"]
    with pytest.raises(FileExistsError, match="v.mp4 is whole: there is nothing to go on with"):
        go_on(stopped, engine)


def test_the_loop_is_where_it_was(engine, stopped):
    """Prompts that the session has come to are not come to again."""
    asked = []
    job = go_on(stopped, engine)
    job.session.switch = lambda prompt: asked.append((job.session.chunks, prompt))
    assert job.followed == 2
    render(job.session, job.writer, pictures=PICTURES, script=SCRIPT[1:], progress=False, followed=job.followed)
    assert asked == [(22, "a cat")]
    job.close()


def test_checkpoints_of_every_chunk_cost_what_they_tell(engine, tmp_path):
    job = begin(tmp_path / "v.mp4", engine)
    began = time.monotonic()
    assert job.run(progress=False)
    assert 0 < job.checkpoints.copying < time.monotonic() - began
