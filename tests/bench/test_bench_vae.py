"""The VAE's bench on a CPU: rows of every decoder that runs here, and the operations that it counts."""

import math

import bench_vae
import pytest
import torch
from recorder import StandIn
from torch.utils.flop_counter import FlopCounterMode
from vae_split import NAMED, split

from flexkern.model import tiny_decoder
from flexkern.model.vae.net import PUBLISHED, DecoderNet, Past, Sizes


@pytest.fixture(scope="module")
def module():
    pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
    return bench_vae.make_module(is_tiny=True)


def test_without_diffusers_ours_is_timed_and_judged_by_itself(monkeypatch):
    monkeypatch.setattr(bench_vae, "find_spec", lambda name: None)
    own = bench_vae.make_module(is_tiny=True)
    weights = [net.decoder.conv_out.weight for net in (own.net(), own.net(), own.bfloat16().net())]
    assert torch.equal(*weights[:2]) and torch.equal(weights[0].bfloat16(), weights[2])
    rows = {row.provider: row for row in bench_vae.bench(own, "16x24", (2, 3), ["flexkern", "diffusers"], 1)}
    assert rows["flexkern"].note == "" and rows["flexkern"].ms > 0 and 0 < rows["flexkern"].error < 0.1
    assert rows["diffusers"].note == "absent: the package 'diffusers' is not installed"


def test_a_row_for_every_decoder(module, monkeypatch):
    def broken(module):
        raise RuntimeError("no such\nlayout")

    def wrong(module):
        decoder = bench_vae.ours(module)
        monkeypatch.setattr(decoder, "decode", lambda latents: type(decoder).decode(decoder, latents) + 0.1)
        return decoder

    monkeypatch.setitem(bench_vae.PROVIDERS, "broken", broken)
    monkeypatch.setitem(bench_vae.PROVIDERS, "wrong", wrong)
    names = ["flexkern", "diffusers", "broken", "wrong", "flexkern, graph"]
    rows = {row.provider: row for row in bench_vae.bench(module, "16x24", (2, 3), names, 1)}
    assert list(rows) == names
    for name in names[:2]:
        row = rows[name]
        assert row.note == "" and row.ms > 0 and row.pictures_s == pytest.approx(12_000 / row.ms)
        assert 0 < row.error < 0.1 and row.peak_gb > 0 and row.roof_percent > 0
        assert row.convolution_ms > 0 and row.copy_ms > 0 and row.ours_ms == 0
        # which they are, a busy machine decides: an operator that waits for a core takes longest
        assert row.longest.count(" ms") == NAMED
    assert rows["broken"].note == "failed: RuntimeError: no such layout" and math.isnan(rows["broken"].ms)
    assert rows["flexkern, graph"].note == "absent: needs a CUDA GPU" and math.isnan(rows["flexkern, graph"].ms)
    assert rows["wrong"].note.startswith("wrong: mean error") and math.isnan(rows["wrong"].ms)
    assert {row.shape for row in rows.values()} == {"16x24 3 latents bfloat16, random weights"}


def test_graphs_are_timed_where_they_are_replayed(module, monkeypatch):
    def rows(stand_in):
        monkeypatch.setattr("flexkern.model.vae.decoder.find_recorder", lambda net: lambda: stand_in)
        return bench_vae.bench(module, "16x24", (2, 3), ["flexkern", "flexkern, graph"], 1)

    stand_in = StandIn()
    monkeypatch.setattr(bench_vae, "NEED_GPU", set())
    plain, replayed = rows(stand_in)
    assert replayed.note == "" and replayed.ms > 0 and replayed.error == plain.error
    assert len(stand_in.graphs) == 1 and stand_in.replays == 1 + 2 + 1  # judged, timed, traced
    launched = rows(StandIn(fails=RuntimeError("no")))[1]
    assert launched.note == "not replayed: a capture failed with RuntimeError: no" and math.isnan(launched.ms)


def test_a_tiny_decoder_is_timed_and_not_judged(module):
    net = tiny_decoder._Net(16, [8, 8, 8, 8])
    make = lambda: tiny_decoder.TinyDecoder(net.bfloat16())
    ours, preview = bench_vae.bench(module, "16x24", (2, 3), ["flexkern"], 1, make)
    assert preview.provider == "tiny decoder" and preview.ms > 0 and preview.note == "" and preview.pictures_s > 0
    assert math.isnan(preview.error) and math.isnan(preview.roof_percent) and ours.roof_percent > 0


def test_a_trace_is_cut_by_kind_of_kernel():
    event = lambda name, at, dur: {"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": dur}
    events = [
        event("void sm90_xmma_fprop_implicit_gemm<x>(int)", 0, 2000),
        event("_add_norm_silu", 2000, 500),
        event("Memcpy DtoD", 2200, 600),  # 300 of it beside ours
        event("nvjet_tst", 3000, 100),
        event("vectorized_elementwise_kernel", 4000, 40),
    ]
    found = split(events, "cuda")
    parts = {"convolution": 2.0, "ours": 0.5, "copy": 0.3, "product": 0.1, "attention": 0.0, "other": 0.04}
    assert {name: found[f"{name}_ms"] for name in parts} == pytest.approx(parts)
    assert found["longest"] == "sm90_xmma_fprop_implicit_gemm 2 ms, Memcpy DtoD 0.6 ms, _add_norm_silu 0.5 ms"
    assert split([{"ph": "X", "cat": "cpu_op", "name": "aten::conv3d", "ts": 0, "dur": 9}], "cuda") == {}


@pytest.mark.parametrize("sizes", [PUBLISHED, Sizes(4, (8, 8, 4), 1, (False, True))], ids=["published", "other"])
def test_operations_are_those_of_the_network(sizes):
    with torch.device("meta"):
        net = DecoderNet(sizes).requires_grad_(False)
        net.prepare(torch.ones(sizes.latent), torch.ones(sizes.latent), torch.float32)
    latents, past, at_once = torch.empty(1, 3, sizes.latent, 6, 10, device="meta"), Past(), [99] * len(sizes.widths)
    list(net(latents, past, at_once))
    with FlopCounterMode(display=False) as counter:
        list(net(latents, past, at_once))
    assert counter.get_total_flops() == bench_vae.count_flops(sizes, 3, 6, 10)
