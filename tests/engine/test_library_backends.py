"""Backends over flash-attn and xformers, with stand-ins that check how they are called and compute with torch."""

import importlib
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flexkern import backends
from flexkern.backends import generations
from flexkern.backends.generations import GENERATIONS
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


def check_layout(query, key, value, softmax_scale, causal):
    """What every FlashAttention asks of its arguments, and what ours must be."""
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert all(x.ndim == 4 and x.stride(-1) == 1 for x in (query, key, value)) and key.shape == value.shape
    assert (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:]), "[B, tokens, H, D]"
    assert softmax_scale == query.shape[-1] ** -0.5 and causal is False


def flash_attn_4(calls):
    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False):
        assert qv is gather_kv_indices is None
        check_layout(q, k, v, softmax_scale, causal)
        calls.append((4, q.shape, k.shape))
        return by_torch(q, k, v), None  # the log-sum-exp, which it returns where nobody asked

    return flash_attn_func


def flash_attn_3(calls):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None):
        assert qv is q_descale is None
        check_layout(q, k, v, softmax_scale, causal)
        calls.append((3, q.shape, k.shape))
        return by_torch(q, k, v)

    return flash_attn_func


def flash_attn_2(calls):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert dropout_p == 0.0 and window_size == (-1, -1)
        check_layout(q, k, v, softmax_scale, causal)
        calls.append((2, q.shape, k.shape))
        return by_torch(q, k, v)

    return flash_attn_func


STAND_INS = {4: flash_attn_4, 3: flash_attn_3, 2: flash_attn_2}


def stand_in_for_xformers(calls):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.dtype == key.dtype == value.dtype and all(x.ndim == 4 for x in (query, key, value))
        assert p == 0.0 and scale == query.shape[-1] ** -0.5 and op is None
        if attn_bias is not None:  # what the CUTLASS operator of xformers asks of a tensor
            batch, rows, heads, _ = query.shape
            assert attn_bias.dtype == query.dtype and attn_bias.shape == (batch, heads, rows, key.shape[1])
            step = 16 // attn_bias.itemsize
            assert attn_bias.stride(-1) == 1 and all(stride % step == 0 for stride in attn_bias.stride()[:-1])
        calls.append(("xformers", query.shape, key.shape))
        out = by_torch(query, key, value, attn_bias)
        if attn_bias is None:
            return out
        return out.masked_fill(attn_bias.isneginf().all(-1).transpose(1, 2)[..., None], math.nan)

    return memory_efficient_attention


@pytest.fixture
def libraries(monkeypatch) -> SimpleNamespace:
    """The packages as if installed, on a machine with a Hopper GPU.

    ``calls``: who was called, with which shapes. ``installed``: which FlashAttentions, ``broken``: which of them cannot
    be imported. ``capability``: of the GPU.
    """
    here = SimpleNamespace(calls=[], installed=[4, 3, 2], broken=[], capability=(9, 0))

    def import_module(name):
        (number,) = [number for number, generation in GENERATIONS.items() if generation.module == name]
        if number in here.broken:
            raise OSError(f"undefined symbol in {name}")
        return SimpleNamespace(flash_attn_func=STAND_INS[number](here.calls))

    monkeypatch.setattr(generations, "import_module", import_module)
    monkeypatch.setattr(generations, "installed", lambda: [GENERATIONS[number] for number in here.installed])
    modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops")}
    modules["xformers"].ops = modules["xformers.ops"]
    modules["xformers.ops"].memory_efficient_attention = stand_in_for_xformers(here.calls)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: here.capability)
    generations.choose.cache_clear()
    yield here
    generations.choose.cache_clear()
    sys.modules.pop("flexkern.backends.xformers", None)  # it holds the stand-in
    vars(backends).pop("xformers", None)


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
    who = 4 if name == "flash-attn" else name
    assert libraries.calls == [(who, (B, FRAMES // calls * S, H, D), (B, R * S, H, D))] * calls


@pytest.mark.parametrize(
    ("capability", "installed", "takes"),
    [
        ((9, 0), [4, 3, 2], 4),
        ((9, 0), [3, 2], 3),
        ((9, 0), [2], 2),
        ((10, 0), [4, 3, 2], 4),
        ((10, 0), [3, 2], 2),
        ((12, 0), [4, 2], 4),
        ((8, 0), [4, 3, 2], 2),
        ((8, 9), [4, 3], 4),
    ],
    ids=str,
)
def test_flash_attn_is_the_best_that_the_gpu_runs(libraries, capability, installed, takes):
    libraries.capability, libraries.installed = capability, installed
    plan, args = plan_of(), inputs(torch.bfloat16)
    backend = backends.get_backend("flash-attn", "cuda")
    entitled = backends.get_backend("sdpa").frame_attention(*args, plan)
    assert torch.equal(backend.frame_attention(*args, plan), entitled), "called with what sdpa gets, and no mask"
    assert [who for who, *_ in libraries.calls] == [takes]
    assert backend.describe().startswith(f"FlashAttention-{takes} ({GENERATIONS[takes].distribution}")
    assert backends.describe("flash-attn") == f"{backends.BACKENDS['flash-attn']}: {backend.describe()}"


def test_a_broken_flash_attn_is_passed_over_and_named(libraries):
    libraries.broken = [4]
    backends.get_backend("flash-attn").frame_attention(*inputs(torch.float16), plan_of())
    assert [who for who, *_ in libraries.calls] == [3]
    said = backends.describe("flash-attn")
    assert "cannot import FlashAttention-4 (flash-attn-4): OSError: undefined symbol in flash_attn.cute" in said


@pytest.mark.parametrize(
    ("installed", "broken", "capability", "message"),
    [
        ([], [], (9, 0), "the package flash-attn is not installed"),
        ([3], [], (10, 0), r"capability 10.0 runs FlashAttention-4 or FlashAttention-2, and there is FlashAttention-3"),
        (
            [4, 2],
            [4, 2],
            (12, 0),
            r"12.0 runs .*, and there is FlashAttention-4 .*: OSError: .*; FlashAttention-2 .*",
        ),
        ([4, 3, 2], [], (7, 5), r"capability 7.5 runs no FlashAttention, and there is FlashAttention-4"),
    ],
)
def test_where_no_flash_attn_runs_it_is_said_why(libraries, installed, broken, capability, message):
    libraries.installed, libraries.broken, libraries.capability = installed, broken, capability
    with pytest.raises(ValueError, match=f"backend 'flash-attn' is not there: .*{message}"):
        backends.get_backend("flash-attn")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], []),
        (["flash_attn/cute/__init__.py"], [4]),
        (["flash_attn/__init__.py"], [2]),
        (["flash_attn/__init__.py", "flash_attn/cute/__init__.py"], [4, 2]),
        (["flash_attn_interface.py"], [3]),
        (["flash_attn_interface.py", "flash_attn/cute/__init__.py"], [4, 3]),
    ],
    ids=str,
)
def test_what_is_installed_is_seen_without_importing_it(files, found, tmp_path, monkeypatch):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert [generation.number for generation in generations.installed()] == found


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
        ("flash-attn", torch.float16, 288, "'flash-attn' takes head dims to 256 that are multiples of 8, got 288: it"),
        ("flash-attn", torch.float16, 20, "'flash-attn' takes head dims to 256 that are multiples of 8, got 20: it"),
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
    assert "flexkern.backends.xformers" not in sys.modules and not generations.choose.cache_info().currsize


def test_flash_attn_4_is_narrower_on_blackwell(libraries):
    libraries.capability = (10, 0)
    query, pages = torch.zeros(1, FRAMES, S, H, 136).half(), torch.zeros(1, P, S, H, 136).half()
    with pytest.raises(NotImplementedError, match="takes head dims to 128 .*, got 136: it runs FlashAttention-4"):
        backends.get_backend("flash-attn").frame_attention(query, pages, pages, plan_of())
