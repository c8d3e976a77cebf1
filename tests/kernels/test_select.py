"""Which attention kernel and tile a call gets: the decision alone, the tiles that are kept, and how one is found."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_inputs import make_inputs

from flexkern.kernels.attention import kept as kept_tiles
from flexkern.kernels.attention import select as selection
from flexkern.kernels.attention.hopper_variants import SELECTED
from flexkern.kernels.attention.kept import KeptTile, find_kept, keep_tile, kept_file, read_kept
from flexkern.kernels.attention.portable import frame_attention
from flexkern.kernels.attention.select import select
from flexkern.kernels.attention.tiles import FLOAT32, HALF, INTERPRETER, MEASURED, Config
from flexkern.kernels.attention.tune import Timed, candidates, fastest, time_tiles

HALVES = (torch.bfloat16, torch.float16)
OTHER = Config(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True)


@pytest.mark.parametrize("triton", [(3, 6), (3, 7), (3, 8)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_takes_what_it_can(triton, dtype, head_dim):
    found = select(arch=90, triton=triton, head_dim=head_dim, dtype=dtype, kept=OTHER)
    assert (found.path, found.config, found.variant) == ("hopper", None, SELECTED)
    assert "compute capability 9.0" in found.reason and f"the Hopper attention kernel, loop {SELECTED!r}" in str(found)


FALLS = {  # what differs from a call that the Hopper kernel takes, the tile, and why
    "an older Triton": (dict(triton=(3, 5)), HALF[90], "needs Triton 3.6, Triton 3.5 is installed"),
    "the oldest Triton": (dict(triton=(3, 4)), HALF[90], "needs Triton 3.6, Triton 3.4 is installed"),
    "a newer Triton": (dict(triton=(3, 10)), HALF[90], "was tried to Triton 3.9, Triton 3.10 is installed"),
    "the next Triton": (dict(triton=(4, 0)), HALF[90], "was tried to Triton 3.9, Triton 4.0 is installed"),
    "float32": (dict(dtype=torch.float32), FLOAT32, "takes bfloat16 and float16, got float32"),
    "narrow heads": (dict(head_dim=32), HALF[90], "takes head dims 64 and 128, got 32"),
    "an Ampere GPU": (dict(arch=80), HALF[80], "needs compute capability 9.0, this GPU is of the class sm_80"),
    "a Blackwell GPU": (dict(arch=100), HALF[100], "this GPU is of the class sm_100"),
    "the interpreter": (dict(arch=0), INTERPRETER, "Triton interprets its kernels here"),
}


@pytest.mark.parametrize("case", FALLS)
def test_the_portable_kernel_takes_the_rest_and_says_why(case):
    changes, tile, why = FALLS[case]
    found = select(**(dict(arch=90, triton=(3, 7), head_dim=128, dtype=torch.bfloat16) | changes))
    assert (found.path, found.config, found.variant) == ("portable", tile, None) and why in found.reason


def test_a_tile_says_whether_a_gpu_has_measured_it():
    call = dict(triton=(3, 4), head_dim=128, dtype=torch.bfloat16)
    for arch in HALF:
        reason = select(arch=arch, **call).reason
        assert MEASURED.get(arch, "measured on no GPU") in reason
    assert list(MEASURED) == [90] and str(HALF[90]) == "64x64 w4 s3 tma x2"
    found = select(arch=80, kept=OTHER, **call)
    assert found.config == OTHER and "found by flexkern warmup --tune" in found.reason


def test_the_measured_tile_is_the_fastest_of_its_table():
    """And the comment beside it has its figures."""
    import csv

    root = Path(__file__).parent.parent.parent
    with (root / "bench/results/NVIDIA-H200/tiles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    source = " ".join((root / "kernels/attention/tiles.py").read_text().split())
    for read in ("R=21", "R=12"):
        best = min((row for row in rows if read in row["shape"]), key=lambda row: float(row["ms"]))
        assert best["provider"] == str(HALF[90])
        assert f"{float(best['ms']):.2f}" in source and f"{float(best['tflop_s']):.0f}" in source


@pytest.mark.parametrize(
    ("head_dim", "dtype", "says"),
    [
        (96, torch.bfloat16, "head dims that are powers of two from 16 on, got 96"),
        (8, torch.bfloat16, "got 8"),
        (256, torch.bfloat16, "head dims to 128 on a GPU, got 256"),
        (128, torch.float64, "float32, bfloat16, float16, got float64"),
    ],
)
def test_what_no_kernel_takes_is_refused_before_a_launch(head_dim, dtype, says):
    with pytest.raises(NotImplementedError, match=says):
        select(arch=90, triton=(3, 7), head_dim=head_dim, dtype=dtype)
    if head_dim == 256:
        assert select(arch=0, triton=(3, 7), head_dim=head_dim, dtype=dtype).config == INTERPRETER


@pytest.mark.triton(3, 6)
def test_a_path_that_is_asked_for_is_taken_or_refused(device, monkeypatch):
    inputs = {name: x if x is None else x.to(device) for name, x in make_inputs(1, 1, 16, 1, 64, 1, 1).items()}
    out = frame_attention(**inputs)[0]
    assert torch.equal(frame_attention(**inputs, path="portable")[0], out)
    with pytest.raises(ValueError, match="path must be 'portable' or 'hopper', got 'triton'"):
        frame_attention(**inputs, path="triton")
    with pytest.raises(ValueError, match="a tile is for path 'portable', got 128x64 w4 s3 tma x1 for path 'hopper'"):
        frame_attention(**inputs, config=OTHER, path="hopper")
    with pytest.raises(ValueError, match="path 'hopper' cannot run: "):
        frame_attention(**inputs, path="hopper")
    monkeypatch.setattr(selection, "_ask", lambda *_: (90, None))
    half = {name: x.bfloat16() if name in ("query", "key_pages", "value_pages") else x for name, x in inputs.items()}
    taken = []
    monkeypatch.setattr("flexkern.kernels.attention.hopper.frame_attention_hopper", lambda *_, **__: taken.append(1))
    monkeypatch.setattr(selection, "triton_version", lambda: (9, 9))  # nobody's choice, but the caller's
    frame_attention(**half, path="hopper")
    assert taken == [1]


LAUNCHED = """
import sys
sys.path.insert(0, {support!r})
import compile_kernels, offline, torch
from compile_kernels import Case, empty, pages, turn, FRAMES, READ
from triton.runtime.jit import JITFunction

compile_kernels.load_kernels()
import importlib
portable = importlib.import_module("shipped.attention.portable")
select, launch = (importlib.import_module(f"shipped.attention.{{name}}") for name in ("select", "launch"))
offline.driver.set_active(offline.StandInDriver(90))
JITFunction.run = lambda self, *args, **options: print(self.fn.__name__, end=" ")
for arch, dtype, dim in ((90, "bfloat16", 128), (90, "float16", 64), (90, "float32", 128), (80, "bfloat16", 128)):
    select.arch_of = lambda device: arch
    for module in (portable, launch):
        module.multiprocessors = lambda device: 132
    select.forget()
    case = Case(kernel="frame_attention", arch=arch, dtype=dtype, head_dim=dim)
    for groups, bias in ((1, None), (12, torch.zeros(FRAMES, READ))):
        query = empty(case, 1, FRAMES, 1560, 12, dim)
        slots = torch.zeros(READ, dtype=torch.int32)
        angles = turn(case, FRAMES, READ, groups)
        portable.frame_attention(query, pages(case), pages(case), slots, angles, torch.ones(FRAMES), bias)
    print()
"""


@pytest.mark.triton(3, 6)
def test_a_hopper_gpu_launches_the_hopper_kernel_without_being_asked():
    """The launcher runs up to the launch, for chips that are not here: with and without bias and angles by head."""
    code = LAUNCHED.format(support=str(Path(__file__).parent.parent / "support"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    lines = [set(line.split()) - {"_merge"} for line in done.stdout.splitlines()]
    hopper, portable = {"_frame_attention_hopper"}, {"_frame_attention"}
    assert lines == [hopper, hopper, portable, portable], done.stderr


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of kept tiles, in a folder of its own."""
    monkeypatch.setattr("triton.knobs.cache.dir", str(tmp_path / "cache"))
    read_kept.cache_clear()
    find_kept.cache_clear()
    yield kept_file()
    read_kept.cache_clear()
    find_kept.cache_clear()


def tile(**changes) -> KeptTile:
    import triton

    about = dict(gpu="GPU X", triton=triton.__version__, head_dim=128, dtype="bfloat16", ms=1.5, shape="F=3")
    return KeptTile(**(about | dict(config=OTHER) | changes))


def test_kept_tiles_are_found_by_gpu_triton_head_dim_and_dtype(file, tmp_path):
    assert file == tmp_path / "flexkern-tiles.json" and find_kept("GPU X", 128, torch.bfloat16) is None
    others = [tile(gpu="GPU Y"), tile(triton="3.0.0"), tile(head_dim=64), tile(dtype="float16")]
    for one in (tile(config=HALF[80]), *others, tile()):
        assert keep_tile(one) == file
    assert find_kept("GPU X", 128, torch.bfloat16) == tile() and len(read_kept(file)) == 5
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing is left of the writing"
    assert find_kept("GPU Z", 128, torch.bfloat16) is None


DAMAGED = {
    "cut short": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "tiles: yes",
    "bytes": lambda text: "\x00\xff",
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "a list": lambda text: "[]",
    "another's": lambda text: '{"format": 1, "tiles": 3}',
    "a word for a number": lambda text: text.replace('"block_m": 128', '"block_m": "128"'),
    "no tile": lambda text: text.replace('"block_m": 128', '"block_m": 100'),
    "a field too few": lambda text: text.replace('"per_sm": 1', '"per": 1'),
    "a stage too many": lambda text: text.replace('"num_stages": 3', '"num_stages": 300'),
    "no time": lambda text: text.replace("1.5", '"fast"'),
    "no name": lambda text: text.replace('"GPU X"', "3"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_once_and_not_used(file, damage):
    keep_tile(tile())
    text = file.read_text()
    changed = DAMAGED[damage](text)
    assert changed != text
    file.write_text(changed)
    read_kept.cache_clear()
    find_kept.cache_clear()
    with pytest.warns(UserWarning, match="flexkern-tiles.json is not used, nor the tiles in it") as told:
        assert find_kept("GPU X", 128, torch.bfloat16) is None
        assert find_kept("GPU X", 64, torch.bfloat16) is None
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep_tile(tile(head_dim=64))
    assert find_kept("GPU X", 64, torch.bfloat16) == tile(head_dim=64), "tuning again mends it"


def test_a_file_that_cannot_be_written_stays_as_it_was(file, monkeypatch):
    keep_tile(tile())
    before = file.read_text()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_tiles.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        keep_tile(tile(ms=1.0))
    assert file.read_text() == before and [path.name for path in file.parent.iterdir()] == [file.name]
    assert json.loads(before)["tiles"][0]["config"]["block_m"] == 128


def test_candidates_begin_with_the_tile_in_use_and_come_once():
    for arch in HALF:
        found = candidates(arch, HALF[arch])
        assert found[0] == HALF[arch] and len(set(found)) == len(found) > 9
        assert any(one.tma for one in found) == (arch >= 90)


def test_the_fastest_tile_that_is_right_is_found():
    first, wrong, slow, fast, broken = (replace(OTHER, num_stages=stages) for stages in range(1, 6))
    right = torch.arange(1, 9).bfloat16()

    def attend(config):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return right * 1.1 if config == wrong else right * 1.002

    times = {first: 3.0, slow: 4.0, fast: 2.0, wrong: 1.0}
    tried = []

    def timer(call):
        tried.append(None)
        return {1: 3.0, 2: 4.0, 3: 2.0}[len(tried)]

    found = list(time_tiles([first, wrong, slow, fast, broken], attend, timer))
    assert [one.ms for one in found if not one.fault] == [times[first], times[slow], times[fast]]
    assert fastest(found).config == fast
    assert "differs from that of the first tile by 0.1" in found[1].fault and "out of resource" in found[4].fault
    assert str(found[3]).endswith(": 2 ms") and "out of resource" in str(found[4])
    with pytest.raises(RuntimeError, match="shared memory"):  # the tile in use: nothing could run
        list(time_tiles([broken, fast], attend, timer))
    with pytest.raises(ValueError, match="no tile could be timed"):
        fastest([Timed(config=wrong, fault="wrong")])
