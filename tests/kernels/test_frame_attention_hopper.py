"""The Hopper kernel's own source, played on the CPU in random order (gluon_player.py), against the oracle."""

import math
import random

import pytest
import torch
from attention_inputs import declared, exact, make_inputs
from gluon_player import ROOT, played

from flexkern.kernels.attention.hopper import frame_attention_hopper
from flexkern.testing import assert_as_accurate

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="fragments are merged by Triton's interpreter")
OWN = ("common", "attention.work", "attention.hopper_device")  # played like the kernel itself
SHAPES = {  # B, F, S, H, D, R, G
    "one token": (1, 1, 1, 1, 64, 1, 1),
    "a frame is a short tile of keys": (2, 2, 40, 2, 64, 3, 2),
    "a frame is a whole tile of keys": (1, 2, 128, 1, 64, 2, 1),
    "a whole and a short tile, rows of two frames": (1, 3, 140, 1, 128, 2, 1),
    "two whole tiles": (1, 1, 256, 1, 64, 3, 1),
    "many tiles, the last one short": (1, 2, 400, 1, 64, 2, 1),
    "many whole tiles": (1, 1, 512, 1, 64, 2, 1),
}


def play(inputs: dict, seed=0, edit=None, programs: int = 2, **options):
    """The kernel's output and log-sum-exp; ``edit`` changes its sources first."""
    kernels = played("attention.hopper", OWN, ("attention.launch",), seed, edit)
    return kernels.frame_attention_hopper(**inputs, programs=programs, want_lse=True, **options)


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
    check(inputs, seed=seed, programs=choose.randint(1, 6), stages=choose.choice([2, 2, 3]))


@cpu_only
def test_the_order_does_not_change_a_bit():
    inputs = make_inputs(1, 2, 300, 2, 64, 3, 1, torch.bfloat16)
    (out, lse), *others = (play(inputs, seed, programs=5) for seed in range(4))
    assert all(torch.equal(out, other[0]) and torch.equal(lse, other[1]) for other in others)


SCORES_DONE = "    score = warpgroup_mma_wait(1, deps=(score,))\n"
KEYS_FREE = "    mbarrier.arrive(ring.k.free.index((n + 1) % STAGES), count=1)\n"
PRODUCT_DONE = "    acc, p_next = warpgroup_mma_wait(0, deps=(product, p_next))\n"
LAST_DONE = "    acc = warpgroup_mma_wait(0, deps=(acc,))\n"
VALUES_FREE = "    mbarrier.arrive(ring.v.free.index(n % STAGES), count=1)\n"
MUTANTS = {  # name: what stands in the sources once, what stands there instead
    "the fetching warp waits for the wrong use": ("(n // STAGES & 1) ^ 1)", "n // STAGES & 1)"),
    "it never waits": ("    mbarrier.wait(buffers.free.index(n % STAGES), (n // STAGES & 1) ^ 1)\n", ""),
    "it expects too few bytes": ("N * buffers.tiles.shape[2] * 2)", "N * buffers.tiles.shape[2])"),
    "one warpgroup is enough to free a buffer": ("init(free.index(b), count=2)", "init(free.index(b), count=1)"),
    "values are not waited for": ("    wait_full(ring.v, n, True, STAGES)\n    product", "    product"),
    "keys are not waited for": ("    wait_full(ring.k, n + 2, more, STAGES)\n", ""),
    "keys of the next item are waited for": ("ring.k, n + 2, more", "ring.k, n + 2, True"),
    "keys are freed before they are read": (SCORES_DONE + KEYS_FREE, KEYS_FREE + SCORES_DONE),
    "values are freed before they are read": (PRODUCT_DONE + VALUES_FREE, VALUES_FREE + PRODUCT_DONE),
    "the product is used too early": ("warpgroup_mma_wait(0, deps=(product", "warpgroup_mma_wait(1, deps=(product"),
    "the last values are never freed": (LAST_DONE + VALUES_FREE, LAST_DONE),
    "keys and values lie in one ring": ("descriptors.v, ring.v", "descriptors.v, ring.k"),
    "the query is not published": ("    fence_async_shared()  # wgmma", "    # wgmma"),
    "the query is not turned again": ("        store_query(q, loaded", "        (q, loaded"),
    "it is overwritten too early": (SCORES_DONE, "    q.tensor.fill_(0)\n" + SCORES_DONE),
    "each half looks at its own frame": (
        "query = QueryRows(rows_ptr, row, item, sizes, tables)",
        "query = QueryRows(rows_ptr, row, item._replace(frame=row // S), sizes, tables)",
    ),
    "both halves store the same fragment": ("item.fragment * BLOCK_M + half * ROWS", "item.fragment * BLOCK_M"),
    "hidden frames are fetched": ("key_frame + 1, item.end, HAS_BIAS)", "key_frame + 1, item.end, False)"),
    "tokens past the frame's end count": ("    if KEYS < N:", "    if False:"),
    "an accumulator is not rescaled": ("    acc *= gl.convert_layout(alpha, state)[:, None]\n", ""),
    "the bias of the frame before": ("            bias = load_bias(bias_ptr, frame, read, following, HAS_BIAS)\n", ""),
}  # fmt: skip
FILES = [ROOT / "kernels" / f"{name.replace('.', '/')}.py" for name in (*OWN, "attention.hopper")]


def check_many(edit=None) -> None:
    choose = random.Random(1)
    for seed in range(12):
        inputs = make_inputs(1, 2, (300, 140, 40)[seed % 3], 1, 64, 4, 1, torch.bfloat16, bias=True)
        hide(inputs, choose)
        check(inputs, seed=seed, edit=edit, programs=3)


@cpu_only
def test_without_a_mistake_nothing_is_noticed():
    check_many()


@cpu_only
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name):
    before, after = MUTANTS[name]
    assert sum(path.read_text().count(before) for path in FILES) == 1, "a mutant changes one place of the sources"
    with pytest.raises((AssertionError, RuntimeError)):
        check_many(lambda source: source.replace(before, after))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 3, 1560, 12, 128, 6, 1), (1, 1, 880, 24, 128, 3, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_on_a_gpu(shape, has_bias):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    inputs = make_inputs(*shape, torch.bfloat16, bias=has_bias)
    there = {name: x if x is None else x.cuda() for name, x in inputs.items()}
    out, lse = frame_attention_hopper(**there, want_lse=True)
    assert_as_accurate(out.cpu(), exact(inputs)[0], declared(**inputs), mean=1.3)
    for _ in range(20):
        again, lse_again = frame_attention_hopper(**there, want_lse=True)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
