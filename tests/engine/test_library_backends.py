"""Backends over flash-attn and xformers, with stand-ins that check how they are called and compute with torch."""

import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flexkern import backends
from flexkern.kernels import reference as oracle
from flexkern.plan import ChunkPlan, make_plan, place_turns
from flexkern.policies import PositionPolicy
from flexkern.testing import assert_as_accurate

B, FRAMES, R, P, S, H, D = 2, 2, 3, 5, 7, 3, 64


def plan_of(**policy) -> ChunkPlan:
    policy = PositionPolicy(train_len=7, **policy)
    phases = policy.phases(query=[20, 21], visible=[0, 20, 21], bands=12, heads=H)
    return make_plan(phases, write_slots=[3, 1], read_slots=[4, 3, 1], place_turn=place_turns(1, S, D))


def inputs(dtype) -> list[torch.Tensor]:
    query, (keys, values) = torch.randn(B, FRAMES, S, H, D) * 2, torch.randn(2, B, P, S, H, D)
    keys[:, [0, 2]] = math.nan  # not listed
    return [x.to(dtype) for x in (query, keys, values)]


def by_torch(query, key, value, mask=None):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@pytest.fixture
def libraries(monkeypatch) -> SimpleNamespace:
    """The two packages as if they were installed, on a machine with a GPU; ``calls`` holds shapes they got."""
    calls = []

    def flash_attn_func(q, k, v):
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
        assert all(x.ndim == 4 and x.stride(-1) == 1 for x in (q, k, v))
        calls.append((q.shape, k.shape))
        return by_torch(q, k, v)

    def memory_efficient_attention(query, key, value, attn_bias=None):
        assert query.dtype == key.dtype == value.dtype and all(x.ndim == 4 for x in (query, key, value))
        if attn_bias is not None:  # what the CUTLASS operator of xformers asks of a tensor
            batch, rows, heads, _ = query.shape
            assert attn_bias.dtype == query.dtype and attn_bias.shape == (batch, heads, rows, key.shape[1])
            step = 16 // attn_bias.itemsize
            assert attn_bias.stride(-1) == 1 and all(stride % step == 0 for stride in attn_bias.stride()[:-1])
        calls.append((query.shape, key.shape))
        out = by_torch(query, key, value, attn_bias)
        if attn_bias is None:
            return out
        return out.masked_fill(attn_bias.isneginf().all(-1).transpose(1, 2)[..., None], math.nan)

    modules = {name: ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops")}
    modules["flash_attn"].flash_attn_func = flash_attn_func
    modules["xformers"].ops = modules["xformers.ops"]
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield SimpleNamespace(calls=calls)
    for name in ("flash_attn", "xformers"):  # they hold the stand-ins
        sys.modules.pop(f"flexkern.backends.{name}", None)
        vars(backends).pop(name, None)


@pytest.mark.parametrize(
    "policy", [{}, {"scale_schedule": "dynamic"}, {"mode": "jitter"}, {"logit_temp": 0.5}], ids=str
)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flash-attn", torch.bfloat16),
        ("flash-attn", torch.float16),
        ("xformers", torch.bfloat16),
        ("xformers", torch.float32),
    ],
)
def test_a_library_computes_what_sdpa_does(libraries, name, dtype, policy):
    plan, args = plan_of(**policy), inputs(dtype)
    actual = backends.get_backend(name, "cuda").frame_attention(*args, plan)
    entitled = backends.get_backend("sdpa").frame_attention(*args, plan)
    wide = (x.double() for x in args)
    exact, _ = oracle.frame_attention(*wide, plan.read_slots, plan.turn, plan.logit_scale)
    assert actual.dtype == dtype
    assert_as_accurate(actual, exact, entitled)
    calls = len(plan.key_turn)
    assert libraries.calls == [((B, FRAMES // calls * S, H, D), (B, R * S, H, D))] * calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_xformers_takes_a_bias(libraries, dtype):
    bias = torch.tensor([[0.5, -math.inf, -1.0], [-math.inf] * 3])
    plan, args = replace(plan_of(), bias=bias), inputs(dtype)
    actual = backends.get_backend("xformers").frame_attention(*args, plan)
    assert torch.equal(actual, backends.get_backend("sdpa").frame_attention(*args, plan))
    assert (actual[:, 1] == 0).all() and len(libraries.calls) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "message"),
    [
        ("flash-attn", torch.float32, 64, "'flash-attn' takes float16 or bfloat16, got torch.float32"),
        ("flash-attn", torch.float16, 288, "'flash-attn' takes head dims to 256, got 288"),
        ("xformers", torch.float64, 64, "'xformers' takes float32, float16 or bfloat16, got torch.float64"),
        ("xformers", torch.float16, 20, "'xformers' takes head dims that are multiples of 8, got 20"),
    ],
)
def test_what_a_library_cannot_do_is_said(libraries, name, dtype, dim, message):
    query, pages = torch.zeros(1, FRAMES, S, H, dim, dtype=dtype), torch.zeros(1, P, S, H, dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        backends.get_backend(name).frame_attention(query, pages, pages, plan_of())
    assert not libraries.calls


def test_flash_attn_refuses_a_bias(libraries):
    plan = replace(plan_of(), bias=torch.zeros(FRAMES, R))
    with pytest.raises(NotImplementedError, match="'flash-attn' takes no bias: use backend 'triton', 'sdpa' or 'xf"):
        backends.get_backend("flash-attn").frame_attention(*inputs(torch.float16), plan)


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_a_library_needs_a_gpu(libraries, name, monkeypatch):
    assert backends.why_not(name) is None and backends.why_not(name, "cuda:0") is None
    with pytest.raises(ValueError, match=f"{name!r} is not there: it needs tensors on a CUDA GPU, got device 'cpu'"):
        backends.get_backend(name, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.why_not(name) == "it needs a CUDA GPU"


def test_nothing_is_imported_before_it_is_asked_for(libraries):
    backends.get_backend("sdpa")
    assert not {"flexkern.backends.flash_attn", "flexkern.backends.xformers"} & set(sys.modules)
