"""The convolution for sm_90: its own source, played on the CPU in random order, against the oracle."""

import random

import pytest
import torch
import torch.nn.functional as F
from gluon_player import ROOT, played

from flexkern.kernels import reference
from flexkern.kernels.vae.causal_conv import SUMS, causal_conv_hopper, choose_tiling
from flexkern.testing import assert_as_accurate

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
SHAPES = {  # B, T, H, W, C, N
    "one place": (1, 1, 1, 1, 32, 32),
    "whole tiles": (1, 4, 8, 16, 32, 96),
    "tiles that are cut in time, rows and columns": (1, 5, 9, 18, 32, 96),
    "two videos, the last frames cut": (2, 2, 3, 5, 64, 64),
    "128 and 64 channels": (1, 3, 5, 7, 32, 192),
    "three times 128 channels": (1, 3, 2, 9, 32, 384),
    "five times 32": (1, 2, 2, 3, 32, 160),
}


def make_inputs(batch, count, height, width, inputs, outputs, dtype=torch.bfloat16):
    buffer = torch.randn(batch, count + 2, height, width, inputs).to(dtype)
    weight = (torch.randn(outputs, inputs, 3, 3, 3) / (27 * inputs) ** 0.5).to(dtype)
    return buffer, weight.contiguous(memory_format=torch.channels_last_3d), torch.randn(outputs).to(dtype)


def play(inputs, seed=0, edit=None, programs=2):
    kernels = played("vae.causal_conv", ("warpgroup",), ("prepared", "common", "gpus"), seed, edit)
    return kernels.causal_conv_hopper(*inputs, programs=programs)


def check(inputs, out):
    exact = reference.causal_conv(*(x.double() for x in inputs))
    entitled = reference.causal_conv(*(x.float() for x in inputs)).to(out.dtype)
    assert out.shape == exact.shape and out.is_contiguous()
    assert_as_accurate(out, exact, entitled)


def test_the_oracle_is_torchs_convolution():
    buffer, weight, bias = (x.double() for x in make_inputs(2, 3, 4, 5, 8, 6, torch.float32))
    expected = F.conv3d(buffer.movedim(-1, 1), weight, bias, padding=(0, 1, 1)).movedim(1, -1)
    assert (reference.causal_conv(buffer, weight, bias) - expected).abs().max() < 1e-12


@cpu_only
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_oracle(shape, dtype):
    inputs = make_inputs(*SHAPES[shape], dtype)
    check(inputs, play(inputs))


@cpu_only
@pytest.mark.parametrize("seed", range(12))
def test_any_shape_in_any_order(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    batch, count = choose.randint(1, 2), choose.randint(1, 6)
    size = choose.randint(1, 17), choose.randint(1, 33)
    inputs = make_inputs(batch, count, *size, choose.choice([32, 64]), choose.choice([32, 64, 96, 128]))
    check(inputs, play(inputs, seed=seed, programs=choose.randint(1, 5)))


@cpu_only
def test_neither_order_nor_programs_change_a_bit():
    inputs = make_inputs(1, 3, 9, 17, 32, 96)
    out, *others = (play(inputs, seed, programs=programs) for seed, programs in enumerate((2, 2, 1, 5)))
    assert all(torch.equal(out, other) for other in others)


@cpu_only
def test_places_and_videos_do_not_see_each_other():
    inputs = make_inputs(2, 3, 10, 18, 32, 32)
    inputs[0][0, 2, 4, 5, 3] = float("nan")  # frame 2 of the buffer: frames 0 to 2 of the first video see it
    spoiled = play(inputs).isnan().any(-1)
    assert spoiled[0, :, 3:6, 4:7].all() and spoiled.sum() == 3 * 9


def test_what_does_not_fit_is_refused_before_a_launch():
    buffer, weight, bias = make_inputs(1, 1, 2, 2, 32, 32)
    for wrong, says in (
        ((buffer[..., :16], weight[:, :16], bias), "channels must be multiples of 32, got 16 in and 32 out"),
        ((buffer, weight[:16], bias), "got 32 in and 16 out"),
        ((buffer, weight[..., :1], bias), "the kernel must be 3x3x3, got 3x3x1"),
        ((buffer.float(), weight.float(), bias), "must be bfloat16 or float16, got torch.float32 and torch.float32"),
        ((buffer.half(), weight, bias), "got torch.float16 and torch.bfloat16"),
        ((buffer[:, :2], weight, bias), r"buffer must be \[B, T \+ 2, H, W, 32\] with T of 1 or more, got \[1, 2, 2"),
        ((buffer.repeat(1, 1, 1, 1, 2), weight, bias), r"W, 32\] with T of 1 or more, got \[1, 3, 2, 2, 64\]"),
        ((buffer.transpose(2, 3)[:, :, :, :1], weight, bias), "buffer must be contiguous"),
        ((buffer, weight.contiguous(), bias), "weight must be contiguous"),
        ((buffer, weight, bias[None].expand(2, -1)[:, 0]), "bias must be contiguous"),
    ):
        with pytest.raises(ValueError, match=says):
            causal_conv_hopper(*wrong)


def test_tiles_fill_the_accumulators_and_waste_few_frames():
    assert [choose_tiling(12, n)[:2] for n in (96, 192, 384, 64, 32, 160)] == [
        (64, 32), (128, 64), (128, 0), (64, 0), (32, 0), (32, 0),
    ]  # fmt: skip
    for count, frames in {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 9: 3, 12: 4}.items():
        assert choose_tiling(count, 96).frames == frames
    for outputs in (32, 64, 96, 128, 160, 192, 384):
        tilings = [choose_tiling(count, outputs) for count in range(1, 20)]
        assert all(each.frames * (each.wide + each.rest) <= SUMS for each in tilings)


WAITED, FREED = (
    "            mbarrier.wait(ring.full.index(stage), n // STAGES & 1)\n",
    ("            mbarrier.arrive(ring.free.index(stage), count=1)\n"),
)
MULTIPLIED = (
    "            for first in gl.static_range(0, SEEN, GROUP):\n"
    "                sums = multiply(ring, stage, sums, first, min(first + GROUP, SEEN), HALF, FRAMES, WIDE, REST)\n"
)
MUTANTS = {  # what is wrong: text that stands in the source once, what replaces it
    "the fetching warp waits for the wrong use": ("(n // STAGES & 1) ^ 1)", "n // STAGES & 1)"),
    "it never waits": ("                mbarrier.wait(ring.free.index(stage), (n // STAGES & 1) ^ 1)\n", ""),
    "it expects too few bytes": ("3 * (WIDE + REST)) * DEPTH * 2)", "3 * WIDE) * DEPTH * 2)"),
    "one warpgroup is enough to free a step": ("init(free.index(b), count=2)", "init(free.index(b), count=1)"),
    "a step is not waited for": (WAITED, ""),
    "a step is freed before it is read": (MULTIPLIED + FREED, FREED + MULTIPLIED),
    "a step is never freed": (FREED, ""),
    "products are not waited for": ("        return warpgroup_mma_wait(0,", "        return warpgroup_mma_wait(1,"),
    "both halves multiply the same places": ("places.slice(HALF * ROWS, ROWS)", "places.slice(0, ROWS)"),
    "both halves store the same places": ("place = HALF * ROWS + ", "place = "),
    "a step reads the first one": ("places = ring.buffer.index(stage * SEEN + i)", "places = ring.buffer.index(i)"),
    "taps in time are mixed up": (
        "weight = ring.wide.index(stage * 3 + (i - t))", "weight = ring.wide.index(stage * 3 + 2 - (i - t))",
    ),
    "the rest's are": (
        "weight = ring.rest.index(stage * 3 + (i - t))", "weight = ring.rest.index(stage * 3 + 2 - (i - t))",
    ),
    "rows and columns are mixed up": (
        "tile.row + tap // 3 - 1, tile.column + tap % 3 - 1", "tile.row + tap % 3 - 1, tile.column + tap // 3 - 1",
    ),
    "the rest begins where the wide part does": ("[tile.channel + WIDE, 9 * i", "[tile.channel, 9 * i"),
    "the bias is left out": ("    total += gl.load(bias_ptr", "    gl.load(bias_ptr"),
    "a frame too many is stored": ("(frame < grid.frames)", "(frame <= grid.frames)"),
    "a column too many is stored": ("(column < grid.width)", "(column <= grid.width)"),
    "videos begin where the one before ends": ("tile.batch * (grid.frames + 2)", "tile.batch * grid.frames"),
}  # fmt: skip
SOURCE = (ROOT / "kernels/vae/causal_conv.py").read_text()


def check_many(edit=None) -> None:
    torch.manual_seed(0)
    for seed, shape in enumerate([(2, 3, 9, 5, 64, 96), (1, 2, 3, 17, 32, 96), (1, 5, 2, 3, 64, 192)]):
        inputs = make_inputs(*shape)
        check(inputs, play(inputs, seed, edit, programs=2))


@cpu_only
def test_without_a_mistake_nothing_is_noticed():
    check_many()


@cpu_only
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name):
    before, after = MUTANTS[name]
    assert SOURCE.count(before) == 1, "a mutant changes one place of the source"
    with pytest.raises((AssertionError, RuntimeError)) as noticed:
        check_many(lambda source: source.replace(before, after))
    if "never freed" in name or "too few bytes" in name:
        assert "deadlock" in str(noticed.value)


def check_on_a_gpu(shape, dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    inputs = make_inputs(*shape, dtype)
    there = [x.cuda() for x in inputs]
    out = causal_conv_hopper(*there)
    check(inputs, out.cpu())
    for _ in range(20):
        assert torch.equal(causal_conv_hopper(*there), out)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 12, 24, 40, 96, 96), (1, 6, 15, 26, 384, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(shape, dtype):
    check_on_a_gpu(shape, dtype)
