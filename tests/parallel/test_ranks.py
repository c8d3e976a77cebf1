"""A video that ranks compute together is that of one rank, bit for bit, whatever happens to it."""

import gc
from dataclasses import replace

import pytest
import torch
from small_ranks import CONFIG, SIZE, USUAL, given, make_model, prompt_of, video

from flexkern.engine import Engine
from flexkern.finite import NotFiniteError
from flexkern.policies import PRESETS, get_preset


def life(session, other):
    """A video with all that may happen to one; ``other`` goes on from its state. Returns what both made, and that."""
    made = [video(session, 3)]
    session.switch(prompt_of(2))
    made.append(video(session, 2))
    session.switch(prompt_of(3, rows=5))
    if session.preset.position.index == "slot":
        session.cut()
    made.append(video(session, 2))
    if session.preset.noise.kind == "iid":  # antiphase noise has no gaps
        session.prefill(given(3))
    made.append(video(session, 1))
    state = session.state()
    other.restore(state)
    made.append(video(other, 2))
    return made, state


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_the_bits_of_one_rank(one, many, name):
    """The state of one rank is that of several, and either goes on from the other's."""
    preset = get_preset(name, {} if name == "infinity-rope" else {"retention.window": 6})
    begin = lambda engine: engine.session(prompt_of(1), preset=preset, frames=60, seed=3)
    expected, state = life(begin(one), begin(one))
    got, gathered = life(begin(many), begin(one))
    assert all(map(torch.equal, got, expected))
    assert_same(gathered, state)
    session = begin(many)
    session.restore(state)
    assert torch.equal(video(session, 2), expected[-1])


@pytest.mark.parametrize(
    ("options", "batch", "size"),
    [
        ({}, 2, SIZE),
        ({"first_chunk": 1}, 1, SIZE),
        ({}, 1, (4, 24)),  # rows that four ranks do not divide: rectangles two by two
        ({}, 1, (6, 8)),  # nor two ranks
        ({}, 1, (16, 2)),  # one column
    ],
)
def test_batches_and_sizes(one, many, options, batch, size):
    made = []
    for engine in (one, many):
        session = engine.session(prompt_of(1, batch), preset="lol", size=size, seed=1, **options)
        made.append(video(session, 3))
        session.prefill(given(3, batch, size))
        made.append(video(session, 2))
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])


def test_half_precision(ranks, model):
    half = make_model().to(torch.bfloat16)
    made = [
        video(Engine(half, ranks=among, **USUAL).session(prompt_of(1), preset="flex", frames=60), 3)
        for among in (None, ranks)
    ]
    assert torch.equal(*made) and made[0].isfinite().all()


def test_other_backends(ranks, model):
    """The oracle, and the kernels in Triton's interpreter."""
    for backend in ("reference", "triton"):
        made = [
            video(Engine(model, ranks=among, backend=backend, **USUAL).session(prompt_of(1), preset="lol", seed=2), 2)
            for among in (None, ranks)
        ]
        assert torch.equal(*made), backend
