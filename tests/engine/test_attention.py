"""flexkern.attention and its paged neighbour: right, one operator under torch.compile and export, clear errors."""

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flexkern
from flexkern import functional
from flexkern.functional import frame_turns
from flexkern.kernels import reference
from flexkern.policies import PositionPolicy, get_preset
from flexkern.testing import assert_as_accurate

ROOT = Path(__file__).parent.parent.parent
B, FRAMES, R, P, S, H, D, T = 2, 3, 4, 6, 5, 2, 64, 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def turn_of(groups=1, frames=FRAMES, read=R) -> torch.Tensor:
    angle = torch.rand(frames, read, groups, T, dtype=torch.float64) * 40
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def paged_inputs(dtype=torch.float32, groups=1, bias=False) -> dict:
    """Arguments of paged_attention; pages that no slot names hold NaN."""
    slots = torch.tensor([4, 0, 5, 2], dtype=torch.int32)
    pages = torch.full((2, B, P, S, H, D), math.nan)
    pages[:, :, slots.long()] = torch.randn(2, B, R, S, H, D)
    hidden = torch.zeros(FRAMES, R)
    hidden[0, 2] = hidden[1] = -math.inf
    return dict(
        query=(torch.randn(B, FRAMES, S, H, D) * 2).to(dtype), key_pages=pages[0].to(dtype),
        value_pages=pages[1].to(dtype), slots=slots, turn=turn_of(groups), logit_scale=0.5 + torch.rand(FRAMES),
        bias=torch.randn(FRAMES, R) + hidden if bias else None,
    )  # fmt: skip


def flat_inputs(dtype=torch.float32, device="cpu", frames=FRAMES, read=R) -> list[torch.Tensor]:
    query, key, value = (torch.randn(B, n * S, H, D) for n in (frames, read, read))
    return [x.to(device, dtype) for x in (query * 2, key, value)]


def exact(inputs: dict, dtype=torch.float64) -> torch.Tensor:
    return reference.frame_attention(**{k: v.to(dtype) if is_real(v) else v for k, v in inputs.items()})[0]


def is_real(x) -> bool:
    return x is not None and x.is_floating_point()


def keys_turned_apart(inputs: dict) -> torch.Tensor:
    """What a library attention is entitled to: query scaled and keys turned in float32, each rounded to the dtype."""
    dtype, slots = inputs["query"].dtype, inputs["slots"].long()
    query = (inputs["query"] * inputs["logit_scale"][:, None, None, None]).to(dtype).float()
    still = torch.tensor([1.0, 0.0]).expand(1, R, 1, T, 2)
    outputs = []
    for f in range(FRAMES):
        turn = reference.pad_turn(inputs["turn"][f] * torch.tensor([1.0, -1.0]), D // 2)[:, None]
        keys = reference.rotate(inputs["key_pages"][:, slots].float(), turn).to(dtype).float()
        values = inputs["value_pages"][:, slots].float()
        bias = None if inputs["bias"] is None else inputs["bias"][f, None].to(dtype)
        outputs.append(
            reference.frame_attention(query[:, f, None], keys, values, torch.arange(R), still, torch.ones(1), bias)[0]
        )
    return torch.cat(outputs, dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "bias"), [(1, False), (H, True)])
def test_paged_attention_is_as_accurate_as_library_attention(groups, bias, dtype, device):
    inputs = paged_inputs(dtype, groups, bias)
    actual = flexkern.paged_attention(**{k: x if x is None else x.to(device) for k, x in inputs.items()}).cpu()
    entitled = exact(inputs, torch.float32) if dtype == torch.float32 else keys_turned_apart(inputs)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_as_accurate(actual, exact(inputs), entitled, mean=2, worst=4)
    assert not bias or (actual[:, 1] == 0).all()


@pytest.mark.triton(3, 4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_implementation_is_the_kernel(dtype, device):
    inputs = paged_inputs(dtype, bias=True)
    actual = functional.operator.on_cuda(*(x if x is None else x.to(device) for x in inputs.values())).cpu()
    assert_as_accurate(actual, exact(inputs), keys_turned_apart(inputs), mean=2, worst=4)
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("flexkern::frame_attention", key)


def test_attention_is_plain_attention_where_nothing_turns(device):
    inputs = flat_inputs(device=device)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    still = torch.tensor([1.0, 0.0], device=device).expand(FRAMES, R, 1, T, 2)
    turned = dict(turn=still, pairs="split")
    for options in (dict(tokens=S), turned, dict(bias=torch.full((FRAMES, R), 3.0, device=device))):
        torch.testing.assert_close(flexkern.attention(*inputs, **options), plain, atol=1e-5, rtol=1e-5)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    torch.testing.assert_close(flexkern.attention(*strided, tokens=S), plain, atol=1e-5, rtol=1e-5)
    scaled = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), scale=0.7 / D**0.5).transpose(1, 2)
    assert_close = torch.testing.assert_close
    assert_close(flexkern.attention(*inputs, tokens=S, logit_scale=0.7), scaled, atol=1e-5, rtol=1e-5)


def test_interleaved_pairs_give_what_split_ones_do():
    query, key, value = flat_inputs()
    turn = turn_of(H)
    split = flexkern.attention(
        reference.split_pairs(query), reference.split_pairs(key), value, turn=turn, pairs="split"
    )
    torch.testing.assert_close(flexkern.attention(query, key, value, turn=turn, pairs="interleaved"), split)
    assert not torch.allclose(flexkern.attention(query, key, value, turn=turn, pairs="split"), split, atol=1e-2)


@pytest.mark.parametrize(
    "policy", ["flex", get_preset("longlive"), PositionPolicy(mode="jitter", logit_temp=0.3)], ids=str
)
def test_positions_turn_query_and_key_as_the_policy_says(policy):
    """Against a query turned by its own angle, keys by theirs, and attention that knows nothing of time."""
    query, key, value = (x.double() for x in flat_inputs(frames=2, read=3))
    at, seen = [40, 41], [0, 40, 41]
    position = policy if isinstance(policy, PositionPolicy) else get_preset(policy).position
    phases = position.phases(query=at, visible=seen, bands=T, heads=H)
    assert len(phases.key) == 1

    def turned(x, angle):
        angle = torch.from_numpy(angle)
        turn = reference.pad_turn(torch.stack((angle.cos(), angle.sin()), dim=-1), D // 2)
        return reference.rotate(x.unflatten(1, (-1, S)), turn[:, None]).flatten(1, 2)

    scale = torch.from_numpy(phases.logit_scale).repeat_interleave(S)[:, None, None]
    heads_first = (turned(query, phases.query) * scale, turned(key, phases.key[0]), value)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads_first)).transpose(1, 2)
    inputs = [x.float() for x in (query, key, value)]
    actual = flexkern.attention(*inputs, query_frames=at, key_frames=seen, policy=policy, pairs="split")
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    half = flexkern.attention(*inputs, query_frames=at, key_frames=seen, policy=policy, pairs="split", logit_scale=0.5)
    turn, logit_scale = frame_turns(at, seen, head_dim=D, heads=H, policy=policy)
    assert torch.equal(half, flexkern.attention(*inputs, turn=turn, logit_scale=logit_scale * 0.5, pairs="split"))


@pytest.mark.parametrize(
    ("groups", "bias", "frames", "dtype"), [(1, False, 1, torch.float32), (H, True, FRAMES, torch.bfloat16)]
)
def test_opcheck(groups, bias, frames, dtype, device):
    inputs = paged_inputs(dtype, groups, bias)
    inputs["key_pages"], inputs["value_pages"] = (inputs[k].nan_to_num() for k in ("key_pages", "value_pages"))
    inputs["query"] = inputs["query"][:, :frames].contiguous()
    for name in ("turn", "logit_scale", "bias"):
        inputs[name] = None if inputs[name] is None else inputs[name][:frames]
    args = [x if x is None else x.to(device) for x in inputs.values()]
    torch.library.opcheck(torch.ops.flexkern.frame_attention.default, args)


def test_the_result_lies_as_the_fake_says():
    inputs = flat_inputs(frames=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # leaves heads before tokens
        assert flexkern.attention(*inputs, tokens=S).is_contiguous()


class Attention(torch.nn.Module):
    def forward(self, query, key, value, turn, bias):
        return flexkern.attention(query + 1, key, value, turn=turn, bias=bias, pairs="interleaved") * 2


def test_compile_keeps_one_graph(device):
    torch._dynamo.reset()
    args = [*flat_inputs(device=device), turn_of().to(device), torch.randn(FRAMES, R, device=device)]
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), Attention()(*args))


def test_compile_with_dynamic_shapes_serves_every_length():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend=count)
    for frames, read in ((6, 7), (3, 9), (4, 11)):
        args = [*flat_inputs(frames=frames, read=read), turn_of(frames=frames, read=read), torch.randn(frames, read)]
        torch.testing.assert_close(compiled(*args), Attention()(*args))
    assert len(graphs) == 1 and torch.ops.flexkern.frame_attention in graphs[0]


def test_export_holds_the_operator():
    args = (*flat_inputs(), turn_of(), torch.randn(FRAMES, R))
    exported = torch.export.export(Attention(), args)
    assert torch.ops.flexkern.frame_attention.default in [node.target for node in exported.graph.nodes]
    torch.testing.assert_close(exported.module()(*args), Attention()(*args))


FAR = dict(query_frames=[5000, 5001, 5900], key_frames=[0, 1, 2, 5900], policy="flex", pairs="split")


@pytest.mark.parametrize("is_causal", [False, True])
def test_positions_inside_compile_are_those_of_the_host(is_causal):
    """Traced, NumPy's float64 would become torch's, and distances of thousands of frames would be off by 1e-4."""
    torch._dynamo.reset()
    call = lambda *x: flexkern.attention(*x, **FAR, is_causal=is_causal) + 1
    args = flat_inputs()
    assert torch.compile(call, backend="eager")(*args).equal(call(*args))
    turns = lambda: frame_turns([5000], [0], head_dim=D, policy="flex")
    for compiled, expected in zip(torch.compile(turns, backend="eager")(), turns(), strict=True):
        assert compiled.equal(expected)


def test_positions_inside_one_graph_are_refused():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: flexkern.attention(*x, **FAR), fullgraph=True, backend="eager")
    tells = "reason" in inspect.signature(torch.compiler.disable).parameters
    with pytest.raises(Exception, match="call frame_turns outside of torch.compile" if tells else "disable"):
        compiled(*flat_inputs())

    class Placed(torch.nn.Module):
        def forward(self, *args):
            return flexkern.attention(*args, **FAR)

    with pytest.raises(NotImplementedError, match="call frame_turns outside of torch.export and pass turn"):
        torch.export.export(Placed(), tuple(flat_inputs()), strict=False)


QUERY, KEY, VALUE = (torch.zeros(B, n * S, H, D) for n in (FRAMES, R, R))


TURN = {"turn": turn_of(), "pairs": "split"}
PLACED = {"query_frames": [1, 2, 3], "key_frames": [1, 2, 3, 4], "pairs": "split"}
ONES = {"query_frames": [1], "key_frames": [1], "pairs": "split"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"query": QUERY[0]}, ValueError, r"query must be \[B, F \* S, H, D\], not empty, got \[15, 2, 64\]"),
        ({"key": KEY[:, :0]}, ValueError, r"key must be \[B, R \* S, H, D\], not empty, got \[2, 0, 2, 64\]"),
        ({"key": KEY.half()}, ValueError, "key must be torch.float32 on cpu as query is, got torch.float16 on cpu"),
        ({"value": VALUE.to("meta")}, ValueError, "value must be torch.float32 on cpu .+ got torch.float32 on meta"),
        ({"key": KEY[..., :1, :]}, ValueError, r"key must have B, H and D .+ got \[2, 20, 1, 64\].+ enable_gqa=True"),
        ({"key": KEY[:, :15, :1]}, ValueError, r"if heads come first, pass x.transpose\(1, 2\) of each"),
        ({"key": KEY.repeat(1, 1, 2, 1)}, ValueError, r"B, H and D of query .+ got \[2, 20, 4, 64\]$"),
        ({"key": KEY.repeat(1, 1, 2, 1), "enable_gqa": True}, ValueError, "heads must divide those of query$"),
        ({"key": KEY[..., :32]}, ValueError, r"key must have B, H and D of query .+ got \[2, 20, 2, 32\]"),
        ({"value": VALUE[:, :5]}, ValueError, r"value must have the shape of key.+ got \[2, 5, 2, 64\]"),
        ({"query": QUERY.clone().requires_grad_()}, NotImplementedError, "query requires a gradient.+torch.no_grad"),
        ({"query": QUERY.to_sparse()}, NotImplementedError, "query must be a dense tensor.+ torch.sparse_coo"),
        ({"tokens": None}, ValueError, "tokens must be given"),
        ({"tokens": 4}, ValueError, "whole frames of 4 tokens each, got 15 and 20 tokens"),
        ({"tokens": 0}, ValueError, "tokens must be an integer of at least 1, got 0"),
        ({"tokens": 5.0}, ValueError, "tokens must be an integer of at least 1, got 5.0"),
        ({"pairs": "wan"}, ValueError, "pairs must be 'interleaved' .+ or 'split' .+, got 'wan'"),
        (PLACED | {"pairs": None}, ValueError, "pairs must be given .+'interleaved' .pair by pair.+ or 'split'"),
        ({"turn": turn_of()}, ValueError, "pairs must be given .+'interleaved' .pair by pair.+ or 'split'"),
        ({"query_frames": [1, 2, 3]}, ValueError, "query_frames and key_frames go together"),
        (ONES | TURN, ValueError, "either turn or query_frames"),
        (ONES, ValueError, "query and key must hold 1 and 1 frames of 5 tokens each, got 15 and 20 tokens$"),
        (ONES | {"tokens": None}, ValueError, "hold 1 and 1 frames of one number of tokens each, got 15 and 20 tokens"),
        (PLACED | {"query_frames": [1.0]}, TypeError, r"query_frames must list integers.+, got \[1.0\]"),
        (PLACED | {"query_frames": 3}, TypeError, "query_frames must list integers.+, got 3"),
        (PLACED | {"key_frames": torch.ones(2, 2).long()}, TypeError, "key_frames must list integers"),
        (PLACED | {"key_frames": torch.ones(2).bool()}, TypeError, "key_frames must list integers"),
        (PLACED | {"key_frames": [0, -1]}, ValueError, r"key_frames must list .+ frames in time, >= 0.+ got \[0, -1\]"),
        (PLACED | {"key_frames": ()}, ValueError, "key_frames must list .+, >= 0 and at least one"),
        (PLACED | {"policy": "flux"}, ValueError, "no preset 'flux'.+did you mean 'flex'"),
        (PLACED | {"policy": ""}, ValueError, "no preset ''"),
        (PLACED | {"policy": get_preset("flex").retention}, TypeError, "policy must be .+, got SinkWindow"),
        (PLACED | {"target": -1}, ValueError, "target must be an integer of at least 1, got -1"),
        ({"policy": "flux"}, ValueError, "no preset 'flux'"),
        ({"policy": "flex"}, ValueError, "policy needs query_frames and key_frames, got neither$"),
        ({"policy": "self-forcing"}, ValueError, "policy needs query_frames and key_frames"),
        (TURN | {"policy": "flex"}, ValueError, "policy needs .+ to make turn of it, pass it to frame_turns"),
        (TURN | {"policy": "flux"}, ValueError, "no preset 'flux'"),
        ({"target": 30}, ValueError, "target needs query_frames and key_frames"),
        ({"is_causal": True}, ValueError, "is_causal is by frame, and needs query_frames and key_frames.+pass bias"),
        (TURN | {"is_causal": True}, ValueError, "is_causal is by frame"),
        (PLACED | {"is_causal": True, "bias": torch.zeros(3, 3)}, ValueError, r"bias must be \[F, R\] = \[3, 4\], got"),
        ({"attn_mask": torch.ones(15, 20).bool()}, NotImplementedError, r"attn_mask is by token.+pass bias.+\[F, R\]"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
        (TURN | {"turn": turn_of(read=5)}, ValueError, "hold 3 and 5 frames of 5 tokens each, got 15 and 20 tokens"),
        (TURN | {"turn": turn_of(3)}, ValueError, r"turn must be \[F, R, 1 or H, T, 2\] = .+ got \[3, 4, 3, 12, 2\]"),
        (TURN | {"turn": turn_of()[0]}, ValueError, r"turn must be .+ got \[4, 1, 12, 2\]"),
        (TURN | {"turn": turn_of().double()}, ValueError, "turn must be torch.float32 on cpu, got torch.float64"),
        (TURN | {"turn": torch.ones(FRAMES, R, 1, 33, 2)}, ValueError, "T = 12, .+ or T = 32, .+ got T = 33"),
        (TURN | {"turn": turn_of()[:, :, :, :8]}, ValueError, "T = 12, the temporal pairs of head dim 64 .+ got T = 8"),
        ({"logit_scale": torch.ones(4)}, ValueError, r"logit_scale must be \[F\] = \[3\], got \[4\]"),
        ({"bias": torch.full((FRAMES, R), float("nan"))}, ValueError, "bias must be finite, or -inf to hide a frame"),
        ({"bias": torch.full((FRAMES, R), float("inf"))}, ValueError, r"bias must be finite, .+ got nan or \+inf"),
        (TURN | {"turn": turn_of() * float("nan")}, ValueError, "turn must be finite"),
        (TURN | {"logit_scale": torch.full((FRAMES,), float("inf"))}, ValueError, "logit_scale must be finite"),
        (TURN | {"logit_scale": [1.0] * FRAMES}, TypeError, r"logit_scale must be one number, or a .+ \[F\], got list"),
        (TURN | {"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, got nan"),
        (TURN | {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        (TURN | {"scale": "0.1"}, TypeError, "scale must be one number, got str: '0.1'"),
        ({"bias": torch.zeros(FRAMES, 3)}, ValueError, "hold 3 and 3 frames of 5 tokens each, got 15 and 20 tokens"),
        (TURN | {"bias": torch.zeros(FRAMES, 3)}, ValueError, r"bias must be \[F, R\] = \[3, 4\], got \[3, 3\]"),
        ({"bias": [[0.0]]}, TypeError, "bias must be a tensor, got list"),
        ({"bias": torch.zeros(FRAMES, R).half()}, ValueError, "bias must be torch.float32 on cpu, got torch.float16"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        flexkern.attention(**{"query": QUERY, "key": KEY, "value": VALUE, "tokens": S} | changes)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (lambda x: x.to("meta"), "query must be on a CPU or a CUDA GPU, got device 'meta'"),
        (lambda x: x.double(), "query must be float32, bfloat16 or float16, got torch.float64"),
        (lambda x: x[..., :63], "an even head dim of at most 128, the widest of the CUDA kernel, .+ got 63"),
        (lambda x: x.repeat(1, 1, 1, 3), "an even head dim of at most 128, .+ on every device, got 192"),
    ],
)
def test_what_is_not_supported_is_said(to, message):
    with pytest.raises(NotImplementedError, match=message):
        flexkern.attention(*(to(x) for x in (QUERY, KEY, VALUE)), tokens=S)


def test_errors_of_paged_attention():
    inputs = paged_inputs()
    call = lambda **changes: flexkern.paged_attention(**inputs | changes)
    with pytest.raises(ValueError, match=r"slots must be \[R\].+ = \[1\], got \[0\]"):
        call(slots=inputs["slots"][:0])
    with pytest.raises(ValueError, match="slots must be integers, got torch.float32"):
        call(slots=inputs["slots"].float())
    with pytest.raises(TypeError, match="slots must list integers, the indices of pages, got"):
        call(slots=["4", "0"])
    with pytest.raises(ValueError, match=r"slots must list indices of pages, >= 0 .+, got \[0, -1\]"):
        call(slots=[0, -1])
    with pytest.raises(ValueError, match="value_pages must be contiguous"):
        call(value_pages=inputs["value_pages"].transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="key_pages must hold frames of 5 tokens as query does, got 4"):
        call(key_pages=inputs["key_pages"][:, :, :4], value_pages=inputs["value_pages"][:, :, :4])
    with pytest.raises(ValueError, match=r"query must hold frames of 6 tokens, got \[2, 3, 5, 2, 64\]"):
        call(tokens=6)
    with pytest.raises(ValueError, match=r"got \[3, 4, 1, 22, 2\]|T = 12, .+ got T = 22"):
        call(turn=frame_turns([0, 1, 2], [0, 1, 2, 3], head_dim=128)[0])
    for slots in (inputs["slots"] + 1, [4, 0, 6, 2], inputs["slots"].long() + 2**32):
        with pytest.raises(IndexError, match=r"slots must be in \[0, 6\), the pages there are, got"):
            call(slots=slots)
    with torch.no_grad():
        call(query=inputs["query"].clone().requires_grad_())


def test_errors_of_frame_turns():
    for changes, message in (
        ({"head_dim": 63}, "head_dim must be even, got 63"),
        ({"head_dim": 64.0}, "head_dim must be an integer of at least 1, got 64.0"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
        ({"policy": "flux"}, "no preset 'flux'"),
    ):
        with pytest.raises(ValueError, match=message):
            frame_turns([1], [1], **{"head_dim": D} | changes)


def test_the_package_stays_light():
    code = "import sys, flexkern; assert 'torch' not in sys.modules; flexkern.attention; flexkern.paged_attention"
    code += "; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = flexkern.attend
