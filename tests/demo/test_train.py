"""Training sees what the loop will see, and learns."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open

from flexkern.backends import get_backend
from flexkern.cache import FrameCache
from flexkern.demo import load_engine, train, world
from flexkern.memory import PagedMemory
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.plan import band_split, make_plan, place_turns
from flexkern.policies import PositionPolicy

SMALL = WanConfig(**{**train.CONFIG.to_dict(), "dim": 64, "num_heads": 1, "num_layers": 2, "ffn_dim": 64})
FRAMES = 9
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(train, "CONFIG", SMALL)
    return CausalWan(SMALL).eval()


@torch.no_grad()
def test_teacher_forcing_is_the_cached_loop(small):
    """Each noisy chunk, in one parallel pass, gets what it would get from a cache of the clean chunks before it."""
    clean, noisy = torch.randn(2, 1, FRAMES, 3, world.SIZE, world.SIZE)
    t = torch.tensor([900.0, 500.0, 100.0]).repeat_interleave(3)[None]
    grid, ops = small.grid(world.SIZE, world.SIZE), get_backend("sdpa")
    text = small.text_keys(torch.randn(1, world.TEXT_LEN, world.TEXT_DIM), ops)
    memory = train.TeacherForcing(FRAMES, *grid, SMALL.head_dim)
    both, times = torch.cat((clean[:, :-3], noisy), dim=1), torch.cat((torch.zeros(1, 6), t), dim=1)
    parallel = small(both, times, text, memory)[:, -FRAMES:]

    cache = FrameCache(layers=2, batch=1, pages=FRAMES, tokens=math.prod(grid), heads=1, head_dim=SMALL.head_dim)
    place = place_turns(*grid, SMALL.head_dim)
    for start in range(0, FRAMES, 3):
        frames = list(range(start, start + 3))
        slots = cache.allocate(frames)
        bands = band_split(SMALL.head_dim)[0]
        phases = PositionPolicy(mode="none").phases(query=frames, visible=cache.frames, bands=bands, heads=1)
        memory = PagedMemory(cache, make_plan(phases, write_slots=slots, read_slots=cache.slots, place_turn=place), ops)
        made = small(noisy[:, frames], t[:, frames], text, memory)
        torch.testing.assert_close(made, parallel[:, frames], atol=2e-5, rtol=2e-5)
        small(clean[:, frames], torch.zeros(1, 3), text, memory, keys_only=True)


@NEEDS_MUON
def test_training_lowers_the_loss_and_leaves_a_model_that_renders(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CLIPS", {3: 16})
    monkeypatch.setattr(train, "GROWTH", ((1.0, (1,)),))
    args = train.Args(
        steps=50, rate=5e-3, out=tmp_path / "w.safetensors", log=tmp_path / "log.csv", compile=False, device="cpu"
    )
    train.train(args)
    rows = list(csv.DictReader(args.log.open()))
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    with safe_open(args.out, "pt") as file:
        assert json.loads(file.metadata()["flexkern_config"])["prediction"] == "x0"
    train.train(
        dataclasses.replace(args, steps=25, start=args.out, out=tmp_path / "more.safetensors", log=tmp_path / "m.csv")
    )
    more = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert float(more[0]["loss"]) < 0.8 * float(rows[0]["loss"])  # it went on from where it was

    chunk = load_engine(args.out).session("a red disc and a cyan square on grey, slow").step()
    assert chunk.latents.isfinite().all()
    assert chunk.pixels.shape == (1, 3, 288, 288, 3)


@NEEDS_MUON
def test_training_never_draws_a_held_out_prompt(small, monkeypatch, tmp_path):
    seen = []
    draw = train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda scenes, *rest: seen.extend(scenes) or draw(scenes, *rest))
    monkeypatch.setattr(train, "CLIPS", {3: 2})
    monkeypatch.setattr(train, "GROWTH", ((1.0, (1,)),))
    train.train(
        train.Args(steps=2, out=tmp_path / "w.safetensors", log=tmp_path / "l.csv", compile=False, device="cpu")
    )
    assert seen
    assert not any(world.held_out(scene) for scene in seen)


def test_an_old_torch_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(NotImplementedError, match=r"training needs torch.optim.Muon, of torch 2.9; torch \d"):
        train.train(train.Args(steps=2, out=tmp_path / "w.safetensors", log=tmp_path / "l.csv", device="cpu"))
    assert not list(tmp_path.iterdir())
