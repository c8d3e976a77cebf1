"""The Hopper kernel's own source, played on the CPU in random order (gluon_player.py), against the oracle."""

import math
import random

import pytest
import torch
from attention_inputs import declared, exact, make_inputs
from gluon_player import ROOT, played
from hopper_mutants import DEADLOCKS, MUTANTS, OTHERS, RACES

from flexkern.kernels.attention.hopper import frame_attention_hopper
from flexkern.kernels.attention.hopper_tiles import Tile, Tiles, cut_frame
from flexkern.kernels.attention.hopper_variants import BEST_ARGUED, SELECTED, VARIANTS, Variant, get_variant
from flexkern.testing import assert_as_accurate

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="fragments are merged by Triton's interpreter")
# played like the kernel itself
OWN = ("common", "warpgroup", "attention.work", "attention.hopper_ring", "attention.hopper_device")
SHARED = ("prepared", "attention.launch", "attention.hopper_tiles", "attention.hopper_variants")
TILES = (dict(stages=2), dict(stages=3), dict(wide=True), dict(fold_last=True))
EVERY = [  # every combination of switches that a variant may have
    Variant(signal=signal, one_arrive=one, ping_pong=turns, early_free=early, **tiles)
    for signal in ("mbarrier", "named")
    for one in (False, True)
    for turns in (False, True)
    for early in ((False, True) if signal == "named" else (False,))
    for tiles in TILES
]
SHAPES = {  # B, F, S, H, D, R, G
    "one token": (1, 1, 1, 1, 64, 1, 1),
    "a frame is a short tile of keys": (2, 2, 40, 2, 64, 3, 2),
    "a frame is a whole tile of keys": (1, 2, 128, 1, 64, 2, 1),
    "a whole and a short tile, rows of two frames": (1, 3, 140, 1, 128, 2, 1),
    "two whole tiles": (1, 1, 256, 1, 64, 3, 1),
    "many tiles, the last one short": (1, 2, 400, 1, 64, 2, 1),
    "many whole tiles": (1, 1, 512, 1, 64, 2, 1),
}


def play(inputs: dict, seed=0, edit=None, programs: int = 2, variant=VARIANTS[SELECTED], **options):
    """The kernel's output and log-sum-exp; ``edit`` changes its sources first."""
    kernels = played("attention.hopper", OWN, SHARED, seed, edit)
    result = kernels.frame_attention_hopper(**inputs, programs=programs, want_lse=True, variant=variant, **options)
    if variant.ping_pong:
        for issued in kernels.player.issued:
            assert issued == ["role 0", "role 1"] * (len(issued) // 2), "the warpgroups do not take turns"
    return result


def check(inputs: dict, **options) -> None:
    out, lse = play(inputs, **options)
    clean = dict(inputs, key_pages=inputs["key_pages"].nan_to_num(), value_pages=inputs["value_pages"].nan_to_num())
    truth, total = exact(clean)
    due = declared(**clean).nan_to_num()  # a row that sees nothing is 0
    assert_as_accurate(out, truth, due, mean=1.3)  # each cut rounds once more
    assert torch.equal(lse.isneginf(), total.isneginf())
    seen = ~total.isneginf()
    assert (lse - total)[seen].abs().max() < 16 * torch.finfo(out.dtype).eps * total[seen].abs().max()


@cpu_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_oracle(shape, dtype):
    check(make_inputs(*SHAPES[shape], dtype))


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.bfloat16), (64, torch.float32)])
def test_refuses_what_it_cannot_multiply(dim, dtype):
    query, pages = torch.empty(1, 1, 16, 1, dim, dtype=dtype), torch.empty(1, 2, 16, 1, dim, dtype=dtype)
    plan = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, 4, 2), torch.ones(1)
    says = f"head dim must be 64 or 128, in bfloat16 or float16, got {dim} in {dtype}"
    with pytest.raises(ValueError, match=says):
        frame_attention_hopper(query, pages, pages, *plan)


def hide(inputs: dict, choose: random.Random) -> None:
    """Hide some frames from some, and one from all, whose page then holds NaN."""
    bias = inputs["bias"]
    for f in range(len(bias)):
        bias[f, choose.sample(range(bias.shape[1]), choose.randrange(bias.shape[1]))] = -math.inf
    unread = choose.randrange(bias.shape[1])
    bias[:, unread] = -math.inf
    for pages in ("key_pages", "value_pages"):
        inputs[pages][:, inputs["slots"][unread].long()] = math.nan


@cpu_only
@pytest.mark.parametrize("seed", range(20))
def test_any_shape_in_any_order(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    frames, read, heads = choose.randint(1, 3), choose.randint(1, 4), choose.randint(1, 2)
    tokens = choose.choice([5, 16, 100, 128, 129, 200, 256, 300, 384, 390])
    inputs = make_inputs(1, frames, tokens, heads, 64, read, 1, torch.bfloat16, bias=seed % 2 == 1)
    if seed % 2 and read > 1:
        hide(inputs, choose)
    check(inputs, seed=seed, programs=choose.randint(1, 6), variant=Variant(**choose.choice(TILES)))


def tiles_of(variant: Variant) -> tuple[bool, bool]:
    """Variants that cut frames into the same tiles add in the same order."""
    return variant.wide, variant.fold_last


SAME = tiles_of(VARIANTS[SELECTED])


def name_of(variant: Variant) -> str:
    keys = ("signal", "one_arrive", "ping_pong", "early_free", "stages", "wide", "fold_last")
    return " ".join(f"{key}={getattr(variant, key)}" for key in keys)


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("variant", EVERY, ids=name_of)
def test_every_combination_of_switches_in_any_order(variant):
    for seed in range(4):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        tokens = (300, 40, 256, 129)[seed]  # wide: a whole and a short tile, a short one, 192 + 64, 128 + 16
        inputs = make_inputs(1, choose.randint(1, 3), tokens, 2, 64, 3, 1, torch.bfloat16, bias=seed % 2 == 0)
        if seed % 2 == 0:
            hide(inputs, choose)
        check(inputs, seed=seed, programs=choose.randint(1, 5), variant=variant)


@cpu_only
def test_the_order_does_not_change_a_bit():
    inputs = make_inputs(1, 2, 300, 1, 64, 3, 1, torch.bfloat16)
    (out, lse), *others = (play(inputs, seed, programs=3) for seed in range(4))  # two of five tiles are cut
    others += [play(inputs, programs=3, variant=variant) for variant in VARIANTS.values() if tiles_of(variant) == SAME]
    assert all(torch.equal(out, other[0]) and torch.equal(lse, other[1]) for other in others)


@cpu_only
@pytest.mark.parametrize("name", [name for name in VARIANTS if tiles_of(VARIANTS[name]) != SAME])
def test_nor_where_tiles_have_rests(name):
    inputs = make_inputs(1, 2, 300, 1, 64, 3, 1, torch.bfloat16)
    (out, lse), *others = (play(inputs, seed, programs=3, variant=VARIANTS[name]) for seed in range(4))
    assert all(torch.equal(out, other[0]) and torch.equal(lse, other[1]) for other in others)


@pytest.mark.parametrize("cut", [{}, dict(wide=True), dict(fold_last=True)], ids=str)
def test_tiles_hold_every_key_once_and_rests_fit(cut):
    for tokens in range(1, 800):
        tiles = cut_frame(tokens, **cut)
        assert (tiles.count - 1) * tiles.whole.keys + tiles.last.keys == tokens
        for tile in (tiles.first, tiles.whole, tiles.last):
            assert 0 < tile.keys <= tile.rows + tile.rest and (tile.rest == 0 or tile.keys > tile.rows == 128)
            assert tile.rows in (16, 32, 64, 128) and tile.rest in (0, 16, 32, 64) and tile.rest <= tiles.rest
        assert tiles.first == (tiles.whole if tiles.count > 1 else tiles.last)
        # a block that is fetched is as high as the part, or higher where the buffer is
        assert tiles.box >= tiles.last.rest and (tiles.last.rows <= tiles.box or tiles.last.rows > 64)


def test_the_tiles_of_a_frame_of_wan():
    whole, wide = Tile(128, 0, 128), Tile(128, 64, 192)
    assert cut_frame(1560) == Tiles(13, whole, Tile(32, 0, 24), box=32)
    assert cut_frame(1560, fold_last=True) == Tiles(12, whole, Tile(128, 32, 152), box=32)
    assert cut_frame(1560, wide=True) == Tiles(9, wide, Tile(32, 0, 24), box=64)
    assert cut_frame(3600, wide=True) == Tiles(19, wide, Tile(128, 16, 144), box=64)
    assert cut_frame(1536, fold_last=True) == cut_frame(1536) == Tiles(12, whole, whole, box=128)


def test_variants_are_refused_by_name_and_by_sense():
    assert SELECTED in VARIANTS and BEST_ARGUED in VARIANTS
    with pytest.raises(
        ValueError, match="no variant 'turn' of the Hopper kernel, did you mean 'turns': there is plain, "
    ):
        get_variant("turn")
    with pytest.raises(ValueError, match="no variant 'fast'"):
        frame_attention_hopper(**make_inputs(1, 1, 16, 1, 64, 1, 1, torch.bfloat16), variant="fast")
    for switches, says in (
        (dict(early_free=True), 'early_free needs signal "named"'),
        (dict(signal="flag"), "got 'flag'"),
        (dict(stages=1), "stages must be 2, 3 or 4, got 1"),
        (dict(registers=248), "an SM has 65536 registers, got 256 x 248"),
        (dict(wide=True, fold_last=True), "a wide tile has a rest already"),
        (dict(wide=True, stages=3), "two stages of tiles with a rest fit into shared memory, got 3"),
    ):
        with pytest.raises(ValueError, match=says):
            Variant(**switches)


SOURCES = [(ROOT / "kernels" / f"{name.replace('.', '/')}.py").read_text() for name in (*OWN[3:], "attention.hopper")]


def check_many(edit=None, variant=VARIANTS[SELECTED], orders: int = 12) -> None:
    choose = random.Random(1)
    for seed in range(orders):
        inputs = make_inputs(1, 2, (300, 140, 40)[seed % 3], 1, 64, 4, 1, torch.bfloat16, bias=True)
        hide(inputs, choose)
        check(inputs, seed=seed, edit=edit, programs=3, variant=variant)


@cpu_only
@pytest.mark.parametrize("orders", [3, pytest.param(12, marks=pytest.mark.slow)])  # 3: each mistake shows by then
@pytest.mark.parametrize("variant", [*VARIANTS.values(), *OTHERS.values()], ids=[*VARIANTS, *OTHERS])
def test_without_a_mistake_nothing_is_noticed(variant, orders):
    check_many(variant=variant, orders=orders)


@cpu_only
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name):
    variant, before, after = MUTANTS[name]
    assert sum(source.count(before) for source in SOURCES) == 1, "a mutant changes one place of the sources"
    with pytest.raises((AssertionError, RuntimeError)) as noticed:
        check_many(lambda source: source.replace(before, after), (VARIANTS | OTHERS)[variant])
    if name in DEADLOCKS:
        assert "deadlock of role" in str(noticed.value)
    if name in RACES:  # seen in the numbers alone: every role came to its end
        assert "non-finite" in str(noticed.value) or "error" in str(noticed.value)


def check_on_a_gpu(inputs: dict, variant: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    there = {name: x if x is None else x.cuda() for name, x in inputs.items()}
    out, lse = frame_attention_hopper(**there, want_lse=True, variant=variant)
    # on the GPU too: of the largest shape these are 500 billion operations, half of them in float64
    assert_as_accurate(out, exact(there)[0], declared(**there), mean=1.3)
    for _ in range(20):
        again, lse_again = frame_attention_hopper(**there, want_lse=True, variant=variant)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 3, 1560, 12, 128, 6, 1), (1, 1, 880, 24, 128, 3, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_on_a_gpu(shape, has_bias):
    check_on_a_gpu(make_inputs(*shape, torch.bfloat16, bias=has_bias), SELECTED)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != SELECTED])
@pytest.mark.parametrize("has_bias", [False, True])
def test_variants_on_a_gpu(variant, has_bias):
    check_on_a_gpu(make_inputs(1, 3, 1560, 12, 128, 6, 1, torch.bfloat16, bias=has_bias), variant)
