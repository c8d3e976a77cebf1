import pytest
import torch
from tokens import DTYPES

from flexkern.kernels import reference
from flexkern.kernels.pages.norm_rope_write import norm_rope_write
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
SHAPES = [  # B, F, S, H, D, T
    (2, 2, 3, 5, 64, 12),
    (1, 1, 33, 5, 32, 4),
    (2, 1, 16, 1, 128, 22),
    (1, 3, 1, 12, 128, 22),
    (1, 1, 3, 40, 32, 0),
    (1, 1, 3, 40, 32, 16),
    (1, 2, 7, 11, 48, 8),
]
SMALL = SHAPES[0]
SPARE = 3  # pages more than frames


def make_inputs(shape, dtype, device, weight_dtype=None):
    batch, frames, tokens, heads, dim, time = shape
    size = torch.logspace(-4, 2, tokens, device=device)[:, None, None]
    query, key, value = (torch.randn(batch, frames, tokens, heads, dim, device=device) * size for _ in range(3))
    weights = (1 + 0.1 * torch.randn(2, heads * dim, device=device)).to(weight_dtype or dtype)
    angle = torch.rand(tokens, dim // 2 - time, dtype=torch.float64, device=device) * 40
    return {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "value": value.to(dtype),
        "query_weight": weights[0],
        "key_weight": weights[1],
        "place_turn": torch.stack((angle.cos(), angle.sin()), dim=-1).float(),
        "slots": torch.randperm(frames + SPARE, device=device)[:frames].int(),
    }


def run(fn, inputs, dtype, compute=None, **kwargs):
    """Query, key pages and value pages that fn leaves, the pages NaN before."""
    cast = lambda t: t.to(compute) if compute and t is not None and t.is_floating_point() else t
    batch, frames, *rest = inputs["key"].shape
    like = {"dtype": dtype, "device": inputs["key"].device}
    pages = [torch.full((batch, frames + SPARE, *rest), float("nan"), **like) for _ in "kv"]
    query = fn(**{name: cast(t) for name, t in inputs.items()}, key_pages=pages[0], value_pages=pages[1], **kwargs)
    return query, *pages


def check(inputs, page_dtype, **kwargs):
    dtype = inputs["key"].dtype
    actual = run(norm_rope_write, inputs, page_dtype, **kwargs)
    exact = run(reference.norm_rope_write, inputs, torch.float64, compute=torch.float64, **kwargs)
    entitled = run(reference.norm_rope_write, inputs, page_dtype, compute=torch.float32, **kwargs)
    written = inputs["slots"][inputs["slots"] >= 0].long()
    if inputs["query"] is not None:
        assert actual[0].dtype == dtype and actual[0].shape == inputs["query"].shape
        assert_as_accurate(actual[0], exact[0], entitled[0].to(dtype))
    for page in (1, 2):
        assert_as_accurate(actual[page][:, written], exact[page][:, written], entitled[page][:, written])
    unwritten = sorted(set(range(actual[1].shape[1])) - set(written.tolist()))
    assert all(page[:, unwritten].isnan().all() for page in actual[1:])
    if page_dtype == dtype:
        values = inputs["value"][:, inputs["slots"] >= 0]
        assert torch.equal(actual[2][:, written], values), "values are copied, not computed"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-F{}-S{}-H{}-D{}-T{}".format(*s))
def test_matches_oracle(shape, dtype, device):
    check(make_inputs(shape, dtype, device), dtype)


@pytest.mark.parametrize(
    ("dtype", "page_dtype", "weight_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=["fp32-to-bf16", "fp16-to-fp32", "bf16-with-fp32-weights"],
)
def test_pages_and_weights_may_have_another_dtype(dtype, page_dtype, weight_dtype, device):
    check(make_inputs((1, 1, 7, 15, 64, 12), dtype, device, weight_dtype), page_dtype)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.5])
def test_eps_counts(eps, device):
    check(make_inputs((1, 1, 7, 15, 64, 12), torch.float32, device), torch.float32, eps=eps)


def test_without_a_query_only_pages_are_written(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    _, *with_query = run(norm_rope_write, inputs, torch.float32)
    nothing, *without = run(norm_rope_write, inputs | {"query": None}, torch.float32)
    assert nothing is None
    check(inputs | {"query": None}, torch.float32)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(with_query, without, strict=True))


@DTYPES
@pytest.mark.parametrize("slots", [[-1, 2], [4, -1], [-1, -7]], ids=str)
def test_a_negative_slot_is_not_written(slots, dtype, device):
    inputs = make_inputs(SMALL, dtype, device)
    inputs["slots"] = torch.tensor(slots, dtype=torch.int32, device=device)
    if max(slots) >= 0:
        check(inputs, dtype)
    else:
        query, *pages = run(norm_rope_write, inputs, dtype)
        assert query.isfinite().all() and all(page.isnan().all() for page in pages)


def test_other_pages_stay_bitwise(device):
    inputs = make_inputs(SMALL, torch.bfloat16, device)
    batch, frames, *rest = inputs["key"].shape
    pages = torch.randn(2, batch, frames + SPARE, *rest, device=device).bfloat16()
    before = pages.clone()
    norm_rope_write(**inputs, key_pages=pages[0], value_pages=pages[1])
    written = inputs["slots"].long()
    others = [page for page in range(frames + SPARE) if page not in written.tolist()]
    assert torch.equal(pages[:, :, others], before[:, :, others])
    assert not torch.equal(pages[:, :, written], before[:, :, written])


@DTYPES
def test_zero_rows_stay_zero(dtype, device):
    inputs = make_inputs((1, 1, 3, 3, 64, 12), dtype, device)
    for name in ("query", "key", "value"):
        inputs[name][:, :, 1] = 0
    query, keys, values = run(norm_rope_write, inputs, dtype)
    slot = inputs["slots"].long()
    assert all((x[:, :, 1] == 0).all() for x in (query, keys[:, slot], values[:, slot]))


def test_permuted_slots_permute_the_pages_and_nothing_else(device):
    inputs = make_inputs(SMALL, torch.bfloat16, device)
    query, *pages = run(norm_rope_write, inputs, torch.bfloat16)
    flipped = inputs | {"slots": inputs["slots"].flip(0)}
    query_2, *pages_2 = run(norm_rope_write, flipped, torch.bfloat16)
    assert torch.equal(query, query_2)
    for page, page_2 in zip(pages, pages_2, strict=True):
        assert torch.equal(page[:, inputs["slots"].long()], page_2[:, flipped["slots"].long()])


def test_pages_may_lie_further_apart_than_32_bits_reach(device):
    inputs = make_inputs((1, 1, 1, 1, 32, 4), torch.bfloat16, device)
    inputs["slots"] = torch.tensor([4], dtype=torch.int32, device=device)
    try:  # 8 GiB, of which the CPU maps what is touched; an offset cut to 32 bits would land on page 0
        store = torch.empty(2**32 + 64, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("needs 8 GiB of address space or of GPU memory")
    pages = [store[start:].as_strided((1, 5, 1, 1, 32), (2**32, 2**30, 32, 32, 1)) for start in (0, 32)]
    for page in pages:
        page[:, [0, 4]] = float("nan")
    norm_rope_write(**inputs, key_pages=pages[0], value_pages=pages[1])
    assert all(page[:, 0].isnan().all() and page[:, 4].isfinite().all() for page in pages)


@DTYPES
@pytest.mark.parametrize("shape", [SMALL, (1, 3, 1, 12, 128, 22), (1, 1, 1, 3, 64, 12)], ids=str)
@pytest.mark.parametrize("names", [("query", "key", "value"), ("key", "value")], ids=len)
def test_views_out_of_one_product(names, shape, dtype, device):
    """What a block hands over: q, k and v side by side in one tensor, or k and v alone."""
    inputs = make_inputs(shape, dtype, device) | ({} if "query" in names else {"query": None})
    product = torch.cat([inputs[name].flatten(3) for name in names], dim=-1)
    views = [part.unflatten(-1, shape[3:5]) for part in product.chunk(len(names), dim=-1)]
    check(inputs | dict(zip(names, views, strict=True)), dtype)
    apart = run(norm_rope_write, inputs, dtype)
    together = run(norm_rope_write, inputs | dict(zip(names, views, strict=True)), dtype)
    for one, other in zip(apart, together, strict=True):
        assert (one is other is None) or torch.equal(one.nan_to_num(), other.nan_to_num())


def test_tokens_at_several_distances_are_refused(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    wide = torch.cat((inputs["key"], inputs["key"]), dim=-2)[..., :5, :]
    with pytest.raises(ValueError, match="must have their tokens at one even distance, got .*'key': 640"):
        run(norm_rope_write, inputs | {"key": wide}, torch.float32)
    gaps = torch.cat((inputs["value"], inputs["value"]), dim=2)[:, :, :3]
    repeated = inputs["query"][:, :1].expand(-1, 2, -1, -1, -1)
    odd = torch.cat([inputs["query"].flatten(3), inputs["query"][..., 0, :1]], dim=-1)[..., :-1].unflatten(3, (5, 64))
    for name, strided in (("value", gaps), ("query", repeated)):
        with pytest.raises(ValueError, match=f"^tokens of {name} must be contiguous and at one distance, got shape"):
            run(norm_rope_write, inputs | {name: strided}, torch.float32)
    with pytest.raises(ValueError, match="at one even distance"):
        run(norm_rope_write, inputs | {"query": odd, "key": odd, "value": odd}, torch.float32)


def test_strided_inputs_are_refused(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    for name in ("query", "key", "value"):
        strided = inputs[name].transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(ValueError, match=f"^tokens of {name} must be contiguous and at one distance, got shape"):
            run(norm_rope_write, inputs | {name: strided}, torch.float32)
    pages = torch.empty(2, 1, 1, *inputs["key"].shape[2:], device=device)
    keys = pages[0].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="^a page of key_pages must be contiguous"):
        norm_rope_write(**inputs, key_pages=keys, value_pages=pages[1])
    with pytest.raises(ValueError, match=r"key_pages and value_pages must have the same strides, got \(.*\) and \("):
        values = torch.empty(1, 2, *pages.shape[3:], device=device)[:, ::2]
        norm_rope_write(**inputs, key_pages=pages[0], value_pages=values)
