"""flexkern warmup: what it refuses, what it makes of its options, and what it says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexkern import warmup as work
from flexkern.cli.warmup import Warmup, summary, told

pytestmark = pytest.mark.triton(3, 4)


@pytest.fixture
def prepared(monkeypatch):
    """What would be run, without a GPU and without running it: (sizes, family, options) of every stand-in."""
    seen = SimpleNamespace(stand_ins=[], lived=[], tuned=[], decoded=[])

    def stand_in(config, family, **options):
        seen.stand_ins.append((config, family, options))
        return SimpleNamespace(backend_choice="backend triton: because")

    # where triton can be chosen: in the interpreter on a CPU
    monkeypatch.setattr(Warmup, "chosen_device", lambda self: "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(work, "stand_in", stand_in)
    monkeypatch.setattr(work, "live", lambda engine, preset: seen.lived.append(preset))
    monkeypatch.setattr(work, "decode", lambda family, **options: seen.decoded.append((family, options)))
    monkeypatch.setattr(work, "tune", lambda engine, preset, *, tell: seen.tuned.append(preset) or tell("a tile"))
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
def test_without_a_gpu_it_says_so_in_one_sentence(flexkern_, monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    says = "flexkern: error: TRITON_INTERPRET is set: Triton interprets its kernels, and nothing compiles\n"
    assert flexkern_("warmup", "--config", "1.3B") == (2, "", says)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    status, out, err = flexkern_("warmup")
    assert (status, out) == (2, "") and err.startswith(
        "flexkern: error: kernels are compiled for a CUDA GPU, and torch"
    )
    assert err.count("\n") == 1
    monkeypatch.setattr("flexkern.backends.unfit_triton", lambda: "it needs Triton >= 3.4")
    assert flexkern_("warmup")[2] == "flexkern: error: nothing can be compiled: it needs Triton >= 3.4\n"


REFUSED = {
    "--model self-forcing": "--model self-forcing needs --weights PATH, or --config 1.3B",
    "--config 1.3B --weights x.pt": "give --config or --weights, not both",
    "--size 480x832": "--size is for checkpoints, not for the demo",
    "--dtype float16": "--dtype is for checkpoints, not for the demo",
    "--config 1.3B --size 48": "--size must be HEIGHTxWIDTH in pixels",
    "--config 1.3B --size 481x832": "481",
    "--config 1.3B --chunk 0": "chunk must be",
    "--preset fle": "did you mean 'flex'",
    "--config 13B": "13B",
    "--model none.safetensors": "none.safetensors",
    "--model self-forcing --weights none.pt": "none.pt",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(flexkern_, prepared, words):
    status, out, err = flexkern_("warmup", *words.split())
    assert status == 2 and not out and REFUSED[words] in err and not prepared.stand_ins


def test_options_become_the_model_that_is_run(flexkern_, prepared):
    words = "--config 14B --size 720x1280 --preset longlive --retention.window 15 --chunk 1 --dtype float16"
    status, out, err = flexkern_("warmup", *words.split())
    ((config, family, options),) = prepared.stand_ins
    assert status == 0 and (config.dim, config.num_layers) == (5120, 40)
    assert (family.size, family.chunk, options["dtype"], options["backend"]) == ((90, 160), 1, torch.float16, "triton")
    assert prepared.decoded == [(family, {key: options[key] for key in ("dtype", "device")})]
    (preset,) = prepared.lived
    assert (preset.name, preset.retention.window) == ("longlive", 15) and not prepared.tuned
    assert err.splitlines() == [
        "flexkern: 40 heads of 128, float16, 720x1280, chunks of 1, preset longlive",
        "flexkern: backend triton: because",
    ]


def test_the_demo_is_the_default_and_tiles_come_first(flexkern_, prepared, tiny):
    status, out, err = flexkern_("warmup", "--tune")
    (config, family, options), again = prepared.stand_ins
    assert status == 0 and (config.dim, family.name, options["dtype"]) == (64, "demo", torch.float32)
    assert again == (config, family, options), "another engine, which takes the tile that was found"
    assert not prepared.decoded, "the demo has no VAE"
    assert [preset.name for preset in prepared.tuned] == ["flex"] and err.endswith("flexkern: a tile\n")
    assert flexkern_("warmup", "--model", Path(tiny))[0] == 0


def test_every_kernel_is_told_with_its_seconds():
    from flexkern.kernels.compiles import Compiled

    versions = [("_merge", 1.25, False), ("_frame_attention", 9.0, False), ("_merge", 0.01, True)]
    found = [Compiled(kernel=name, seconds=seconds, cached=cached) for name, seconds, cached in versions]
    assert told(found[0]) == "_merge: compiled in 1.2 s" and told(found[2]) == "_merge: was in Triton's cache"
    assert [" ".join(line.split()) for line in summary(found).splitlines()] == [
        "_merge 1 compiled in 1.2 s, 1 were there",
        "_frame_attention 1 compiled in 9.0 s, 0 were there",
        "in all 2 compiled in 10.2 s, 1 were there",
    ]
    assert summary([]).split()[:3] == ["in", "all", "0"]
