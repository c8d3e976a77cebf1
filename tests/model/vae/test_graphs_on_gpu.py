"""Chunks that a GPU replays: the bits of launched ones, without waiting, on any stream and from any thread."""

import threading

import pytest
import torch

from flexkern.model.vae.decoder import WanDecoder
from flexkern.testing import assert_as_accurate

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def net(request, file):
    return WanDecoder.from_pretrained(file, device="cuda", dtype=request.param).net


def draw(frames, *, size=(16, 24), batch=1, seed=5):
    latents = torch.randn(batch, frames, 16, *size, generator=torch.Generator().manual_seed(seed))
    return latents.cuda()


def same(decoder, launched, latents, sizes):
    return all(torch.equal(decoder(part), launched(part)) for part in latents.split(sizes, dim=1))


@pytest.mark.parametrize("pictures", [4, 12])
def test_graphs_on_a_gpu_give_the_same_bits(pictures, net, monkeypatch):
    monkeypatch.setattr(WanDecoder, "pictures_at_once", lambda *_, **__: pictures)
    decoder, launched = WanDecoder(net, graphs=True), WanDecoder(net)
    for options in ({}, {"batch": 2}, {"size": (10, 12)}):
        assert same(decoder, launched, draw(19, **options), [3, 3, 3, 3, 1, 3, 3])
        assert decoder.graphs.why_not is None and decoder.graphs.count == 1 and decoder.graphs.bytes > 0
        state, resumed = decoder.state(), decoder.another()
        resumed.restore(state)
        kept, more = {name: tensor.clone() for name, tensor in state.items()}, draw(9, seed=6, **options)
        made = [decoder.decode(part) for part in more.split(3, dim=1)]
        for part, pictures_made in zip(more.split(3, dim=1), made, strict=True):
            assert torch.equal(resumed.decode(part), pictures_made)
            assert torch.equal(launched.decode(part), pictures_made)
        assert resumed.graphs.count == 1 and all(torch.equal(tensor, kept[name]) for name, tensor in state.items())
        decoder.reset()
        launched.reset()


@pytest.mark.triton(3, 6)
@pytest.mark.parametrize("graphs", [False, True])
def test_our_own_convolutions_make_the_same_pictures(graphs, file):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    latents = draw(9, size=(6, 10))
    half = dict(device="cuda", dtype=torch.bfloat16)
    library = WanDecoder.from_pretrained(file, **half)
    own = WanDecoder.from_pretrained(file, convolutions="hopper", graphs=graphs, **half)
    exact = WanDecoder.from_pretrained(file, dtype=torch.float64).decode(latents.cpu())
    made, entitled = (
        torch.cat([decoder.decode(part) for part in latents.split(3, dim=1)], dim=1).cpu() for decoder in (own, library)
    )
    assert any(conv.own for conv in own.net.causal().values())
    assert not graphs or (own.graphs.count, own.graphs.why_not) == (1, None)
    assert_as_accurate(made, exact, entitled)


def test_torch_sees_no_chunk_wait(net):
    decoder, latents = WanDecoder(net, graphs=True), draw(3)
    for _ in range(3):
        decoder(latents)  # compiles, and captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pictures = [decoder(latents) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder.graphs.why_not is None and not torch.equal(pictures[0], torch.zeros_like(pictures[0]))


def test_a_run_that_fails_on_the_way_leaves_the_pictures_as_they_would_be(net):
    decoder = WanDecoder(net, graphs=True)

    def fails(*args):
        yield from net(*args)
        raise torch.OutOfMemoryError("no more")

    decoder.graphs.net = fails
    assert same(decoder, WanDecoder(net), draw(18), 3)
    assert decoder.graphs.why_not == "a capture failed with OutOfMemoryError: no more"


def test_streams_that_wait_for_each_other(net):
    decoder, launched, latents = WanDecoder(net, graphs=True), WanDecoder(net), draw(21)
    expected, made = [launched(part) for part in latents.split(3, dim=1)], []
    streams = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    for i, part in enumerate(latents.split(3, dim=1)):
        streams[i % 3].wait_stream(streams[(i - 1) % 3])
        with torch.cuda.stream(streams[i % 3]):
            made.append(decoder(part))
    torch.cuda.synchronize()
    assert decoder.graphs.why_not is None and all(map(torch.equal, made, expected))


def test_threads_decode_side_by_side(net):
    """Each with a decoder and a stream of its own: one may capture while another launches or replays."""
    videos = [draw(24, seed=seed) for seed in range(3)]
    launched = WanDecoder(net)
    expected = []
    for latents in videos:
        launched.reset()
        expected.append([launched(part) for part in latents.split(3, dim=1)])
    decoders, made = [WanDecoder(net, graphs=True) for _ in videos], [[] for _ in videos]
    torch.cuda.synchronize()

    def decode(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            made[i] += [decoders[i](part) for part in videos[i].split(3, dim=1)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decoder.graphs.why_not for decoder in decoders] == [None] * 3
    assert all(
        torch.equal(torch.cat(mine, 1), torch.cat(theirs, 1)) for mine, theirs in zip(made, expected, strict=True)
    )
