"""What the transformer saves, products, passes over memory and rows of padding, changes nothing that it computes."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexkern.backends import get_backend
from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.model.savings import fold_padding, products, stack
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.plan import band_split, make_plan, place_turns
from flexkern.policies import PositionPolicy
from flexkern.testing import assert_as_accurate

CONFIG = WanConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_len=256, text_dim=8, freq_dim=16
)
OPS = get_backend("sdpa")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = CausalWan(CONFIG).eval().requires_grad_(False)
    for block in made.blocks:
        for norm in (block.norm3, block.self_attn.norm_q, block.self_attn.norm_k, block.cross_attn.norm_k):
            nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(block.norm3.bias)
    nn.init.normal_(made.head.head.weight, std=0.1)
    return made


def paged(dtype=torch.float32):
    cache = FrameCache(layers=3, batch=1, pages=4, tokens=6, heads=2, head_dim=32, dtype=dtype)
    phases = PositionPolicy(mode="none").phases(query=[0, 1], visible=[0, 1], bands=band_split(32)[0], heads=2)
    slots = cache.allocate([0, 1])
    plan = make_plan(phases, write_slots=slots, read_slots=cache.slots, place_turn=place_turns(2, 3, 32))
    return PagedMemory(cache, plan, OPS)


def text_of(rows, length=256, batch=1):
    text = torch.zeros(batch, length, CONFIG.text_dim)
    text[:, :rows] = torch.randn(batch, rows, CONFIG.text_dim)
    return text


def plain_forward(model, latents, timesteps, text, memory):
    """Every product, norm, sum and row of its own, as the formulas in wan.py say it."""
    x = model.patchify(latents)
    time, projected = model.embed_time(timesteps)
    embedded = model.text_embedding(text)
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=CONFIG.eps)
    rms = lambda x, w: x * x.square().mean(-1, keepdim=True).add(CONFIG.eps).rsqrt() * w
    for block in model.blocks:
        shift, scale, gate, shift_2, scale_2, gate_2 = (block.modulation[:, None] + projected)[:, :, :, None].unbind(2)
        attn, cross = block.self_attn, block.cross_attn
        h = norm(x) * (1 + scale) + shift
        heads = [linear(h).unflatten(-1, (2, -1)) for linear in (attn.q, attn.k, attn.v)]
        y = memory.attend(block.index, *heads, (attn.norm_q.weight, attn.norm_k.weight))
        x = x + gate * attn.o(y.flatten(-2))
        q = rms(cross.q(block.norm3(x)), cross.norm_q.weight).flatten(1, 2)
        k, v = rms(cross.k(embedded), cross.norm_k.weight), cross.v(embedded)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(32)).softmax(-1)
        x = x + cross.o((weights @ v).transpose(1, 2).flatten(2).view_as(x))
        x = x + gate_2 * block.ffn(norm(x) * (1 + scale_2) + shift_2)
    shift, scale = (model.head.modulation[:, None] + time[:, :, None])[:, :, :, None].unbind(2)
    return model.unpatchify(model.head.head(norm(x) * (1 + scale) + shift), *latents.shape[-2:])


@torch.inference_mode()
@pytest.mark.parametrize("rows", [5, 100, 256])
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_a_forward_is_the_formulas(model, stacked, rows):
    latents, timesteps, text = torch.randn(1, 2, 4, 4, 6), torch.tensor([[900.0, 300.0]]), text_of(rows)
    expected = plain_forward(model, latents, timesteps, text, memory := paged())
    if stacked:
        model.stack_products()
    other = paged()
    out = model(latents, timesteps, model.text_keys(text, OPS), other)
    assert expected.std() > 0.05
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.cache.keys[:, :, :2], memory.cache.keys[:, :, :2], atol=1e-5, rtol=1e-5)
    clean = paged()
    model(latents, timesteps, model.text_keys(text, OPS), clean, keys_only=True)
    torch.testing.assert_close(clean.cache.values[:, :, :2], memory.cache.values[:, :, :2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_it_is_as_accurate_as_the_formulas_step_by_step(model):
    half = deepcopy(model).bfloat16()
    exact = deepcopy(half).double()
    latents, timesteps, text = torch.randn(1, 2, 4, 4, 6), torch.tensor([[900.0, 300.0]]), text_of(40)
    cast = lambda dtype: (latents.to(dtype), timesteps, text.bfloat16().to(dtype))
    truth = plain_forward(exact, *cast(torch.float64), paged(torch.float64))
    entitled = plain_forward(half, *cast(torch.bfloat16), paged(torch.bfloat16))
    half.stack_products()
    actual = half(latents, timesteps, half.text_keys(text, OPS), paged(torch.bfloat16))
    error = lambda x: (x.double() - truth).abs().mean() / truth.abs().mean()
    assert error(actual) <= 1.1 * error(entitled), (error(actual), error(entitled))


def linears(*sizes, bias=True):
    return [nn.Linear(6, size, bias=bias).requires_grad_(False) for size in sizes]


def called(parts, x, monkeypatch):
    """What ``products`` gives, and how many linear products it took."""
    counted = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: counted.append(1) or linear(*arguments))
    found = products(parts, x)
    monkeypatch.undo()
    return found, len(counted)


def test_stacked_layers_are_one_product_of_the_same_parameters(monkeypatch):
    parts, x = linears(4, 6, 2), torch.randn(3, 6)
    before = [(part.weight.clone(), part.bias.clone()) for part in parts]
    expected, count = called(parts, x, monkeypatch)
    assert count == 3
    stack(parts)
    found, count = called(parts, x, monkeypatch)
    assert count == 1
    for one, other, part, (weight, bias) in zip(found, expected, parts, before, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(part.weight, weight) and torch.equal(part.bias, bias)
    lying = [part.weight.data_ptr() for part in parts]
    stack(parts)
    assert [part.weight.data_ptr() for part in parts] == lying, "those that lie together stay there"
    some, count = called(parts[1:], x, monkeypatch)
    assert count == 1 and torch.equal(some[0], products(parts[1:], x)[0])
    torch.testing.assert_close(some[1], expected[2])
    parts[1].weight.mul_(2.0)  # merged into where it lies
    torch.testing.assert_close(products(parts, x)[1], parts[1](x))


@pytest.mark.parametrize("seen_by", ["a hook", "another class", "training", "another order", "a new weight", "a move"])
def test_layers_that_somebody_looks_at_are_called(seen_by, monkeypatch):
    parts, x = linears(4, 4, 4), torch.randn(3, 6)
    stack(parts)
    if seen_by == "a hook":
        parts[1].register_forward_hook(lambda module, args, out: out + 1)
    elif seen_by == "another class":
        parts[1] = nn.Sequential(parts[1], nn.ReLU())
    elif seen_by == "training":
        parts[2].requires_grad_()
    elif seen_by == "another order":
        parts = [parts[0], parts[2], parts[1]]
    elif seen_by == "a new weight":
        parts[1].weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    else:
        parts = [part.double() for part in parts]
        x = x.double()
    found, count = called(parts, x, monkeypatch)
    assert count == 3
    assert all(torch.equal(one, part(x)) for one, part in zip(found, parts, strict=True))


def test_parameters_of_inference_mode_stay_where_they_are(monkeypatch):
    with torch.inference_mode():
        parts = linears(4, 4)
        stack(parts)
        assert called(parts, torch.randn(3, 6), monkeypatch)[1] == 2


def test_a_stacked_model_saves_and_loads_as_before(model, tmp_path):
    from safetensors.torch import load_file, save_file

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.stack_products()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    after = load_file(tmp_path / "w.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    attn = model.blocks[1].self_attn
    with torch.inference_mode():
        query, *_ = products(attn.qkv, torch.ones(1, 64))
        torch.testing.assert_close(query, attn.q(torch.ones(1, 64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 60, 61, 62, 180, 189])
def test_folded_padding_weighs_what_it_weighed(rows, dtype):
    text, bias = fold_padding(text_of(rows), dtype)
    kept = text.shape[1]
    assert kept in (64, 128, 192) and rows + 3 <= kept and bias.shape == (1, 1, 1, kept) and bias.dtype == dtype
    assert bias.isfinite().all() and (bias[..., :rows] == 0).all()
    assert bias[..., rows:].double().exp().sum().item() == pytest.approx(256 - rows, rel=1e-6)


def test_padding_is_folded_up_to_the_longest_prompt_and_only_where_it_pays():
    text = text_of(20, batch=2)
    text[1, 20:70] = torch.randn(50, CONFIG.text_dim)
    folded, bias = fold_padding(text, torch.float32)
    assert folded.shape == (2, 128, CONFIG.text_dim) and (bias[..., :70] == 0).all()
    for full in (text_of(190), text_of(256), text_of(3, length=64), text_of(3, length=8)):
        assert len(fold_padding(full, torch.float32)) == 1
    repeated = torch.randn(1, 1, 8).expand(1, 256, 8)  # whatever the last row is
    assert fold_padding(repeated, torch.float32)[0].shape[1] == 64


def test_with_gradients_nothing_is_folded(model):
    assert [x.shape[1] for x in model.text_keys(text_of(5), OPS)[0]] == [256, 256]
    with torch.no_grad():
        assert [x.shape[-1 if i == 2 else 1] for i, x in enumerate(model.text_keys(text_of(5), OPS)[0])] == [64] * 3


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "calls"), [(torch.bfloat16, 1), (torch.float32, 0)], ids=str)
def test_gelu_is_part_of_the_first_product_in_16_bits(model, monkeypatch, dtype, calls):
    """The call that a GPU gets, made on a CPU, whose GELU is another approximation."""
    block, h, counted = model.blocks[0].to(dtype), torch.randn(1, 2, 40, 64).to(dtype), []
    expected, fused = block.ffn(h), torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *x, **options: counted.append(1) or fused(*x, **options))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = block.feed_forward(h)
    monkeypatch.undo()
    assert len(counted) == calls and found.shape == h.shape and found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=0.01 if calls else 0.0, rtol=0.01 if calls else 0.0)


@pytest.mark.gpu
def test_gelu_in_the_first_product_on_a_gpu(model):
    block = model.blocks[0].cuda().bfloat16()
    h = torch.randn(1, 2, 40, 64, device="cuda").mul(3).bfloat16()
    with torch.inference_mode():
        exact = deepcopy(block).double().ffn(h.double())
        assert_as_accurate(block.feed_forward(h), exact, block.ffn(h))
