"""What people do with flexkern.attention: heads first, SDPA's options, autocast, arrays and tensors of indices."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from upstream import rope

import flexkern
from flexkern import functional
from flexkern.functional import frame_turns, turn_place
from flexkern.functional.validate import MOST_HEADS
from flexkern.kernels import reference
from flexkern.plan import band_split
from flexkern.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads_first(x, contiguous=False):
    x = x.transpose(-3, -2)
    return x.contiguous() if contiguous else x


def draw(random, batch=None, heads=None):
    """A right call: query, key and value, F, R, S."""
    frames, read, tokens = random.randint(1, 4), random.randint(1, 5), random.randint(1, 9)
    batch, heads, others = batch or random.randint(1, 2), heads or random.choice((1, 2, 3, 4, 6)), 1
    others = random.choice([n for n in range(1, heads + 1) if heads % n == 0])
    dim = 2 * random.randint(1, 64)
    query = torch.randn(batch, frames * tokens, heads, dim) * 2
    key, value = (torch.randn(batch, read * tokens, others, dim) for _ in "kv")
    return query, key, value, frames, read, tokens


def oracle(query, key, value, frames, read, *, turn=None, logit_scale=None, bias=None, scale=None, dtype=torch.float64):
    """reference.frame_attention in that dtype, every key head repeated for the query heads that share it."""
    dim, shared = query.shape[-1], query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(shared, 2) for x in (key, value))
    turn = torch.tensor([1.0, 0.0]).expand(frames, read, 1, 1, 2) if turn is None else turn
    logit_scale = torch.ones(frames) if logit_scale is None else logit_scale
    logit_scale = logit_scale.to(dtype) * (1 if scale is None else scale * dim**0.5)
    by_frame = [x.to(dtype).unflatten(1, (n, -1)) for x, n in ((query, frames), (key, read), (value, read))]
    bias = None if bias is None else bias.to(dtype)
    return reference.frame_attention(*by_frame, torch.arange(read), turn.to(dtype), logit_scale, bias)[0].flatten(1, 2)


def take_indices(random, frames):
    """The same indices as users hold them."""
    kinds = [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda x: [np.int64(i) for i in x],
        lambda x: np.array(x, np.int32),
        iter,
    ]
    return random.choice(kinds)(frames)


@pytest.mark.parametrize("seed", range(60))
def test_any_right_call_is_right(seed):
    choose = random.Random(seed)
    query, key, value, frames, read, tokens = draw(choose)
    heads, dim = query.shape[2:]
    at, seen = sorted(choose.sample(range(200), frames)), sorted(choose.sample(range(200), read))
    pairs, causal = choose.choice(("split", "interleaved")), choose.random() < 0.5
    scale = choose.choice((None, 0.3, 1 / dim, np.float64(0.1)))
    policy = choose.choice((None, "flex", "longlive", "lol"))
    bias = choose.choice((None, torch.randn(frames, read)))
    kept = None if choose.random() < 0.5 else 0.5 + torch.rand(frames)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    actual = flexkern.attention(
        *(strided if choose.random() < 0.5 else (query, key, value)), is_causal=causal, scale=scale, enable_gqa=True,
        tokens=choose.choice((tokens, np.int32(tokens))), query_frames=take_indices(choose, at),
        key_frames=take_indices(choose, seen), policy=policy, bias=bias, logit_scale=kept, pairs=pairs,
    )  # fmt: skip
    turn, logit_scale = frame_turns(at, seen, head_dim=dim, heads=heads, policy=policy or "self-forcing")
    if causal:
        later = torch.tensor(seen) > torch.tensor(at)[:, None]
        bias = (torch.zeros(frames, read) if bias is None else bias).masked_fill(later, -math.inf)
    if pairs == "interleaved":
        query, key = reference.split_pairs(query), reference.split_pairs(key)
    options = dict(turn=turn, logit_scale=logit_scale * (1 if kept is None else kept), bias=bias, scale=scale)
    exact = oracle(query, key, value, frames, read, **options)
    torch.testing.assert_close(actual.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_without_time_it_is_torchs_attention_option_by_option(seed):
    choose = random.Random(seed)
    query, key, value, frames, read, tokens = draw(choose)
    options = dict(scale=choose.choice((None, 0.2)), enable_gqa=True)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, key, value)), **options)
    actual = flexkern.attention(query, key, value, None, 0.0, False, tokens=tokens, **options)
    torch.testing.assert_close(actual.double(), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_shared_heads_need_the_word():
    query, key, value, _, _, tokens = draw(random.Random(0), heads=6)
    key, value = (x[:, :, :1].repeat(1, 1, 2, 1) for x in (key, value))
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        flexkern.attention(query, key, value, tokens=tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_with_shared_heads_and_angles_by_head(dtype):
    """Bit for bit as if the key heads were repeated, whichever frames come."""
    torch.manual_seed(3)
    query = torch.randn(2, 3, 5, 4, 64).to(dtype)
    pages = torch.randn(2, 2, 6, 5, 2, 64).to(dtype)
    turn, logit_scale = frame_turns([7, 8, 9], [0, 8], head_dim=64, heads=4, policy="lol")
    assert turn.shape[2] == 4
    plan = dict(slots=[4, 1], turn=turn, logit_scale=logit_scale, scale=0.3)
    actual = flexkern.paged_attention(query, *pages, **plan, enable_gqa=True)
    expected = flexkern.paged_attention(query, *(x.repeat_interleave(2, -2) for x in pages), **plan)
    torch.testing.assert_close(actual, expected, atol=0 if dtype != torch.float32 else 1e-6, rtol=0)


def test_frame_causal_attention_is_attention_to_what_came_before():
    query, key, value = torch.randn(3, 1, 4 * 6, 2, 64).unbind()
    placed = dict(query_frames=range(4), key_frames=range(4), pairs="interleaved", is_causal=True)
    out = flexkern.attention(query, key, value, **placed)
    for last in range(4):
        upto, now = slice(0, (last + 1) * 6), slice(last * 6, (last + 1) * 6)
        alone = flexkern.attention(
            query[:, now], key[:, upto], value[:, upto], query_frames=[last], key_frames=range(last + 1),
            pairs="interleaved",
        )  # fmt: skip
        torch.testing.assert_close(out[:, now], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("contiguous", [False, True])
def test_heads_first_is_refused_and_told_the_mend(contiguous, seed):
    """Where tokens are told it always is, unless both axes are as long; where not, wherever there are more tokens."""
    choose = random.Random(seed)
    frames, tokens, heads = choose.randint(1, 6), choose.randint(2, 40), choose.choice((2, 3, 4, 6, 8, 12, 24))
    right = torch.randn(3, 1, frames * tokens, heads, 64).unbind()
    wrong = [heads_first(x, contiguous) for x in right]
    placed = dict(query_frames=range(frames), key_frames=range(frames), pairs="interleaved")
    expected = flexkern.attention(*right, tokens=tokens, **placed)
    mended = flexkern.attention(*(x.transpose(1, 2) for x in wrong), tokens=tokens, **placed)
    torch.testing.assert_close(mended, expected, atol=1e-5, rtol=1e-5)
    if frames * tokens != heads:
        with pytest.raises(ValueError, match=r"pass x.transpose\(1, 2\) of query, key and value"):
            flexkern.attention(*wrong, tokens=tokens, **placed)
    if frames * tokens > heads:
        assert flexkern.attention(*right, **placed).equal(expected)
        with pytest.raises(ValueError, match=r"pass x.transpose\(1, 2\) of query, key and value"):
            flexkern.attention(*wrong, **placed)


@pytest.mark.parametrize(("heads", "tokens"), [(12, 1560), (40, 3600), (30, 920)])
def test_models_as_they_are_with_heads_first(heads, tokens):
    """The shapes of Wan and CausVid: with tokens of one frame, of a whole clip or 1, with shared heads, in pages."""
    wrong = torch.empty(1, heads, 1, 64).expand(1, heads, 3 * tokens, 64)
    mend = r"pass x.transpose\(1, 2\)"
    for options in (dict(tokens=tokens), dict(tokens=1), dict(bias=torch.zeros(3, 3)), dict(bias=torch.zeros(1, 1))):
        with pytest.raises(ValueError, match=mend):
            flexkern.attention(wrong, wrong, wrong, **options)
    with pytest.raises(ValueError, match=mend):
        flexkern.attention(wrong, *(wrong[:, :2],) * 2, tokens=tokens, enable_gqa=True)
    with pytest.raises(ValueError, match=mend):
        flexkern.attention(wrong[:, :, :tokens], wrong, wrong, tokens=tokens)
    page, turn = torch.empty(1, 2, heads, tokens, 64), frame_turns([0, 1], [0, 1], head_dim=64)[0]
    for told in (None, tokens):
        with pytest.raises(ValueError, match=r"pass x.transpose\(2, 3\)"):
            flexkern.paged_attention(page, page, page, [0, 1], turn, tokens=told)


def test_few_tokens_and_many_heads_are_taken_once_the_tokens_are_told():
    """A tiny frame under many heads looks like heads first: refused without the word, right with it."""
    query, key, value = torch.randn(3, 1, 2 * 3, 12, 64).unbind()
    placed = dict(query_frames=[0, 1], key_frames=[0, 1], pairs="split")
    with pytest.raises(ValueError, match=r"\[1, 6, 12, 64\] seems to have heads before tokens.+, or tokens=3 if"):
        flexkern.attention(query, key, value, **placed)
    turn, _ = frame_turns([0, 1], [0, 1], head_dim=64)
    out = flexkern.attention(query, key, value, **placed, tokens=3)
    torch.testing.assert_close(out.double(), oracle(query, key, value, 2, 2, turn=turn), atol=1e-5, rtol=1e-5)
    pages = [x.unflatten(1, (2, 3)) for x in (query, key, value)]
    with pytest.raises(ValueError, match=r"\[1, 2, 3, 12, 64\] seems to have heads before tokens.+, or tokens=3 if"):
        flexkern.paged_attention(*pages, [0, 1], turn)
    assert flexkern.paged_attention(*pages, [0, 1], turn, tokens=3).flatten(1, 2).equal(out)
    # five frames of heads cannot be: 12 is not a multiple
    clip = torch.randn(1, 5, 12, 64)
    flexkern.attention(clip, clip, clip, query_frames=range(5), key_frames=range(5), pairs="split")
    assert MOST_HEADS > 128


@pytest.mark.parametrize("seed", range(30))
def test_turn_place_is_wans_rotation_without_time(seed):
    choose = random.Random(seed)
    frames, rows, columns, dim = choose.randint(1, 4), choose.randint(1, 9), choose.randint(1, 9), choose.randint(1, 64)
    dtype, paged = choose.choice(DTYPES), choose.random() < 0.5
    x = torch.randn(2, frames * rows * columns, 2, 2 * dim).to(dtype)
    expected = rope(x, 0, rows, columns, [0] * frames)
    still = 2 * band_split(2 * dim)[0]
    given = x.unflatten(1, (frames, -1)) if paged else x
    out = turn_place(given, np.int64(rows), columns, pairs="interleaved")
    assert out.dtype == dtype and out.shape == given.shape
    out = out.flatten(1, 2) if paged else out
    assert out.equal(expected) and out[..., :still].equal(x[..., :still])
    split = turn_place(reference.split_pairs(x), rows, columns, pairs="split")
    assert split.equal(reference.split_pairs(expected))


def test_turn_place_and_frames_are_wans_attention():
    rows, columns, at = 3, 5, [40, 41, 42]
    query, key, value = torch.randn(3, 1, 3 * 15, 2, 128).unbind()
    before = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (rope(query, 40, rows, columns), rope(key, 40, rows, columns), value))
    ).transpose(1, 2)
    turned = (turn_place(x, rows, columns, pairs="interleaved") for x in (query, key))
    after = flexkern.attention(*turned, value, query_frames=at, key_frames=at, pairs="interleaved")
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor, got list"),
        (torch.ones(24, 2, 64), {}, ValueError, r"x must be real \[B, F \* S, H, D\] or .+ got torch.float32 \[24, 2"),
        (torch.ones(1, 24, 2, 63), {}, ValueError, "D even, got"),
        (torch.ones(1, 24, 2, 64).long(), {}, ValueError, "x must be real .+ got torch.int64"),
        (torch.ones(1, 23, 2, 64), {}, ValueError, r"frames of 2 \* 4 = 8 tokens, got 23 tokens of 2 heads$"),
        (torch.ones(1, 2, 24, 64), {}, ValueError, r"got 2 tokens of 24 heads; if heads .+ pass x.transpose\(1, 2\)"),
        (torch.ones(1, 3, 2, 8, 64), {}, ValueError, r"got 2 tokens of 8 heads; if heads .+ pass x.transpose\(2, 3\)"),
        (torch.ones(1, 8, 800, 64), {}, ValueError, r"got 8 tokens of 800 heads; if heads .+ pass x.transpose\(1, 2\)"),
        (torch.ones(1, 8, 2, 64), {"rows": 0}, ValueError, "rows must be an integer of at least 1, got 0"),
        (torch.ones(1, 8, 2, 64), {"columns": 4.0}, ValueError, "columns must be an integer of at least 1, got 4.0"),
        (torch.ones(1, 8, 2, 64), {"pairs": "wan"}, ValueError, "pairs must be 'interleaved' .+, got 'wan'"),
        (torch.ones(1, 8, 2, 64), {"pairs": None}, ValueError, "pairs must be given"),
    ],
)
def test_errors_of_turn_place(x, options, error, message):
    with pytest.raises(error, match=message):
        turn_place(x, **{"rows": 2, "columns": 4, "pairs": "interleaved"} | options)


def calls(device):
    """Every way to call with inputs of float32 and of mixed dtypes."""
    query, key, value = torch.randn(3, 1, 2 * 6, 2, 64, device=device).unbind()
    turn, logit_scale = frame_turns([3, 4], [3, 4], head_dim=64, policy="flex", device=device)
    plan = dict(turn=turn, logit_scale=logit_scale)
    pages = [x.unflatten(1, (2, 6)) for x in (query, key, value)]
    slots = torch.tensor([1, 0], device=device)
    flat = lambda q, k, v: flexkern.attention(q, k, v, **plan, pairs="interleaved")
    paged = lambda q, k, v: flexkern.paged_attention(q, k, v, slots, **plan)
    return [(flat, (query, key, value)), (flat, (query, key.bfloat16(), value)), (paged, pages)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", range(3))
def test_autocast_is_a_cast_of_query_key_and_value_compiled_or_not(which, dtype, device):
    call, inputs = calls(device)[which]
    expected = call(*(x.to(dtype) for x in inputs))
    assert expected.dtype == dtype
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    def inside(*x):
        with torch.autocast(device, dtype):
            return call(*x)

    with torch.autocast(device, dtype):
        plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs))
        assert plain.dtype == dtype  # the rule that is followed
        assert call(*inputs).equal(expected) and compiled(*inputs).equal(expected)
        with torch.autocast(device, enabled=False):
            still = [x.float() for x in inputs]
            assert call(*still).dtype == compiled(*still).dtype == torch.float32
    assert inside(*inputs).equal(expected)
    assert torch.compile(inside, fullgraph=True, backend="aot_eager")(*inputs).equal(expected)


def test_autocast_does_not_reach_into_the_operator():
    """What the operator returns has the dtype that its fake promises, whoever calls it."""
    query = torch.randn(1, 1, 4, 2, 64)
    turn = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 12, 2).contiguous()
    args = query, query, query, torch.zeros(1, dtype=torch.int32), turn, torch.ones(1), None
    expected = torch.ops.flexkern.frame_attention(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.flexkern.frame_attention(*args).equal(expected)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, list, np.array, "numpy integers"], ids=str)
def test_slots_of_any_integers(kind):
    query, turn = torch.randn(1, 1, 4, 2, 64), frame_turns([5], [4, 5], head_dim=64)[0]
    pages = torch.randn(2, 1, 3, 4, 2, 64)
    slots = {list: [2, 0], np.array: np.array([2, 0]), "numpy integers": [np.int64(2), np.int32(0)]}.get(kind)
    slots = torch.tensor([2, 0], dtype=kind) if slots is None else slots
    expected = oracle(
        query[:, 0], pages[0][:, [2, 0]].flatten(1, 2), pages[1][:, [2, 0]].flatten(1, 2), 1, 2, turn=turn
    )
    actual = flexkern.paged_attention(query, *pages, slots, turn)[:, 0]
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_number_scales_as_a_tensor_of_it_does():
    query, key, value = torch.randn(3, 1, 12, 2, 64).unbind()
    expected = flexkern.attention(query, key, value, tokens=4, logit_scale=torch.full((3,), 0.5))
    for number in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        assert flexkern.attention(query, key, value, tokens=4, logit_scale=number).equal(expected)


def test_a_turn_for_every_pair_is_taken():
    """Models that split their pairs otherwise say the turn of all of them."""
    query, key, value = torch.randn(3, 1, 12, 2, 64).unbind()
    turn, _ = frame_turns([0, 1, 2], [0, 1, 2], head_dim=64)
    whole = reference.pad_turn(turn, 32)
    pairs = dict(pairs="interleaved")
    expected = flexkern.attention(query, key, value, turn=turn, **pairs)
    torch.testing.assert_close(flexkern.attention(query, key, value, turn=whole, **pairs), expected)


@pytest.mark.triton(3, 4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 32, 96, 126])
def test_head_dims_that_the_kernel_lacks_are_done_by_wider_ones(dim, dtype, device):
    """The operator of CUDA, run where the tests run, against float64; what is not listed may hold anything."""
    pytest.importorskip("triton")
    query = (torch.randn(2, 2, 5, 2, dim) * 2).to(dtype)
    pages = torch.full((2, 2, 4, 5, 2, dim), math.nan, dtype=dtype)
    slots = torch.tensor([3, 0, 2])
    pages[:, :, slots] = torch.randn(2, 2, 3, 5, 2, dim).to(dtype)
    turn, logit_scale = frame_turns([7, 8], [0, 7, 8], head_dim=dim, policy="flex")
    bias = torch.randn(2, 3)
    args = [x.to(device) for x in (query, *pages, slots, turn, logit_scale, bias)]
    actual = functional.operator.on_cuda(*args).cpu()
    assert actual.is_contiguous() and actual.shape == query.shape
    on_cpu = functional.operator.on_cpu(query, *pages, slots, turn, logit_scale, bias)
    exact = reference.frame_attention(*(x.double() if x.is_floating_point() else x for x in args))[0].cpu()
    entitled = on_cpu if dtype != torch.float32 else reference.frame_attention(*args)[0].cpu()
    assert_as_accurate(actual, exact, entitled, mean=2, worst=4)


class Compiled(torch.nn.Module):
    """All that a model may do in one graph."""

    def forward(self, query, key, value, turn, logit_scale, bias):
        query, key = (flexkern.turn_place(x, 2, 3, pairs="interleaved") for x in (query, key))
        return flexkern.attention(
            query, key, value, turn=turn, logit_scale=logit_scale, bias=bias, scale=0.2, enable_gqa=True, tokens=6,
            pairs="interleaved",
        )  # fmt: skip


def compiled_args(frames=3):
    query, key, value = (torch.randn(1, frames * 6, heads, 64) for heads in (4, 2, 2))
    turn, logit_scale = frame_turns(range(frames), range(frames), head_dim=64, policy="flex")
    return query, key, value, turn, logit_scale, torch.randn(frames, frames)


def test_options_and_places_stay_in_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(Compiled(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Compiled(), compiled_args())
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.flexkern.frame_attention.default in targets
    args = compiled_args()
    for one in (compiled, exported.module()):
        torch.testing.assert_close(one(*args), Compiled()(*args))


def test_one_graph_serves_every_number_of_frames():
    torch._dynamo.reset()
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    compiled = torch.compile(Compiled(), fullgraph=True, dynamic=True, backend=backend)
    for frames in (5, 3, 7):
        args = compiled_args(frames)
        torch.testing.assert_close(compiled(*args), Compiled()(*args))
    assert len(graphs) == 1


def test_pages_and_slots_of_either_kind_stay_in_one_graph():
    torch._dynamo.reset()
    query, turn = torch.randn(1, 2, 4, 2, 64), frame_turns([5, 6], [4, 5, 6], head_dim=64)[0]
    pages = torch.randn(2, 1, 3, 4, 2, 64)
    call = lambda slots: flexkern.paged_attention(query, *pages, slots, turn, tokens=4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for slots in (torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1], dtype=torch.int32), [2, 0, 1]):
        torch.testing.assert_close(compiled(slots), call(slots))
