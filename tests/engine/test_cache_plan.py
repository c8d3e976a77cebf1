"""Pages and slots, and one chunk's view of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexkern.backends import reference
from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.plan import band_split, make_plan, place_turns
from flexkern.policies import Blend, Phases, PositionPolicy

SIZES = dict(layers=2, batch=1, pages=6, tokens=6, heads=2, head_dim=64)


@pytest.fixture
def cache():
    return FrameCache(**SIZES)


def plan_of(write, read, head_dim=64, grid=(2, 3)):
    query = list(range(len(read) - len(write), len(read)))
    phases = PositionPolicy().phases(
        query=query, visible=list(range(len(read))), bands=band_split(head_dim)[0], heads=2
    )
    return make_plan(phases, write_slots=write, read_slots=read, place_turn=place_turns(*grid, head_dim))


def test_frames_get_slots_and_hand_them_back(cache):
    assert cache.allocate([0, 1, 2]) == [0, 1, 2]
    assert cache.allocate([3, 4, 5]) == [3, 4, 5]
    cache.keep([0, 4, 5])
    assert (cache.frames, cache.slots) == ([0, 4, 5], [0, 4, 5])
    assert cache.allocate([6, 7, 8]) == [1, 2, 3]
    assert (cache.frames, cache.slots) == ([0, 4, 5, 6, 7, 8], [0, 4, 5, 1, 2, 3])


def test_no_two_frames_ever_share_a_slot(cache):
    generator = np.random.default_rng(0)
    frame = 0
    for _ in range(200):
        count = len(cache.listed)
        cache.keep(sorted(generator.choice(count, min(count, int(generator.integers(0, 5))), replace=False)))
        new = list(range(frame, frame + min(int(generator.integers(1, 4)), 6 - len(cache.listed))))
        cache.allocate(new)
        frame += len(new)
        assert len(set(cache.slots)) == len(cache.slots)
        assert set(cache.slots) | set(cache._free) == set(range(6))
        assert cache.frames == sorted(cache.frames)


def test_a_full_cache_says_so(cache):
    cache.allocate([0, 1, 2, 3])
    with pytest.raises(ValueError, match="6 pages has 2 free, got 3 new frames"):
        cache.allocate([4, 5, 6])
    assert cache.frames == [0, 1, 2, 3]


def test_rename_keeps_slots(cache):
    cache.allocate([0, 1, 2])
    cache.keep([2, 1])
    cache.rename(1, [9])
    assert (cache.frames, cache.slots) == ([2, 9], [2, 1])


def filled(dtype=torch.float64, layers=2):
    """A cache of six frames of random keys and values, and the turns of its places."""
    cache = FrameCache(**SIZES | {"layers": layers}, dtype=dtype)
    for pages in (cache.keys, cache.values):
        pages.copy_(torch.randn(pages.shape, generator=torch.Generator().manual_seed(len(pages)), dtype=dtype))
    cache.allocate(range(6))
    return cache, place_turns(2, 3, SIZES["head_dim"])


@pytest.mark.parametrize("layers", [2, 11])  # more than are computed at once
def test_pages_are_blended_from_what_was_there_before(layers):
    """A page may lie where one of its own sources, or of another page, was."""
    cache, place_turn = filled(layers=layers)
    keys, values = cache.keys.clone(), cache.values.clone()
    swapped = Blend(frame=4, indices=(3, 4), weights=(0.25, 0.75)), Blend(frame=9, indices=(4, 3, 0), weights=(1, 2, 3))
    mixes, _ = cache.keep([0, *swapped, 5])
    cache.blend(mixes, place_turn)
    assert cache.frames == [0, 4, 9, 5] and len({*cache.slots}) == 4
    for pages, was in ((cache.keys, keys), (cache.values, values)):
        expected = 0.25 * was[:, :, 3] + 0.75 * was[:, :, 4], was[:, :, 4] + 2 * was[:, :, 3] + 3 * was[:, :, 0]
        for slot, page in zip(cache.slots[1:3], expected, strict=True):
            assert (pages[:, :, slot] - page).abs().max() < 1e-12
        assert torch.equal(pages[:, :, 0], was[:, :, 0]) and torch.equal(pages[:, :, 5], was[:, :, 5])


def test_a_mean_over_tokens_is_of_keys_before_they_are_turned():
    cache, place_turn = filled()
    was, values = cache.keys.clone(), cache.values.clone()
    blend = Blend(frame=2, indices=(0, 1, 2), weights=(0.5, 0.2, 0.3), averaged=(1, 2))
    cache.blend(cache.keep([blend, 3])[0], place_turn)
    slot = cache.slots[0]
    mean = (0.2 * values[:, :, 1] + 0.3 * values[:, :, 2]).mean(2, keepdim=True)
    assert (cache.values[:, :, slot] - 0.5 * values[:, :, 0] - mean).abs().max() < 1e-12

    time, half = band_split(64)[0], 32
    number = lambda pages: torch.complex(pages[..., :half], pages[..., half:])  # split layout
    turned = torch.view_as_complex(place_turn.double())[:, None]  # [S, 1, pairs of places]
    turned = torch.cat((torch.ones(6, 1, time, dtype=torch.complex128), turned), -1)
    plain = (number(0.2 * was[:, :, 1] + 0.3 * was[:, :, 2]) * turned.conj()).mean(2, keepdim=True)
    expected = number(0.5 * was[:, :, 0]) + plain * turned
    assert (number(cache.keys[:, :, slot]) - expected).abs().max() < 1e-6  # turns are float32


def test_blends_are_rounded_once():
    cache, place_turn = filled(torch.bfloat16)
    was = cache.values.clone()
    cache.blend(cache.keep([Blend(frame=0, indices=(0, 1, 2), weights=(0.999, 0.001, 0.1))])[0], place_turn)
    sums = 0.999 * was[:, :, 0].float() + 0.001 * was[:, :, 1].float() + 0.1 * was[:, :, 2].float()
    assert torch.equal(cache.values[:, :, cache.slots[0]], sums.bfloat16())


def test_attention_may_see_some_of_the_pages_and_one_of_them_twice():
    cache, _ = filled()
    cache.keep([0, 1, 2, 5], seen=[2, 1, 2])
    assert cache.allocate([6]) == [3]
    assert [page.frame for page in cache.attended] == [2, 1, 2, 6]
    assert cache.frames == [0, 1, 2, 5, 6]
    state = cache.state()
    other = FrameCache(**SIZES, dtype=torch.float64)
    other.restore(state)
    assert other.attended == cache.attended
    cache.keep([0])
    assert cache.seen is None and cache.attended == cache.listed


def test_bytes_are_those_of_wan(cache):
    """287.5 MB of keys and values for each cached frame of the 1.3B model in bfloat16, at 832x480."""
    sizes = dict(layers=30, batch=1, pages=1, tokens=1560, heads=12, head_dim=128)
    assert FrameCache(**sizes, dtype=torch.bfloat16, device="meta").bytes == 287_539_200
    with pytest.raises(ValueError, match="at least 1"):
        FrameCache(**{**SIZES, "pages": 0})


def test_band_split_is_that_of_wan():
    assert band_split(128) == (22, 21, 21)
    assert band_split(64) == (12, 10, 10)


def test_place_turns_are_by_row_then_column():
    turns = place_turns(30, 52, 128)
    assert turns.shape == (1560, 42, 2)
    place, pair = 7 * 52 + 11, 3
    angle = 10000.0 ** (-2 * pair / 42)
    assert turns[place, pair].tolist() == pytest.approx([np.cos(7 * angle), np.sin(7 * angle)], abs=1e-6)
    assert turns[place, 21 + pair].tolist() == pytest.approx([np.cos(11 * angle), np.sin(11 * angle)], abs=1e-6)


def test_relative_turns_are_the_difference_of_the_others():
    plan = plan_of([0, 1, 2], [3, 4, 0, 1, 2])
    as_complex = lambda turn: torch.view_as_complex(turn.contiguous())
    expected = as_complex(plan.query_turn)[:, None] * as_complex(plan.key_turn).conj()
    torch.testing.assert_close(as_complex(plan.turn), expected)


def test_a_plan_needs_as_many_slots_as_phases():
    phases = Phases(query=np.zeros((3, 1, 12)), key=np.zeros((1, 5, 1, 12)), logit_scale=np.ones(3))
    with pytest.raises(ValueError, match="3 computed and 5 read frames, got 3 and 4 slots"):
        make_plan(phases, write_slots=[0, 1, 2], read_slots=[0, 1, 2, 3], place_turn=place_turns(2, 3, 64))


def test_memory_refuses_a_plan_of_another_model(cache):
    plan = plan_of([0, 1, 2], [0, 1, 2])
    PagedMemory(cache, plan, reference)
    with pytest.raises(ValueError, match=r"plan.place_turn must be \[6, 20, 2\], got \[4, 20, 2\]"):
        PagedMemory(cache, plan_of([0, 1, 2], [0, 1, 2], grid=(2, 2)), reference)
    with pytest.raises(ValueError, match=r"plan.turn must be \[3, 3, 2, 12, 2\] or \[3, 3, 1, 12, 2\]"):
        PagedMemory(cache, plan_of([0, 1, 2], [0, 1, 2], head_dim=128), reference)
    with pytest.raises(ValueError, match="on one device"):
        PagedMemory(cache, replace(plan, read_slots=plan.read_slots.to("meta")), reference)
