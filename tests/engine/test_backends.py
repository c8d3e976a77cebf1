"""Every backend against the float64 oracle, and what holds for any of them."""

import importlib
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flexkern import backends
from flexkern.backends import BACKENDS, get_backend, why_not
from flexkern.kernels import reference as oracle
from flexkern.plan import ChunkPlan, band_split, make_plan, place_turns
from flexkern.policies import PositionPolicy
from flexkern.testing import assert_as_accurate

B, F, R, P, S, H = 2, 3, 5, 7, 6, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if why := why_not(request.param, "cpu"):  # where these tests keep their tensors
        pytest.skip(f"backend {request.param}: {why}")
    return get_backend(request.param)


def plan_of(head_dim, *, visible=None, query=(20, 21, 22), slots=(4, 0, 6, 2, 5), **policy) -> ChunkPlan:
    visible = visible or [0, 1, *query]
    bands = band_split(head_dim)[0]
    phases = PositionPolicy(**policy).phases(query=list(query), visible=visible, bands=bands, heads=H)
    return make_plan(phases, write_slots=slots[-F:], read_slots=slots, place_turn=place_turns(2, 3, head_dim))


def inputs(head_dim, dtype):
    query = torch.randn(B, F, S, H, head_dim)
    keys, values = torch.randn(2, B, P, S, H, head_dim)
    return [x.to(dtype) for x in (query * 2, keys, values)]


def exact(query, keys, values, plan, dtype=torch.float64):
    wide = (x.to(dtype) for x in (query, keys, values))
    return oracle.frame_attention(*wide, plan.read_slots, plan.turn, plan.logit_scale, plan.bias)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "policy", [{}, {"scale_schedule": "dynamic"}, {"mode": "jitter"}, {"logit_temp": 0.5}], ids=str
)
def test_frame_attention_is_as_accurate_as_library_attention(backend, head_dim, policy, dtype):
    """Entitled to what a library attention costs: query and key each turned and rounded once, then a plain softmax."""
    plan = plan_of(head_dim, train_len=7, **policy)
    q, k, v = inputs(head_dim, dtype)
    k[:, [1, 3]] = math.nan  # not listed
    actual = backend.frame_attention(q, k, v, plan)
    truth = exact(q, k, v, plan)
    assert actual.dtype == dtype
    if dtype == torch.float32:
        assert_as_accurate(actual, truth, exact(q, k, v, plan, torch.float32), mean=2, worst=4)
    else:
        assert_as_accurate(actual, truth, separately_turned(q, k, v, plan).to(dtype), mean=1.5, worst=3)


def separately_turned(q, k, v, plan):
    """float32 attention on query and key that were turned and rounded apart."""
    outputs = []
    for f in range(F):
        turn = plan.key_turn[f % len(plan.key_turn)]
        query = oracle.rotate(q.float(), oracle.pad_turn(plan.query_turn, q.shape[-1] // 2)[:, None]).to(q.dtype)
        query = query * plan.logit_scale.to(q.dtype)[:, None, None, None]
        slots = plan.read_slots.long()
        keys = oracle.rotate(k[:, slots].float(), oracle.pad_turn(turn, q.shape[-1] // 2)[:, None]).to(k.dtype)
        still = torch.zeros(1, len(slots), 1, turn.shape[-2], 2)
        still[..., 0] = 1
        out, _ = oracle.frame_attention(
            query[:, f, None].float(), keys.float(), v[:, slots].float(), torch.arange(len(slots)), still, torch.ones(1)
        )
        outputs.append(out)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_rope_write_and_pointwise_round_once(backend, dtype):
    head_dim = 64
    x = torch.randn(3, B, F, S, H, head_dim).mul(torch.logspace(-3, 2, S)[:, None, None]).to(dtype)
    weights = (1 + 0.1 * torch.randn(2, H * head_dim)).to(dtype)
    place = place_turns(2, 3, head_dim)
    slots = torch.tensor([5, 1, 2], dtype=torch.int32)

    def run(fn, cast, store):
        pages = torch.full((2, B, P, S, H, head_dim), math.nan, dtype=store)
        out = fn(*x.to(cast), *weights.to(cast), place, *pages, slots, 1e-6)
        return out.to(store), pages[0][:, slots.long()]

    truth = run(oracle.norm_rope_write, torch.float64, torch.float64)
    entitled = run(oracle.norm_rope_write, torch.float32, dtype)
    for actual, expected, due in zip(run(backend.norm_rope_write, dtype, dtype), truth, entitled, strict=True):
        assert_as_accurate(actual, expected, due)

    tokens = x[0].flatten(-2)
    scale, shift = torch.randn(2, B, F, H * head_dim).to(dtype)
    for name, args in (
        ("rms_norm", (tokens, weights[0], 1e-6)),
        ("modulate", (tokens, scale, shift, 1e-6)),
    ):
        cast = lambda to, args=args: [a.to(to) if isinstance(a, torch.Tensor) else a for a in args]
        fn = getattr(oracle, name)
        actual = getattr(backend, name)(*args)
        assert_as_accurate(actual, fn(*cast(torch.float64)), fn(*cast(torch.float32)).to(dtype))
    for gate, offset, (one, other) in (
        (scale, 1.0, (shift, scale)),
        (None, 0.0, (shift, scale)),
        (scale, 0.0, [w.expand(B, F, -1) for w in weights]),  # an affine norm
    ):
        given = tokens, x[1].flatten(-2), gate, one, other
        cast = lambda to, given=given: [t if t is None else t.to(to) for t in given]
        actual = backend.add_modulate(*cast(dtype), 1e-6, offset)
        truth, due = (oracle.add_modulate(*cast(to), 1e-6, offset) for to in (torch.float64, torch.float32))
        for one, expected, entitled in zip(actual, truth, due, strict=True):
            assert_as_accurate(one, expected, entitled.to(dtype))


def test_physical_slots_do_not_matter(backend):
    q, k, v = inputs(64, torch.float32)
    order = torch.randperm(P)
    moved_k, moved_v = torch.empty_like(k), torch.empty_like(v)
    moved_k[:, order], moved_v[:, order] = k, v
    plan = plan_of(64)
    moved = replace(plan, read_slots=order[plan.read_slots.long()].int())
    assert torch.equal(backend.frame_attention(q, k, v, plan), backend.frame_attention(q, moved_k, moved_v, moved))


def test_a_page_may_be_seen_twice(backend):
    """As two pages of the same keys and values are: Rolling Sink shows a frame at two times where it turns back."""
    q, k, v = inputs(64, torch.float32)
    plan = plan_of(64)
    first, second = plan.read_slots[:2].tolist()
    k[:, second], v[:, second] = k[:, first], v[:, first]
    twice = plan.read_slots.clone()
    twice[1] = first
    again = backend.frame_attention(q, k, v, replace(plan, read_slots=twice))
    assert torch.equal(backend.frame_attention(q, k, v, plan), again)


def test_a_shift_of_all_positions_changes_nothing(backend):
    q, k, v = inputs(64, torch.float32)
    near = plan_of(64, query=(2, 3, 4), mode="none")
    far = plan_of(64, query=(10**7 + 2, 10**7 + 3, 10**7 + 4), visible=[10**7 + i for i in range(5)], mode="none")
    assert torch.equal(backend.frame_attention(q, k, v, near), backend.frame_attention(q, k, v, far))


def test_hidden_frames_weigh_nothing(backend):
    q, k, v = inputs(64, torch.float32)
    plan = plan_of(64)
    bias = torch.zeros(F, R)
    bias[:, 1] = -math.inf
    left = [0, 2, 3, 4]
    fewer = replace(plan, read_slots=plan.read_slots[left], turn=plan.turn[:, left], key_turn=plan.key_turn[:, left])
    hidden = backend.frame_attention(q, k, v, replace(plan, bias=bias))
    torch.testing.assert_close(hidden, backend.frame_attention(q, k, v, fewer))
    bias[2] = -math.inf
    assert (backend.frame_attention(q, k, v, replace(plan, bias=bias))[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flash", "no backend has that name"),
        ("flash-attn", "the package flash-attn is not installed"),
        ("xformers", "the package xformers is not installed"),
    ],
)
def test_an_absent_backend_says_what_is_there_and_why_not(name, why, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"'{name}' is not there: {why}. There is .*sdpa .+ reference"):
        get_backend(name)


@pytest.mark.triton(3, 4)
def test_triton_refuses_a_head_that_does_not_tile():
    q, k, v = inputs(48, torch.float32)
    with pytest.raises(NotImplementedError, match="take head dims that are powers of two from 16 on, got 48"):
        get_backend("triton").frame_attention(q, k, v, plan_of(48))


@pytest.mark.triton(3, 4)
def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"'triton' is not there: it needs a CUDA GPU \(TRITON_INTERPRET=1.+ There is sdpa"
    ):
        get_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("flexkern.kernels.gpus.arch_of", lambda device: 90)
    assert why_not("triton") is None and why_not("triton", "cuda:0") is None and why_not("sdpa", "cpu") is None
    with pytest.raises(ValueError, match="tensors on a CUDA GPU, got device 'cpu'"):
        get_backend("triton", "cpu")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert why_not("triton") == "the package triton is not installed"


def installed(monkeypatch, **contents):
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(**contents))


@pytest.mark.parametrize("version", ["2.3.1", "3.2.0", "3.3.1+gitabc", "3"])
def test_an_older_triton_is_named_and_nothing_else_needs_it(monkeypatch, version):
    """torch 2.6 and 2.7 bring 3.2 and 3.3: their module has a version, and neither knobs nor tensor descriptors."""
    installed(monkeypatch, __version__=version)
    told = rf"it needs Triton >= 3.4, and Triton {version.replace('+', '.')} is installed"
    with pytest.raises(ValueError, match=rf"^backend 'triton' is not there: {told}\. There is sdpa .+ reference"):
        get_backend("triton")
    assert get_backend("sdpa") is backends.sdpa and get_backend("reference") is backends.reference
    with pytest.raises(ValueError, match="'sdpaa' is not there: no backend .+ There is sdpa .+; did you mean 'sdpa'"):
        get_backend("sdpaa")


@pytest.mark.parametrize("version", ["3.4.0", "3.10.1", "4.0.0+gitabc"])
def test_a_newer_triton_will_do(monkeypatch, version):
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
    installed(monkeypatch, __version__=version, knobs=knobs)
    assert why_not("triton") is None


def test_a_triton_that_is_broken_stands_in_nobodys_way(monkeypatch):
    installed(monkeypatch)
    assert why_not("triton").startswith("Triton cannot be imported: ImportError: cannot import name '__version__'")
    assert get_backend("sdpa") is backends.sdpa


def test_the_kernels_say_which_triton_they_need(monkeypatch):
    """Whoever takes them without a backend, and whichever file is loaded first."""
    for name in [name for name in sys.modules if name.startswith("flexkern.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    language = SimpleNamespace(constexpr=None)
    old = SimpleNamespace(__version__="3.3.1", jit=lambda function: function, language=language)
    monkeypatch.setitem(sys.modules, "triton", old)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    import flexkern.kernels

    for name in flexkern.kernels.LAUNCHERS:
        with pytest.raises(ImportError, match="^the kernels need Triton >= 3.4, and Triton 3.3.1 is installed$"):
            getattr(flexkern.kernels, name)
    for folder in ("attention.portable", "pages.norm_rope_write", "pointwise.modulate"):
        with pytest.raises(ImportError, match="^the kernels need Triton >= 3.4, and Triton 3.3.1 is installed$"):
            importlib.import_module(f"flexkern.kernels.{folder}")
    with pytest.raises(ImportError, match="^path 'hopper' needs Triton >= 3.6, and Triton 3.3.1 is installed$"):
        flexkern.kernels.require_triton(flexkern.kernels.HOPPER, by="path 'hopper' needs")
