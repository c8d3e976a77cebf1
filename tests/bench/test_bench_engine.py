"""The engine's bench on a CPU: rows of every path that runs here, a trace in parts, operations, slopes, the table."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench_engine
import breakdown
import engine_paths
import harness
import machine
import pytest
import roofs
import tables
import torch
from breakdown import ChunkRow, Parts, count_flops, cut, slope, student
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexkern.engine import Engine
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.policies import get_preset

ABOUT = dict(gpu="GPU X", driver="1", torch="2", triton="3", commit="abc", day="2026-01-01")
PARTS = ("attention", "linear", "other", "vae", "idle")
ODD = WanConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_len=5, text_dim=8, freq_dim=6)


@pytest.fixture
def engines(monkeypatch):
    """sdpa, a path that is not there, one that is wrong, and one that breaks; triton is too slow in its interpreter."""

    class Wrong(engine_paths.OfEngine):
        def step(self):
            made = super().step()
            self.latents = self.latents + 0.1
            return made

    class Broken(engine_paths.OfEngine):
        def step(self):
            raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(engine_paths, "ENGINES", {"sdpa": {"backend": "sdpa"}, "missing": {"backend": "xformers"}})
    known = engine_paths.ways()
    more = {"wrong": lambda setup: Wrong(setup, backend="sdpa"), "broken": lambda setup: Broken(setup, backend="sdpa")}
    monkeypatch.setattr(bench_engine, "ways", lambda: {**known, **more})


def run(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--json", "--out", str(folder), *options])
    bench_engine.main()
    return {row.provider: row for row in harness.load(folder / "engine.csv", ChunkRow)}


def test_a_row_for_every_path(engines, tmp_path, monkeypatch, capfd):
    pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
    kept = tmp_path / "kept" / "trace.json"
    rows = run(monkeypatch, tmp_path, "--trace", str(kept))
    assert list(rows) == ["sdpa", "research", "missing", "wrong", "broken"]
    assert {row.shape for row in rows.values()} == {"tiny 32x32 longlive window 6 bfloat16, random weights"}
    sdpa, research = rows["sdpa"], rows["research"]
    for row in (sdpa, research):
        assert row.note == "" and 0 < row.error < 0.05 and row.chunks == 3 and row.threads == torch.get_num_threads()
        assert row.ms_20 <= row.ms <= row.ms_80 <= row.ms_95 and row.denoise_ms < row.ms
        assert row.pictures_s == pytest.approx(12_000 / row.ms, rel=1e-3)
        assert row.denoise_fps == pytest.approx(12_000 / row.denoise_ms, rel=1e-3)
        assert all(getattr(row, f"{part}_ms") > 0 for part in PARTS[:4]) and row.idle_ms >= 0
        assert row.roof_percent == pytest.approx(100 * row.roof_ms / row.denoise_ms, rel=1e-3)
        assert row.over_roof_percent == pytest.approx(100 * (row.denoise_ms / row.roof_ms - 1), rel=1e-3)
        assert 0 < row.peak_gb < 50 and breakdown.kind_of(row.path) == "attention" and math.isnan(row.slope_ms)
        assert math.isnan(row.device_gb) is (roofs.DEVICE == "cpu")
        assert (row.interpreter == "yes") is (row.clocks == "") is (roofs.DEVICE == "cpu")
    assert sdpa.first_picture_ms > 0 and research.first_picture_ms > research.chunks * research.ms_20
    assert rows["missing"].note.startswith("absent: ") and rows["wrong"].note.startswith("wrong: sdpa is off by")
    assert rows["broken"].note == "failed: RuntimeError: no such kernel"
    assert all(math.isnan(rows[name].ms) for name in ("missing", "wrong", "broken")) and rows["wrong"].error > 0.05
    assert cut(json.loads(kept.read_text())["traceEvents"]).busy > 0
    assert [json.loads(line)["provider"] for line in capfd.readouterr().out.splitlines()] == list(rows)


def test_the_engine_shows_its_first_chunk_at_once_and_the_research_pipeline_after_the_last_one():
    made = [engine_paths.Made(ms=ms, denoise_ms=ms) for ms in (5.0, 6.0)]
    for decoding, first in ((0.0, 4.0), (2.0, 3.0 + 4.0 + 5.0 + 6.0 + 4 * 2.0)):
        racer = bench_engine.Racer(
            way=SimpleNamespace(finish=lambda decoding=decoding: decoding), first=4.0, before=[3.0, 4.0], own=0.0,
            peak=0.0, device=0.0, taken=made,
        )  # fmt: skip
        racer.finish()
        assert (racer.first, racer.decoding) == (first, decoding)


def test_without_a_vae_the_engine_is_timed_alone(engines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "find_spec", lambda name: None)
    rows = run(monkeypatch, tmp_path, "--presets", "flex", "--paths", "sdpa")
    row = rows.pop("sdpa")
    assert not rows and row.note == "nothing is decoded" and row.vae_ms == 0 and row.ms >= row.denoise_ms > 0
    assert (
        row.shape.endswith(", no VAE") and math.isnan(row.pictures_s) and row.denoise_fps > 0
    )  # no pictures come of it
    assert "over the roof" in (said := bench_engine.describe(row)) and "nan" not in said
    drift = dict(slope_ms=1.0, slope_ms_low=-1.0, slope_ms_high=3.0, slope_mb=2.0)
    assert "over 100 chunks +1 ms (-1 to +3), +2 MB; " in bench_engine.describe(replace(row, **drift))


def event(cat, name, start, length, correlation=None, thread=1):
    args = {} if correlation is None else {"correlation": correlation}
    return dict(ph="X", cat=cat, name=name, ts=start, dur=length, tid=thread, args=args)


def test_a_trace_is_cut_by_kind_of_kernel():
    """Kernels run long after their launch, on a second stream too; each moment counts once."""
    launch = lambda at, number, cat="cuda_runtime": event(cat, "launch", at, 1, number)
    flash = event("kernel", "void pytorch_flash::flash_fwd_kernel<Traits<128>, 1>(Params)", 1000, 2000, 1, thread=7)
    events = [
        dict(ph="M", name="process_name"),
        event("user_annotation", breakdown.VAE, 100, 50), event("gpu_user_annotation", breakdown.VAE, 9000, 50),
        launch(10, 1), launch(20, 2, "cuda_driver"), launch(30, 3), launch(40, 4), launch(120, 5), launch(130, 6),
        flash, event("kernel", "_frame_attention_hopper", 3000, 4000, 2, thread=7),
        event("kernel", "nvjet_tst_192x192_64x4", 6000, 3000, 3, thread=8),  # 1000 of it beside attention
        event("gpu_memcpy", "Memcpy HtoD", 9000, 500, 4, thread=7),
        event("kernel", "sm80_xmma_fprop_implicit_gemm", 9500, 5000, 5, thread=7),
        event("kernel", "_add_norm_silu", 14500, 250, 6, thread=7),
        event("cpu_op", "aten::linear", 10, 90000),
    ]  # fmt: skip
    found = Parts(attention=6.0, linear=2.0, other=0.5, vae=5.25, attention_kernel="_frame_attention_hopper")
    assert cut(events, "cuda") == found and found.busy == 13.75
    assert cut([flash], "cuda").attention_kernel == "pytorch_flash::flash_fwd_kernel"
    unseen = cut([event("cpu_op", "aten::linear", 10, 90)], "cuda")  # a profiler that is not let at the GPU
    assert math.isnan(unseen.busy) and unseen.attention_kernel == ""
    operators = [
        event("user_annotation", breakdown.VAE, 5000, 1000),
        event("cpu_op", "aten::linear", 0, 1000), event("cpu_op", "aten::addmm", 100, 800),
        event("cpu_op", "aten::scaled_dot_product_attention", 1000, 500), event("cpu_op", "aten::mul", 1200, 900),
        event("cpu_op", "aten::addmm", 5100, 200),
    ]  # fmt: skip
    cpu = Parts(linear=1.0, attention=0.5, other=0.6, vae=0.2, attention_kernel="aten::scaled_dot_product_attention")
    assert cut(operators, "cpu") == cpu


@pytest.mark.parametrize("name", [
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "sm90_xmma_gemm_bf16bf16_bf16f32",
    "void cublasLt::splitKreduce_kernel<32, 16>", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "aten::addmm",
])  # fmt: skip
def test_products_are_known_by_name(name):
    assert breakdown.kind_of(name) == "linear"


@pytest.mark.parametrize("name, kind", [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
    ("_frame_attention", "attention"), ("_merge", "attention"), ("_norm_rope_write", "other"), ("_modulate", "other"),
    ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "other"), ("_gate_residual", "other"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "other"),
])  # fmt: skip
def test_other_kernels_are_known_by_name(name, kind):
    assert breakdown.kind_of(name) == kind


def test_operations_are_those_of_a_chunk():
    model = CausalWan(ODD).eval()
    preset = get_preset("longlive", {"retention.window": 7, "retention.sink": 1})
    session = Engine(model, backend="sdpa", size=(4, 6)).session(torch.randn(1, 5, 8), preset=preset)
    for _ in range(2):
        session.step()
    # torch counts the products of attention only where it makes them one by one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        session.step()
    assert counter.get_total_flops() == count_flops(ODD, (4, 6), frames=3, window=7, steps=4, text=5)


def test_a_slope_and_its_interval():
    low, high = slope([5.0] * 5)[1:]
    assert low == high == 0 and all(map(math.isnan, slope([1.0, 2.0, 3.0, 4.0])))
    noisy = [10 + 0.03 * i + (0.5 if i % 2 else -0.5) for i in range(200)]
    found, low, high = slope(noisy)
    assert found == pytest.approx(3.0, abs=0.05) and low < 3.0 < high
    # numpy's covariance: 0.5 * sqrt(12 / 200 ** 3) * 1.972, over 100 steps
    assert high - low == pytest.approx(2 * 100 * 0.5 * math.sqrt(12 / 200**3) * 1.972, rel=0.02)
    for freedom, exact in ((3, 3.182), (5, 2.571), (10, 2.228), (100, 1.984)):
        assert student(freedom) == pytest.approx(exact, rel=0.01)


def chunk_row(provider, preset, window, **fields):
    shape = f"1.3B 480x832 {preset} window {window} bfloat16, random weights"
    return ChunkRow(kernel="engine", provider=provider, shape=shape, **fields, **ABOUT)


def test_the_table_says_what_was_met(tmp_path):
    steady = dict(slope_ms=0.1, slope_ms_low=-0.2, slope_ms_high=0.4, slope_mb=0.0, slope_mb_low=0.0, slope_mb_high=0.0)
    timed = dict(ms=300.0, ms_95=310.0, denoise_ms=200.0, denoise_fps=60.0, pictures_s=40.0, chunks=90)
    timed |= dict(peak_gb=11.5, device_gb=13.0)
    parts = dict(attention_ms=110.0, linear_ms=60.0, other_ms=24.0, vae_ms=90.0, idle_ms=16.0, first_picture_ms=290.0)
    roof = dict(roof_percent=90.0, over_roof_percent=11.1)
    rows = [
        chunk_row("triton", "longlive", 12, **timed, **parts, **roof, **steady),
        chunk_row("research", "longlive", 12, ms=800.0, denoise_ms=500.0, denoise_fps=24.0),
        chunk_row("sdpa", "longlive", 12, note="wrong: sdpa is off by 0.1"),
        chunk_row("flash-attn", "longlive", 12, note="absent: it is not installed"),
    ]
    harness.save(rows, tmp_path / "engine.csv")
    text = tables.table("engine", tmp_path)
    shape = rows[0].shape
    assert (
        f"| {shape} | triton | 300 | 310 | 60 | 40 | 290 | 11.5 | 13.0 | 90 |" in text
        and f"| {shape} | sdpa | wrong |" in text
    )
    assert "| triton | 110.0 | 60.0 | 24.0 | 90.0 | 16.0 | +0.1 (-0.2 to +0.4) | +0 (+0 to +0) | 90 |" in text
    assert "flash-attn" not in text
    for line in (
        "denoising, pictures a second | >= 58 | 60.0 | yes |", "denoising, % over the roof | <= 15 | 11 | yes |",
        "GPU idle, % of a chunk | <= 2 | 5.3 | no |", "denoising, times the research pipeline | >= 2.5 | 2.50 | yes |",
        "ms over 100 chunks | 0 | +0.1 (-0.2 to +0.4) | yes |", "MB over 100 chunks | 0 | +0 (+0 to +0) | yes |",
    ):  # fmt: skip
        assert f"| window 12, {line}" in text
    assert text.count("| not yet measured |  |") == 6  # window 21


def test_memory_of_the_process():
    assert 1e7 < machine.resident() <= machine.peak_resident() * 1.01
