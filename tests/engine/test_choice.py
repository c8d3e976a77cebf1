"""The backend that is taken where none is named, and that a named one is never replaced."""

import importlib
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flexkern import backends
from flexkern.backends import choice
from flexkern.backends.choice import AUTO, Choice, choose_backend, open_backend, validate_backend
from flexkern.demo import load_engine
from flexkern.engine import Engine
from flexkern.model.wan import CausalWan, WanConfig

WAN = dict(head_dim=128, dtype=torch.bfloat16)
SMALL = WanConfig(
    dim=64, ffn_dim=64, num_heads=1, num_layers=1, in_dim=4, out_dim=4, text_len=4, text_dim=8, freq_dim=16
)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: called with its architecture and the installed Triton."""
    import flexkern.kernels as kernels
    from flexkern.kernels import gpus
    from flexkern.kernels.attention import select

    # kernels that were first imported below would be those of a GPU, for the tests that follow too
    importlib.import_module("flexkern.backends.triton")

    def pretend(arch: int = 90, triton: str = "3.7.1"):
        number = tuple(int(part) for part in triton.split(".")[:2])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
        monkeypatch.setattr(sys.modules["triton"], "__version__", triton)
        monkeypatch.setattr("triton.knobs.runtime.interpret", False)
        monkeypatch.setattr(select, "INTERPRETED", SimpleNamespace(value=False))
        monkeypatch.setattr(select, "triton_version", lambda: number)
        monkeypatch.setattr(choice, "lacking_compiler", lambda: None)
        for module in (select, gpus):
            monkeypatch.setattr(module, "arch_of", lambda device: arch)
        select.forget()
        assert kernels.triton_version() == number

    yield pretend
    select.forget()


def test_a_cpu_gets_sdpa_and_says_so():
    found = choose_backend(device="cpu", **WAN)
    assert str(found) == "backend sdpa: auto, since device 'cpu' is not a CUDA GPU"
    engine = load_engine()
    assert engine.backend_name == "sdpa" and engine.backend is backends.sdpa and engine.backend_choice == found
    assert "backend 'sdpa'" in repr(engine)


TAKEN = {  # architecture, Triton, head dim, dtype -> the backend, and what it says
    "hopper": (90, "3.7.1", {}, "triton", "the Hopper attention kernel, loop 'plain' (compute capability 9.0"),
    "hopper, the newest Triton": (90, "3.9.0", {}, "triton", "the Hopper attention kernel"),
    "hopper, Triton 3.4": (90, "3.4.0", {}, "triton", "the portable attention kernel, tile 64x64"),
    "hopper, a Triton nobody tried": (90, "3.10.0", {}, "triton", "was tried to Triton 3.9, Triton 3.10 is installed"),
    "hopper, Triton 3.2": (90, "3.2.0", {}, "sdpa", "it needs Triton >= 3.4, and Triton 3.2.0 is installed"),
    "hopper, float32": (90, "3.7.1", {"dtype": torch.float32}, "triton", "the portable attention kernel, tile 32x32"),
    "hopper, float64": (90, "3.7.1", {"dtype": torch.float64}, "sdpa", "got float64"),
    "hopper, head dim 96": (90, "3.7.1", {"head_dim": 96}, "sdpa", "powers of two from 16 on, got 96"),
    "hopper, head dim 256": (90, "3.7.1", {"head_dim": 256}, "sdpa", "head dims to 128 on a GPU, got 256"),
    "ampere": (80, "3.7.1", {}, "triton", "its tile was measured on no GPU"),
}


@pytest.mark.triton(3, 4)
@pytest.mark.parametrize("case", TAKEN)
def test_auto_takes_what_can_run_and_says_why(gpu, case):
    arch, triton, model, name, said = TAKEN[case]
    gpu(arch, triton)
    found = choose_backend(device="cuda:0", **(WAN | model))
    assert found.name == name and found.why.startswith("auto") and said in found.why


@pytest.mark.triton(3, 4)
def test_auto_gives_way_where_triton_cannot_be_taken(gpu, monkeypatch):
    gpu()
    with monkeypatch.context() as changed:
        changed.setattr(backends, "find_spec", lambda name: None)
        assert "the package triton is not installed" in choose_backend(device="cuda", **WAN).why
    with monkeypatch.context() as changed:
        changed.setattr("triton.knobs.runtime.interpret", True)
        found = choose_backend(device="cuda", **WAN)
        assert found.name == "sdpa" and "TRITON_INTERPRET is set" in found.why
    with monkeypatch.context() as changed:
        changed.setattr(torch.version, "hip", "6.4")
        assert "built for HIP" in choose_backend(device="cuda", **WAN).why
    with monkeypatch.context() as changed:
        changed.setattr(choice, "_kernel", lambda *_: exec("raise OSError('libtriton.so is gone')"))
        found = choose_backend(device="cuda", **WAN)
        assert found.name == "sdpa" and found.why.endswith("OSError: libtriton.so is gone")
    assert choose_backend(device="cuda", **WAN).name == "triton"


@pytest.mark.triton(3, 4)
def test_auto_gives_way_where_triton_could_not_build_its_launcher(gpu, monkeypatch, tmp_path):
    lacking = choice.lacking_compiler
    gpu()
    monkeypatch.setattr(choice, "lacking_compiler", lacking)
    monkeypatch.setattr("triton.knobs.build.impl", None)
    monkeypatch.setattr("triton.knobs.build.cc", None)
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    found = choose_backend(device="cuda", **WAN)
    assert found.name == "sdpa" and "neither gcc nor clang, nor one that CC names" in found.why
    assert choose_backend("triton", "cuda", **WAN).name == "triton", "by name it is tried: its cache may have it built"
    monkeypatch.setattr(choice.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(choice.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert f"there is no {tmp_path}/Python.h" in choose_backend(device="cuda", **WAN).why
    (tmp_path / "Python.h").touch()
    assert choose_backend(device="cuda", **WAN).name == "triton"


@pytest.mark.triton(3, 4)
def test_an_old_gpu_gets_sdpa(gpu, monkeypatch):
    from flexkern.kernels import gpus

    arch_of, ask = gpus.arch_of, gpus._arch_of
    gpu()
    monkeypatch.setattr(gpus, "arch_of", arch_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    ask.cache_clear()
    found = choose_backend(device="cuda", **WAN)
    ask.cache_clear()
    assert found.name == "sdpa" and "need compute capability 8.0 or newer, got 7.5" in found.why


@pytest.mark.triton(3, 4)
def test_a_backend_that_is_named_is_taken_or_refused(gpu):
    gpu()
    assert choose_backend("sdpa", "cuda", **WAN) == Choice(name="sdpa", why="asked for by name")
    found = choose_backend("triton", "cuda", **WAN)
    assert found.name == "triton" and found.why.startswith("asked for by name; the Hopper attention kernel")
    for model, says in (({"head_dim": 96}, "got 96"), ({"dtype": torch.float64}, "got float64")):
        with pytest.raises(ValueError, match=f"backend 'triton' is not there: .*{says}"):
            choose_backend("triton", "cuda", **(WAN | model))
    with pytest.raises(ValueError, match="got device 'cpu'"):
        choose_backend("triton", "cpu", **WAN)
    with pytest.raises(ValueError, match="no backend has that name"):
        choose_backend("fast", "cuda", **WAN)


@pytest.mark.triton(3, 4)
def test_an_engine_refuses_a_named_backend_before_anything_runs():
    """Heads of 96 channels, in the interpreter, which takes triton on a CPU."""
    model = CausalWan(replace(SMALL, dim=96)).eval()
    with pytest.raises(ValueError, match="backend 'triton' is not there: the kernels take head dims .* got 96"):
        Engine(model, backend="triton")
    assert Engine(model).backend_name == "sdpa"


def test_a_name_is_checked_before_the_model_is_known():
    validate_backend(AUTO, "cpu")
    validate_backend("sdpa")
    with pytest.raises(ValueError, match="'autos' is not there: no backend has that name.+ did you mean 'auto'"):
        validate_backend("autos")


def test_the_choice_is_logged_once(caplog):
    choice._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="flexkern"):
        for _ in range(2):
            backend, found = open_backend(device="cpu", **WAN)
        assert open_backend(found, "cpu", **WAN) == (backend, found)
        open_backend("reference", "cpu", **WAN)
    said = [record.getMessage() for record in caplog.records]
    assert said == [str(found), "backend reference: asked for by name"] and backend is backends.sdpa


def test_auto_changes_no_bit_on_a_cpu():
    """What was the default is still what runs there."""
    torch.manual_seed(0)
    model = CausalWan(SMALL).eval().requires_grad_(False)
    text = torch.randn(1, SMALL.text_len, SMALL.text_dim)
    begin = lambda **options: Engine(model, size=(4, 4), **options).session(text, preset="flex", frames=6)
    unnamed, named = begin(), begin(backend="sdpa")
    for _ in range(2):
        assert torch.equal(unnamed.step().latents, named.step().latents)
