"""Training sees what a film's loop will see, learns, and goes on where it stopped."""

import csv
import math

import pytest
import torch

from flexkern.backends import get_backend
from flexkern.cache import FrameCache
from flexkern.demo import rooms, train_rooms
from flexkern.demo.film_rooms import Case, film, film_chunks, load_engine
from flexkern.demo.train import TeacherForcing
from flexkern.memory import PagedMemory
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.plan import band_split, make_plan, place_turns
from flexkern.policies import PositionPolicy

SMALL = WanConfig(**{**train_rooms.SIZES["demo"].to_dict(), "dim": 64, "num_heads": 1, "num_layers": 2, "ffn_dim": 64})
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(train_rooms.SIZES, "demo", SMALL)
    monkeypatch.setattr(train_rooms, "CLIPS", {9: 2})
    monkeypatch.setattr(train_rooms, "GROWTH", ((1.0, (1,)),))


@pytest.fixture
def weights(tmp_path, small):
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    trainer = train_rooms.Trainer.__new__(train_rooms.Trainer)  # its save alone: no optimizer, so no need of Muon
    trainer.model = CausalWan(SMALL)
    trainer.average = dict(trainer.model.named_parameters())
    trainer.save(path)
    return path


@torch.no_grad()
def test_teacher_forcing_with_a_prompt_a_chunk_is_the_loop_with_switches(small):
    """Each noisy chunk gets what it would get from a cache of clean chunks that were run with their own prompts."""
    model = train_rooms.ScriptedWan(SMALL).eval()
    plain = CausalWan(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    clean, noisy = torch.randn(2, 1, 9, 3, rooms.SIZE, rooms.SIZE)
    t = torch.tensor([900.0, 500.0, 100.0]).repeat_interleave(3)[None]
    grid, ops = model.grid(rooms.SIZE, rooms.SIZE), get_backend("sdpa")
    texts = model.text_keys(torch.randn(2, rooms.TEXT_LEN, rooms.TEXT_DIM), ops)  # off, on
    script = [1, 0, 1]
    scripted = [tuple(x[[*script[:-1], *script]] for x in pair) for pair in texts]
    both, times = torch.cat((clean[:, :-3], noisy), dim=1), torch.cat((torch.zeros(1, 6), t), dim=1)
    memory = TeacherForcing(9, *grid, SMALL.head_dim)
    parallel = model(both, times, scripted, memory)[:, -9:]

    cache = FrameCache(layers=2, batch=1, pages=9, tokens=math.prod(grid), heads=1, head_dim=SMALL.head_dim)
    place = place_turns(*grid, SMALL.head_dim)
    for start, on in zip(range(0, 9, 3), script, strict=True):
        text = [tuple(x[on : on + 1] for x in pair) for pair in texts]
        frames = list(range(start, start + 3))
        slots = cache.allocate(frames)
        phases = PositionPolicy(mode="none").phases(
            query=frames, visible=cache.frames, bands=band_split(SMALL.head_dim)[0], heads=1
        )
        plan = make_plan(phases, write_slots=slots, read_slots=cache.slots, place_turn=place)
        memory = PagedMemory(cache, plan, ops)
        made = plain(noisy[:, frames], t[:, frames], text, memory)
        torch.testing.assert_close(made, parallel[:, frames], atol=2e-5, rtol=2e-5)
        plain(clean[:, frames], torch.zeros(1, 3), text, memory, keys_only=True)


def test_batches_have_one_light_and_one_level_a_chunk(small):
    torch.manual_seed(0)
    batch = train_rooms.Batch.random(21, 6)
    assert batch.clip.shape == (6, 21, 3, 64, 64) and batch.lights.shape == (6, 7)
    assert 0 < batch.lights.float().mean() < 1
    levels = batch.level.unflatten(1, (7, 3))
    assert torch.equal(levels.amax(2), levels.amin(2)) and levels.flatten(1).std(1).min() > 0
    dark = batch.lights.repeat_interleave(3, dim=1) == 0
    assert batch.clip[dark].mean() < -0.8 < batch.clip[~dark].mean()


@NEEDS_MUON
def test_a_run_learns_and_goes_on_where_it_stopped(small, tmp_path):
    args = dict(out=tmp_path, rate=5e-3, compile=False, device="cpu", save_every=0)
    train_rooms.train(train_rooms.Args(steps=25, **args))
    first = train_rooms.Run(tmp_path, SMALL, "cpu")
    assert first.trainer.steps == 25 and first.clips == 50
    train_rooms.train(train_rooms.Args(steps=50, **args))
    rows = list(csv.DictReader((tmp_path / "training.csv").open()))
    assert [int(row["step"]) for row in rows] == [25, 50]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["seconds"]) > float(rows[0]["seconds"])
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 2
    case = Case.random(scenes=1, frames=6)
    assert film(load_engine(tmp_path / "rooms.safetensors"), case, "flex").isfinite().all()


@NEEDS_MUON
def test_a_checkpoint_brings_everything_back(small, tmp_path):
    train_rooms.train(train_rooms.Args(steps=3, out=tmp_path, compile=False, device="cpu"))
    one, other = train_rooms.Run(tmp_path, SMALL, "cpu"), train_rooms.Run(tmp_path / "fresh", SMALL, "cpu")
    assert any(not torch.equal(one.trainer.master[name], p) for name, p in other.trainer.master.items())
    again = train_rooms.Run(tmp_path, SMALL, "cpu")
    for kind in ("master", "average", "working"):
        for name, p in getattr(one.trainer, kind).items():
            assert torch.equal(p, getattr(again.trainer, kind)[name]), (kind, name)
    saved = torch.load(one.checkpoint, weights_only=True)["optimizers"]
    for optimizer, state in zip(again.trainer.optimizers, saved, strict=True):
        assert len(optimizer.state_dict()["state"]) == len(state["state"]) > 0


@NEEDS_MUON
def test_a_checkpoint_of_other_sizes_is_refused(small, tmp_path):
    train_rooms.train(train_rooms.Args(steps=1, out=tmp_path, compile=False, device="cpu"))
    other = WanConfig(**{**SMALL.to_dict(), "ffn_dim": 128})
    with pytest.raises(ValueError, match="of a model of other sizes"):
        train_rooms.Run(tmp_path, other, "cpu")


def test_a_film_is_given_its_first_chunk_and_then_the_script(weights, monkeypatch):
    engine = load_engine(weights)
    case = Case.random(scenes=2, frames=12, seed=1, lights=rooms.script(12, first=6, dark=3, lit=3))
    said = []
    encode = engine.text_encoder
    monkeypatch.setattr(engine, "text_encoder", lambda prompts: said.append(list(prompts)) or encode(prompts))
    chunks = list(film_chunks(engine, case, "flex"))
    assert [chunk.frames for chunk in chunks] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    torch.testing.assert_close(chunks[0].latents, case.truth(3))
    assert said == [[str(scene.lit(on)) for scene in case.scenes] for on in (True, False, True)]


def test_films_do_not_depend_on_how_they_are_batched(weights):
    engine, case = load_engine(weights), Case.random(scenes=3, frames=9, seed=2)
    together, alone = film(engine, case, "flex"), film(engine, case, "flex", batch=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
