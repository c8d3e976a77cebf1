"""What is kept between launches: the same kernel with the same arguments as Triton would launch, and no tensor."""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from flexkern.kernels import prepared
from flexkern.kernels.pointwise.rms_norm import rms_norm
from flexkern.kernels.prepared import KEPT, Blocks, Prepared, keep

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


class Kernel:
    """Launched as a kernel of Triton is; ``calls`` holds who was launched, on which grid, with what."""

    arg_names = ("x_ptr", "y_ptr", "rows", "eps", "BLOCK", "WIDE")

    def __init__(self, *, compiles: bool = True):
        self.calls, self.compiles = [], compiles

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            self.calls.append(("triton", grid, (*args, *(constants[name] for name in ("BLOCK", "WIDE")))))
            return Compiled(self.calls) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(("compiled", grid, args))


@pytest.fixture
def device(monkeypatch):
    """The current device, a number to be changed."""
    current = [0]
    monkeypatch.setattr(prepared, "current_device", lambda: current[0])
    return current


def prepare(kernel: Kernel) -> Prepared:
    return Prepared(kernel, (5,), (7, 0.5), {"WIDE": True, "BLOCK": 16}, num_warps=4)


def test_the_compiled_kernel_gets_what_triton_got(device):
    kernel, tensors = Kernel(), (torch.zeros(4), None)
    launch = prepare(kernel)
    for _ in range(3):
        launch(*tensors)
    assert [who for who, *_ in kernel.calls] == ["triton", "compiled", "compiled"]
    assert {grid for _, grid, _ in kernel.calls} == {(5, 1, 1)}
    for _, _, (x, y, *rest) in kernel.calls:
        assert x is tensors[0] and y is None and rest == [7, 0.5, 16, True]


def test_pointers_that_are_not_aligned_take_tritons_way(device):
    kernel, aligned = Kernel(), torch.zeros(8)
    launch, askew = prepare(kernel), aligned[1:]
    for x, y in ((askew, None), (askew, None), (aligned, None), (aligned, askew), (aligned, aligned)):
        launch(x, y)
    assert [who for who, *_ in kernel.calls] == ["triton"] * 4 + ["compiled"]


def test_every_device_has_its_own(device):
    kernel, x = Kernel(), torch.zeros(4)
    launch = prepare(kernel)
    for device[0] in (0, 1, 1, 0):
        launch(x, x)
    assert [who for who, *_ in kernel.calls] == ["triton", "triton", "compiled", "compiled"]


def test_a_tensor_of_another_device_is_launched_there(device, monkeypatch):
    """As with a model on cuda:1, while the current device is the first."""
    kernel, x, seen = Kernel(), torch.zeros(4), []

    @contextmanager
    def current(index):
        before, device[0] = device[0], index
        seen.append(index)
        yield
        device[0] = before

    monkeypatch.setattr(torch.cuda, "device", current)
    launch = prepare(kernel)
    for place in (1, 1, 0, 0, -1):  # the last one is a CPU's: nobody's device
        monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor, place=place: place)
        launch(x, x)
    assert seen == [1, 1] and device == [0] and set(launch.compiled) == {0, 1}
    assert [who for who, *_ in kernel.calls] == ["triton", "compiled", "triton", "compiled", "compiled"]


def test_the_interpreter_is_asked_every_time(device):
    kernel, x = Kernel(compiles=False), torch.zeros(4)
    launch = prepare(kernel)
    for _ in range(3):
        launch(x, x)
    assert [who for who, *_ in kernel.calls] == ["triton"] * 3


def test_keys_are_kept_errors_are_not_and_the_oldest_go():
    made = []

    @keep
    def make(key):
        made.append(key)
        if key < 0:
            raise ValueError(key)
        return object()

    assert make(1) is make(1) and made == [1]
    for _ in range(2):
        with pytest.raises(ValueError):
            make(-1)
    assert made == [1, -1, -1]
    for key in range(2, KEPT + 2):
        make(key)
    make(KEPT + 1)
    assert len(made) == KEPT + 3
    make(1)
    assert len(made) == KEPT + 4


def test_nothing_is_made_of_a_key_inside_a_compiler(monkeypatch):
    made = []
    make = keep(lambda key: made.append(key))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    make(1), make(1)
    assert made == [1, 1]


def test_no_tensor_is_kept():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(3, 64, device=where), torch.ones(64, device=where)
    out = rms_norm(x, weight)
    kept = [weakref.ref(tensor) for tensor in (x, weight, out)]
    del x, weight, out
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


@pytest.mark.parametrize("kind", [TensorDescriptor, GluonDescriptor])
def test_a_descriptor_is_what_triton_makes(kind):
    pages = torch.zeros(2, 3, 40, 2, 64, dtype=torch.bfloat16)
    layout = [gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)][: kind is GluonDescriptor]
    expected = kind.from_tensor(pages.view(-1, 40, 128), [1, 32, 64], *layout)
    blocks = Blocks(kind, torch.bfloat16, (6, 40, 128), [1, 32, 64], *layout)
    found = blocks.of(pages)
    assert type(found) is kind and found.base is pages
    for name, value in vars(expected).items():
        if name != "base":
            assert getattr(found, name) == (list(value) if name in ("shape", "strides") else value), name
    with pytest.raises(ValueError, match="pages must begin at a multiple of 16 bytes to be read by TMA, got"):
        blocks.of(pages.view(-1)[1:])


SECOND_LAUNCHES = """
import sys
sys.path.insert(0, {tests!r})
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from compile_kernels import LAUNCH, MODULES, Case, load_kernels
from offline import StandInDriver

driver.set_active(StandInDriver(90))
launched = []

def init_handles(self):
    self._run = lambda *args: launched.append((self.hash, args[:3], [about(x) for x in args[9:]]))

def about(x):
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype
    if hasattr(x, "block_shape"):
        return [list(x.shape), list(x.strides), list(x.block_shape), x.base.dtype]
    return x

CompiledKernel._init_handles = init_handles
load_kernels()
import importlib
pointwise = {{name: importlib.import_module(f"shipped.{{MODULES[name]}}") for name in MODULES}}
keepers = [module.prepare for module in pointwise.values()]
for module in [module for name, module in sys.modules.items() if name.startswith("shipped.")]:
    for name, answer in (("arch_of", 90), ("multiprocessors", 132)):
        if hasattr(module, name):
            setattr(module, name, lambda device, answer=answer: answer)

def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)

def rows(module):
    for x, weight in ((bf16(5, 128), bf16(128)), (bf16(1, 128), bf16(128)), (bf16(5, 128), torch.empty(128)),
                      (bf16(16, 128), bf16(128)), (torch.empty(2, 8, 128), bf16(128)), (bf16(5, 96), bf16(96))):
        yield lambda: module.rms_norm(x, weight)
        yield lambda: module.rms_norm(x, weight, 1)

def streams(launcher, others):
    for tokens, frames, batch in ((5, 1, 1), (1, 3, 1), (16, 2, 2)):
        x = bf16(batch, frames, tokens, 64)
        table = bf16(batch, frames, 6, 64).unbind(2)
        yield lambda: launcher(x, *([x] if others == 1 else []), *table[:others])
        yield lambda: launcher(x, *([x] if others == 1 else []), *[bf16(batch, frames, 64)] * others)
        yield lambda: launcher(x, *([x] if others == 1 else []), *[torch.empty(batch, frames, 64)] * others)
        if others == 2:
            yield lambda: launcher(x, table[0], bf16(batch, frames, 64))

def sums(launcher):
    for batch, frames, count, channels in ((1, 2, 3, 64), (2, 2, 3, 64), (1, 2, 16, 64), (1, 2, 3, 80)):
        x, table = bf16(batch, frames, count, channels), bf16(6, batch, frames, channels)
        weight = bf16(channels).expand(batch, frames, channels)
        for gate in (None, table[2], torch.empty(batch, frames, channels)):
            yield lambda: launcher(x, x, gate, table[0], table[1])
            yield lambda: launcher(x, x, gate, weight, weight, offset=0.0)
            yield lambda: launcher(x, x.float(), gate, table[0], weight)

def tokens(module):
    for heads, pages, half in ((2, 4, True), (1, 4, True), (2, 9, True), (2, 4, False)):
        x = torch.empty(1, 2, 3, heads, 32, dtype=torch.bfloat16 if half else torch.float32)
        memory = torch.empty(2, 1, pages, 3, heads, 32, dtype=torch.bfloat16)
        weight, turn, slots = bf16(heads * 32), torch.empty(3, 12, 2), torch.empty(2, dtype=torch.int32)
        for query in (x, None):
            for written in (memory, torch.empty(2, 1, 2 * pages, 3, heads, 32)[:, :, ::2]):
                for one, other in ((weight, weight), (weight.float(), weight), (weight, weight.float())):
                    yield lambda: module.norm_rope_write(query, x, x, one, other, turn, *written, slots)
        q, k, v = torch.cat((x, x, x), dim=-2).split(heads, dim=-2)
        for query in (q, None):
            yield lambda: module.norm_rope_write(query, k, v, weight, weight, turn, *memory, slots)

def frames(module):
    for count, height, channels, batch in ((1, 3, 96, 1), (3, 2, 96, 2), (3, 16, 96, 1), (3, 3, 8, 1)):
        x, past = bf16(batch, count, height, 1, channels), bf16(batch, 2, height, 1, channels)
        for gamma in (bf16(channels), torch.empty(channels)):
            for addend in (None, x, bf16(batch, count + 2, height, 1, channels)[:, 2:]):
                yield lambda: module.add_norm_silu(x, addend, gamma, past)
                yield lambda: module.add_norm_silu(x, addend, gamma, None)

def colours(module):
    for count, batch in ((1, 1), (3, 2)):
        for x in (bf16(batch, count, 2, 8, 3), torch.empty(batch, count, 2, 8, 3)):
            for more in (0, 2):
                out = torch.empty(batch, count + more, 2, 8, 3, dtype=torch.uint8)
                yield lambda: module.to_bytes(x, out[:, more:])

def compiled(kernel, *variants):
    module = pointwise[kernel]
    for variant in variants:
        yield lambda: LAUNCH[kernel](getattr(module, kernel), Case(kernel=kernel, arch=90, variant=variant))

def cases():
    yield from rows(pointwise["rms_norm"])
    yield from streams(pointwise["modulate"].modulate, 2)
    yield from streams(pointwise["gate_residual"].gate_residual, 1)
    yield from sums(pointwise["add_modulate"].add_modulate)
    yield from tokens(pointwise["norm_rope_write"])
    yield from frames(pointwise["add_norm_silu"])
    yield from colours(pointwise["to_bytes"])
    yield from compiled("frame_attention", "", "one frame")
    yield from compiled("frame_attention_hopper", "")
    yield from compiled("causal_conv_hopper", "", "384 channels 3 frames")

def taken(call):
    launched.clear()
    call()
    assert launched
    return list(launched)

calls, expected = 0, []
for call in cases():
    for keeper in keepers:
        keeper.clear()
    expected.append(taken(call))  # with nothing kept: Triton's own way
for keeper in keepers:
    keeper.clear()
for first, call in zip(expected, cases(), strict=True):  # with everything kept
    for _ in range(2):
        assert taken(call) == first, (taken(call), first)
        calls += 1
print(calls)
"""


def test_the_second_launch_is_that_of_triton(tmp_path):
    """For real: kernels compiled for sm_90, their arguments caught where Triton hands them to the driver."""
    script = tmp_path / "launches.py"
    script.write_text(SECOND_LAUNCHES.format(tests=str(Path(__file__).parent.parent / "support")))
    done = subprocess.run([sys.executable, str(script)], env=COMPILING, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) == 2 * (128 + 48 + 10), done.stderr[-3000:]
