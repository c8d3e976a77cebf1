"""What is compiled beforehand is what a render launches, and the tile that is found is kept."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexkern.backends import sdpa
from flexkern.model.families import FAMILIES
from flexkern.model.schedule import Schedule
from flexkern.model.vae import decoder, net
from flexkern.model.vae.net import Sizes
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.policies import get_preset
from flexkern.warmup import LAYERS, decode, live, stand_in, tune

CONFIG = WanConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=5, in_dim=4, out_dim=4, text_len=4, text_dim=8, freq_dim=16
)
OPERATIONS = ("add_modulate", "frame_attention", "modulate", "norm_rope_write", "rms_norm")


def engine_of(first_chunk: int = 3, backend: str = "sdpa"):
    schedule = Schedule(steps=(1000,))  # every step of a chunk launches the same
    family = replace(FAMILIES["self-forcing"], size=(4, 4), first_chunk=first_chunk, schedule=schedule)
    return stand_in(CONFIG, family, dtype=torch.float32, device="cpu", backend=backend)


class Recorder:
    """A backend that keeps, of every launch, what a version of a kernel is compiled for."""

    def __init__(self):
        self.seen = set()

    def __getattr__(self, name: str):
        assert name in OPERATIONS
        run = getattr(sdpa, name)

        def recorded(*arguments):
            form = tuple(list(x.shape) if isinstance(x, torch.Tensor) else x is None for x in arguments[:2])
            if name == "frame_attention":  # the frames read are a number: Triton tells 1 and multiples of 16 apart
                query, _, _, plan = arguments
                read = len(plan.read_slots)
                form = (list(query.shape), read == 1, read % 16 == 0, plan.bias is None, list(plan.turn.shape[2:]))
            self.seen.add((name, str(form)))
            return run(*arguments)

        return recorded


def launches(run, first_chunk: int) -> set[tuple[str, str]]:
    engine = engine_of(first_chunk)
    engine.backend = Recorder()
    run(engine)
    return engine.backend.seen


PRESETS = {  # one of each kind of switch; after a flush, 2 + 2 frames are left, and 16 are read three chunks later
    "recache": ("longlive", {"retention.window": 18}),
    "flush": ("infinity-rope", {"retention.window": 18, "retention.sink": 2}),
    "keep": ("flex", {"retention.window": 12}),
}


@pytest.mark.parametrize("first_chunk", [1, 3])
@pytest.mark.parametrize("kind", PRESETS)
def test_a_render_launches_nothing_that_was_not_compiled(kind, first_chunk):
    preset = get_preset(*PRESETS[kind])
    assert preset.switch.kind == kind
    compiled = launches(lambda engine: live(engine, preset), first_chunk)

    def render(engine):
        choose = random.Random(first_chunk)
        text = torch.randn(1, CONFIG.text_len, CONFIG.text_dim)
        session = engine.session(text, preset=preset, frames=90)
        for _ in range(24):
            session.step()
            if choose.random() < 0.3:
                session.switch(text)
            if choose.random() < 0.3 and preset.position.index == "slot":
                session.cut()

    rendered = launches(render, first_chunk)
    assert len(rendered) >= 7 and rendered <= compiled, rendered - compiled


@pytest.mark.parametrize(("first_chunk", "chunk"), [(1, 3), (3, 3), (1, 1)])
def test_a_vae_launches_nothing_that_was_not_compiled(monkeypatch, first_chunk, chunk):
    sizes, launched = Sizes(4, (16, 16, 8, 8), 1, (True, True, False)), set()
    family = replace(FAMILIES["self-forcing"], size=(4, 6), first_chunk=first_chunk, chunk=chunk)
    for module, name in ((net, "add_norm_silu"), (decoder, "to_bytes")):
        run = getattr(module, name)

        def recorded(*tensors, name=name, run=run):
            launched.add((name, *(None if x is None else (x.shape[1] == 1, x.shape[2:], x.dtype) for x in tensors)))
            return run(*tensors)

        monkeypatch.setattr(module, name, recorded)
    decode(family, dtype=torch.float32, device="cpu", sizes=sizes)
    compiled = set(launched)
    assert {name for name, *_ in compiled} == {"add_norm_silu", "to_bytes"}
    render = decoder.WanDecoder(net.DecoderNet.random(sizes, dtype=torch.float32, device="cpu"))
    for count in (first_chunk, *[chunk] * 5):
        render(torch.randn(1, count, 4, 4, 6))
    assert launched == compiled


def test_the_stand_in_differs_from_the_model_in_its_layers_alone():
    engine = engine_of(first_chunk=1)
    assert engine.model.config == replace(CONFIG, num_layers=LAYERS)
    assert (engine.chunk, engine.first_chunk, engine.size, engine.horizon) == (3, 1, (4, 4), 21)
    one = stand_in(replace(CONFIG, num_layers=1), FAMILIES["self-forcing"], dtype=torch.bfloat16, device="cpu")
    assert one.model.config.num_layers == 1 and one.model.dtype == torch.bfloat16


@pytest.mark.triton(3, 4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_the_fastest_tile_is_kept_and_taken(tmp_path, monkeypatch):
    """The kernels run, in the interpreter; which of them is the fastest, somebody else says."""
    from flexkern.kernels.attention import tune as tuning
    from flexkern.kernels.attention.kept import read_kept

    monkeypatch.setattr(tuning, "SIZES", tuning.SIZES[:3])
    times, said, path = iter([3.0, 4.0, 2.0, 5.0]), [], tmp_path / "folder" / "tiles.json"
    engine = engine_of(backend="triton")
    assert tune(engine, "longlive", tell=said.append, timer=lambda call: next(times), keep_in=path) == path
    (tile,) = read_kept(path)
    assert (tile.head_dim, tile.dtype, tile.ms, tile.config.block_n) == (32, "float32", 2.0, 64)
    assert tile.shape == "F=3 R=12 S=4 H=2 D=32"
    assert len(said) == 5 and said[-1].startswith(f"{tile.config}: 2 ms, the fastest of 4 for F=3 R=12")


@pytest.mark.triton(3, 4)
def test_nothing_is_timed_where_there_is_one_tile(monkeypatch):
    from flexkern.kernels.attention import select

    monkeypatch.setattr(select, "_ask", lambda *_: (90, None))
    select.forget()
    said = []
    assert tune(engine_of(), "longlive", tell=said.append, timer=lambda call: pytest.fail("was timed")) is None
    select.forget()
    assert said[0].startswith("nothing to tune: the portable attention kernel, tile 32x32")


@pytest.mark.triton(3, 6)
def test_nothing_is_timed_where_the_hopper_kernel_runs(monkeypatch):
    from flexkern.kernels.attention import select

    monkeypatch.setattr(select, "_ask", lambda *_: (90, None))
    select.forget()
    said = []
    engine = engine_of()
    engine.model = CausalWan(replace(CONFIG, num_heads=1, num_layers=1)).bfloat16()
    assert tune(engine, "longlive", tell=said.append, timer=lambda call: pytest.fail("was timed")) is None
    select.forget()
    assert said[0].startswith("nothing to tune: the Hopper attention kernel")


WATCHED = """
import sys, torch, triton
sys.path.insert(0, {support!r})
import offline
from flexkern.kernels.compiles import watch_compiles
from flexkern.kernels.pointwise import rms_norm
from triton.runtime.jit import JITFunction

triton.knobs.cache.dir = {cache!r}
offline.driver.set_active(offline.StandInDriver(80))
run = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options) and None  # no launch
said = []
with watch_compiles(said.append) as compiled:
    for kernel in (rms_norm._rms_norm, rms_norm._rms_norm):
        for _ in range(2):  # the second time nothing is compiled
            rms_norm.rms_norm(torch.empty(4, 64), torch.empty(64))
        kernel.device_caches.clear()
assert said == compiled and triton.knobs.compilation.listener is None
print(*((one.kernel, one.cached, one.seconds > 0) for one in compiled), sep="\\n")
"""


@pytest.mark.triton(3, 6)
def test_what_compiles_is_told_and_what_was_compiled_too(tmp_path):
    """For real, for a chip that is not here: once by the compiler, once from its cache."""
    support = str(Path(__file__).parent.parent / "support")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = WATCHED.format(support=support, cache=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["('_rms_norm', False, True)", "('_rms_norm', True, True)"], done.stderr
