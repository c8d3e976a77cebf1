"""Tokens chosen from frames that leave, against the sums written out."""

import numpy as np
import pytest
import torch

from flexkern.cache import FrameCache
from flexkern.plan import band_split
from flexkern.policies import ChosenTokens, PositionPolicy
from flexkern.tokens import TokenChooser

TOKENS, HEADS, DIM = 5, 2, 12
BANDS = band_split(DIM)[0]
THETA = PositionPolicy(mode="none").frequencies(BANDS)


@pytest.fixture
def cache():
    """Frames 10 to 15 in six pages of twelve, random."""
    cache = FrameCache(layers=2, batch=2, pages=12, tokens=TOKENS, heads=HEADS, head_dim=DIM, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for pages in (cache.keys, cache.values):
        pages.copy_(torch.randn(pages.shape, generator=generator, dtype=torch.float64))
    cache.allocate(range(10, 16))
    return cache


def chooser_of(cache, **options):
    return TokenChooser(cache, torch.from_numpy(THETA), **{"votes": 3, "reuse": 7} | options)


def query_of(frames, seed):
    return torch.randn(
        2, frames, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def turned(x, frames):
    """x [..., D] of a frame that sits so many frames on: time pairs first, split layout."""
    half = DIM // 2
    angle = np.zeros(half)
    angle[:BANDS] = frames * THETA
    z = torch.complex(x[..., :half], x[..., half:]) * torch.from_numpy(np.exp(1j * angle))
    return torch.cat((z.real, z.imag), -1)


def best(keys, frames, votes, count, counts=None, reuse=7):
    """Flat indices of the tokens with the largest sums of q . k over all query tokens and heads, in window order."""
    scores = torch.zeros(len(frames), TOKENS, dtype=torch.float64)
    for number, (page, frame) in enumerate(zip(keys, frames, strict=True)):
        for at, query in votes:
            scores[number] += torch.einsum("qhd,khd->k", turned(query, at), turned(page, frame))
    if counts is not None:
        scores[counts >= reuse] -= 1e6
    return sorted(scores.flatten().argsort(descending=True)[:count].tolist())


def choose(cache, chooser, frames, pages, queries):
    """A chunk that chooses: what is left of the cache, and its first pass in both layers."""
    _, pick = cache.keep(pages)
    chooser.prepare(frames, cache.allocate(frames), pick)
    for layer, query in enumerate(queries):
        chooser.hear(layer, query)
    return pick


def test_the_best_tokens_are_kept_where_and_when_they_were(cache):
    chooser, before = chooser_of(cache, votes=4), (cache.keys.clone(), cache.values.clone())
    chooser.prepare([15], [5], None)
    old = [query_of(1, 1), query_of(1, 2)]
    for layer, query in enumerate(old):
        chooser.hear(layer, query)
    choice, new = ChosenTokens(frame=10, indices=(1, 2, 3, 4)), [query_of(3, 3), query_of(3, 4)]
    pick = choose(cache, chooser, [16, 17, 18], [0, choice, choice, 5], new)
    assert cache.frames == [10, 10, 10, 15, 16, 17, 18]
    assert not {*pick.slots} & {page.slot for page in pick.sources} and not {*cache.slots[4:]} & {1, 2, 3, 4}
    for layer in range(2):
        for video in range(2):
            votes = [(15, old[layer][video, 0]), *((16 + f, new[layer][video, f]) for f in range(3))]
            keys, values = (pages[layer, video, 1:5] for pages in before)
            indices = best(keys, range(11, 15), votes, 2 * TOKENS)
            for place, index in enumerate(indices):
                slot, token = pick.slots[place // TOKENS], place % TOKENS
                page, own = index // TOKENS, index % TOKENS
                # in a page of frame 10 its key is turned as one of its own frame would be
                expected = turned(keys[page, own], 11 + page)
                assert (turned(cache.keys[layer, video, slot, token], 10) - expected).abs().max() < 1e-6
                assert torch.equal(cache.values[layer, video, slot, token], values[page, own])
                assert chooser.counts[layer, video, slot, token] == 1


def test_only_the_first_pass_chooses_and_only_the_last_votes_count(cache):
    chooser, choice = chooser_of(cache, votes=2), ChosenTokens(frame=10, indices=(0, 1, 2))
    queries = [query_of(3, 5), query_of(3, 6)]
    pick = choose(cache, chooser, [16, 17, 18], [choice, 4, 5], queries)
    chosen = cache.keys[:, :, pick.slots].clone()
    for layer in range(2):
        chooser.hear(layer, query_of(3, 7))
    assert torch.equal(cache.keys[:, :, pick.slots], chosen)
    other = FrameCache(layers=2, batch=2, pages=12, tokens=TOKENS, heads=HEADS, head_dim=DIM, dtype=torch.float64)
    other.keys.copy_(cache.keys), other.values.copy_(cache.values), other.allocate(range(10, 16))
    again = chooser_of(other, votes=2)
    choose(other, again, [16, 17, 18], [choice, 4, 5], [torch.cat((9 * q[:, :1], q[:, 1:]), 1) for q in queries])
    assert torch.equal(other.keys[:, :, pick.slots], chosen)  # the first of three frames has no vote


def test_a_frame_votes_once_with_its_last_pass(cache):
    """However many steps a chunk has, and however few frames: the last three frames have the three votes."""
    chooser, last = chooser_of(cache), {}
    for frame in (13, 14, 15):
        chooser.prepare([frame], [frame - 10], None)
        for step in range(4):
            last[frame] = query_of(1, 10 * frame + step)
            chooser.hear(0, last[frame])
    new, before = query_of(1, 99), cache.keys.clone()
    pick = choose(cache, chooser, [16], [ChosenTokens(frame=10, indices=(0, 1, 2)), 4, 5], [new])
    votes = [(14, last[14][0, 0]), (15, last[15][0, 0]), (16, new[0, 0])]
    indices = best(before[0, 0, :3], (10, 11, 12), votes, TOKENS)
    assert torch.equal(cache.values[0, 0, pick.slots[0]], cache.values[0, 0, :3].flatten(0, 1)[indices])


def test_a_token_that_was_chosen_too_often_comes_after_all_others(cache):
    chooser, choice = chooser_of(cache, reuse=2), ChosenTokens(frame=10, indices=(0, 1))
    worn = torch.zeros(2, TOKENS, dtype=torch.int64)
    worn[0, :4] = worn[1, 1] = 2
    chooser.counts[:, :, :2] = worn.int()
    before, queries = cache.keys.clone(), [query_of(3, 8), query_of(3, 9)]
    pick = choose(cache, chooser, [16, 17, 18], [choice, 5], queries)
    for layer in range(2):
        votes = [(16 + f, queries[layer][0, f]) for f in range(3)]
        indices = best(before[layer, 0, :2], (10, 11), votes, TOKENS, worn, 2)
        assert {0, 1, 2, 3, 6}.isdisjoint(indices)
        got = cache.values[layer, 0, pick.slots[0]]
        assert torch.equal(got, cache.values[layer, 0, :2].flatten(0, 1)[indices])


@pytest.mark.parametrize("times", [0, 5])
def test_where_all_were_chosen_too_often_the_best_are_taken(cache, times):
    chooser, queries = chooser_of(cache), [query_of(3, 8), query_of(3, 9)]
    chooser.counts[:] = 7 * times
    before = cache.keys.clone()
    pick = choose(cache, chooser, [16, 17, 18], [ChosenTokens(frame=10, indices=(0, 1)), 5], queries)
    votes = [(16 + f, queries[1][1, f]) for f in range(3)]
    indices = best(before[1, 1, :2], (10, 11), votes, TOKENS)
    assert torch.equal(cache.values[1, 1, pick.slots[0]], cache.values[1, 1, :2].flatten(0, 1)[indices])


def test_new_frames_have_not_been_chosen_yet(cache):
    chooser = chooser_of(cache)
    chooser.counts[:] = 3
    chooser.prepare([16, 17], [6, 7], None)
    assert chooser.counts[:, :, 6:8].eq(0).all() and chooser.counts[:, :, :6].eq(3).all()
