"""The attention kernel against the float64 oracle, and what must hold bit for bit."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from attention_inputs import declared, exact, make_inputs

from flexkern.kernels.attention.portable import frame_attention
from flexkern.kernels.attention.tiles import Config
from flexkern.kernels.attention.work import count_items, find_item, owner
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# small enough that small shapes cross tile, frame and program edges
SMALL = Config(block_m=32, block_n=32, num_warps=4, num_stages=1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, F, S, H, D, R, G
    "one token": (1, 1, 1, 1, 64, 1, 1),
    "odd frames, two videos, an angle per head": (2, 2, 7, 2, 64, 3, 2),
    "a tile meets two frames, a short last tile of keys": (1, 3, 40, 1, 128, 2, 1),
    "whole tiles of keys": (1, 2, 64, 2, 64, 2, 1),
    "one frame": (1, 1, 33, 2, 128, 3, 1),
}


def run(inputs: dict, device: str, config: Config = SMALL, programs: int = 3, **options):
    there = {name: x if x is None else x.to(device) for name, x in inputs.items()}
    out, lse = frame_attention(**there, config=config, programs=programs, **options)
    return out.cpu(), lse if lse is None else lse.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(shape, dtype, device):
    inputs = make_inputs(*SHAPES[shape], dtype)
    out, _ = run(inputs, device)
    assert_as_accurate(out, exact(inputs)[0], declared(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_log_sum_exp(dtype, device):
    inputs = make_inputs(1, 2, 40, 1, 64, 3, 1, dtype, bias=True)
    out, lse = run(inputs, device, want_lse=True)
    truth, total = exact(inputs)
    assert_as_accurate(out, truth, declared(**inputs))
    # one rounding of the query moves a logit by at most eps times its largest terms
    assert (lse - total).abs().max() < 16 * torch.finfo(dtype).eps * total.abs().max()


@pytest.mark.parametrize("programs", [1, 3, 5])
def test_hidden_frames_are_not_even_read(device, programs):
    inputs = make_inputs(1, 3, 20, 2, 64, 3, 1, bias=True)
    slots = inputs["slots"].long()
    inputs["bias"][:, 1] = -math.inf
    inputs["bias"][2] = -math.inf
    clean = dict(inputs, value_pages=inputs["value_pages"].nan_to_num(), key_pages=inputs["key_pages"].nan_to_num())
    inputs["key_pages"][:, slots[1]] = inputs["value_pages"][:, slots[1]] = math.nan
    out, lse = run(inputs, device, programs=programs, want_lse=True)
    truth, total = exact(clean)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    assert (out[:, 2] == 0).all() and lse[:, 2].isneginf().all()
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-5)


def test_tensor_descriptors_change_nothing(device):
    inputs = make_inputs(2, 2, 40, 2, 64, 3, 1)
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need compute capability 9.0")
    plain, through = run(inputs, device), run(inputs, device, config=replace(SMALL, tma=True))
    assert torch.equal(plain[0], through[0])


@pytest.mark.parametrize("programs", [1, 2, 5, 7, 100])
def test_any_number_of_programs(device, programs):
    """Six tiles of three frames: from one program with all of them to one unit each."""
    inputs = make_inputs(1, 2, 40, 2, 64, 3, 1)
    (out, lse), again = (run(inputs, device, programs=programs, want_lse=True) for _ in range(2))
    truth, total = exact(inputs)
    assert_as_accurate(out, truth, declared(**inputs), mean=1.5)  # each cut rounds once more
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_physical_slots_do_not_matter(device):
    inputs = make_inputs(2, 2, 20, 2, 64, 3, 2, torch.bfloat16)
    order = torch.randperm(5)
    moved = dict(inputs, slots=order[inputs["slots"].long()].int())
    for name in ("key_pages", "value_pages"):
        moved[name] = torch.empty_like(inputs[name])
        moved[name][:, order] = inputs[name]
    assert torch.equal(run(inputs, device)[0], run(moved, device)[0])


def test_frame_by_frame_is_all_at_once(device):
    inputs = make_inputs(1, 3, 20, 1, 64, 3, 1)
    whole, _ = run(inputs, device, programs=1)
    for f in range(3):
        alone = dict(inputs, query=inputs["query"][:, f, None].contiguous())
        alone |= {name: inputs[name][f, None].contiguous() for name in ("turn", "logit_scale")}
        assert torch.equal(run(alone, device, programs=1)[0], whole[:, f, None])


def test_the_same_plan_at_the_same_addresses_repeats(device):
    inputs = {name: x if x is None else x.to(device) for name, x in make_inputs(1, 2, 40, 1, 64, 3, 1).items()}
    first, _ = frame_attention(**inputs, config=SMALL, programs=3)
    for name in ("query", "turn"):
        inputs[name].copy_(inputs[name].clone())
    assert torch.equal(first, frame_attention(**inputs, config=SMALL, programs=3)[0])


def test_refuses_what_it_cannot_address(device):
    inputs = make_inputs(1, 2, 16, 2, 64, 3, 1)
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"query must be contiguous, got shape \[1, 2, 16, 2, 64\], strides \(4096"):
        run(inputs, device)
    inputs = make_inputs(1, 2, 16, 2, 64, 3, 1)
    with pytest.raises(ValueError, match="must have one dtype, got torch.float32, torch.bfloat16, torch.float32"):
        run(inputs | {"key_pages": inputs["key_pages"].bfloat16()}, device)


@triton.jit
def _list_items(items_ptr, tiles, read, MOST: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    for item in range(0, count_items(program, programs, tiles, read)):
        tile, begin, end, fragment = find_item(item, program, programs, tiles, read)
        unit = (tile - tiles // programs * programs) * read + begin
        holder = owner(tl.maximum(unit, 0), programs, tl.maximum(tiles % programs * read, 1))
        row = items_ptr + (program * MOST + item) * 5
        tl.store(row, tile)
        tl.store(row + 1, begin)
        tl.store(row + 2, end)
        tl.store(row + 3, fragment)
        tl.store(row + 4, holder)


@pytest.mark.parametrize("tiles, read, programs", [(1, 1, 1), (5, 3, 4), (4, 6, 4), (7, 2, 3), (3, 5, 11), (10, 12, 7)])
def test_every_frame_of_every_tile_is_dealt_once(tiles, read, programs, device):
    most = tiles // programs + 2
    items = torch.full((programs, most, 5), -1, dtype=torch.int32, device=device)
    _list_items[(programs,)](items, tiles, read, MOST=most)
    met, load, fragments = torch.zeros(tiles, read, dtype=torch.int), torch.zeros(programs, dtype=torch.int), []
    for program, listed in enumerate(items.tolist()):
        for item, (tile, begin, end, fragment, holder) in enumerate(listed):
            if tile < 0:
                continue
            assert begin < end
            met[tile, begin:end] += 1
            load[program] += end - begin
            if item >= tiles // programs:
                assert holder == program, "owner() must find who holds a unit"
                fragments.append(fragment)
    assert (met == 1).all()
    assert load.max() - load.min() <= 1, "dealt evenly"
    assert len(set(fragments)) == len(fragments) and all(fragment < 2 * programs for fragment in fragments)


@pytest.mark.gpu
def test_a_captured_graph_replays_bit_for_bit():
    inputs = {k: v if v is None else v.cuda() for k, v in make_inputs(1, 3, 1560, 2, 128, 6, 1, torch.bfloat16).items()}
    expected, _ = frame_attention(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = frame_attention(**inputs)
    for _ in range(1000):
        graph.replay()
        assert torch.equal(out, expected)
    inputs["turn"].copy_(make_inputs(1, 3, 1560, 2, 128, 6, 1)["turn"])
    graph.replay()
    assert torch.equal(out, frame_attention(**inputs)[0]) and not torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [1, 3])
def test_the_tuned_tile_matches_the_oracle(frames):
    inputs = make_inputs(1, frames, 1560, 2, 128, 6, 1, torch.bfloat16)
    there = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    out, _ = frame_attention(**there)
    assert_as_accurate(out, exact(there)[0], declared(**there))
