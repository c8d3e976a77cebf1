"""Chunks that are replayed as a graph give the bits of those that are launched, whatever comes between them."""

import logging
import re

import pytest
import torch
from recorder import StandIn, Waits
from safetensors.torch import load, save

from flexkern import capture
from flexkern.model.vae import ops
from flexkern.model.vae.decoder import WanDecoder
from flexkern.model.vae.memory import Cut


@pytest.fixture(scope="module")
def net(file):
    return WanDecoder.from_pretrained(file).net


@pytest.fixture
def start(net, monkeypatch):
    """Makes a decoder whose chunks a recorder captures, or none."""

    def begin(stand_in=None, **options):
        monkeypatch.setattr("flexkern.model.vae.decoder.find_recorder", lambda net: lambda: stand_in)
        return WanDecoder(net, graphs=stand_in is not None, **options)

    return begin


@pytest.fixture
def at_once(monkeypatch):
    """Sets how many pictures every decoder computes together."""
    return lambda count: monkeypatch.setattr(WanDecoder, "pictures_at_once", lambda *_, **__: count)


def draw(frames, batch=1, size=(1, 2), seed=5):
    return torch.randn(batch, frames, 16, *size, generator=torch.Generator().manual_seed(seed))


def video(decoder, latents, sizes):
    return torch.cat([decoder(part) for part in latents.split(sizes, dim=1)], dim=1)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(
    ("sizes", "pictures", "captured", "replays"),
    [
        ([1] * 6, 12, 1, 4),
        ([3, 3, 3, 3], 12, 1, 2),
        ([1, 3, 3, 3, 3, 1], 2, 1, 3),  # the graph has six pieces of two pictures
        ([3, 3, 3, 1, 3, 3], 12, 1, 3),  # the one between is launched, on the memory of the graph
        ([1, 2, 2, 2, 3, 3, 3], 4, 2, 4),
        ([2, 1, 2, 1, 2, 1], 12, 0, 0),
    ],
    ids=str,
)
def test_any_chunks_give_the_same_bits(sizes, pictures, captured, replays, start, at_once):
    at_once(pictures)
    latents, stand_in = draw(sum(sizes), batch=2), StandIn()
    decoder, launched = start(stand_in), start()
    for part in latents.split(sizes, dim=1):
        assert torch.equal(decoder.decode(part), launched.decode(part)) and decoder.finite
    assert (len(stand_in.graphs), stand_in.replays) == (captured, replays)
    assert equal(decoder.state(), launched.state())


def test_another_video_is_replayed_from_its_second_chunk_on(start):
    stand_in, launched = StandIn(), start()
    decoder = start(stand_in)
    video(decoder, draw(9), 3)
    assert (decoder.graphs.count, stand_in.replays, decoder.graphs.why_not) == (1, 1, None)
    decoder.reset()
    other = draw(9, seed=6)
    assert torch.equal(video(decoder, other, 3), video(launched, other, 3))
    assert (len(stand_in.graphs), stand_in.replays) == (1, 3)


def test_another_size_is_captured_anew(start):
    stand_in, launched = StandIn(), start()
    decoder = start(stand_in)
    for count, options in enumerate([{}, {"size": (2, 1)}, {"batch": 2}, {}], 1):
        latents = draw(8, **options)
        assert torch.equal(video(decoder, latents, 2), video(launched, latents, 2))
        assert len(stand_in.graphs) == count and decoder.graphs.count == 1 and stand_in.replays == 2 * count
        decoder.reset()
        launched.reset()
    other = draw(8).double()  # as the decoder takes them, but a graph reads float32
    assert torch.equal(video(decoder, other, 2), video(launched, other, 2)) and len(stand_in.graphs) == 5


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_restored_decoder_goes_on_bit_for_bit(done, start):
    latents = draw(2 * done + 8)
    stream, resumed, launched = start(StandIn()), start(StandIn()), start()
    video(resumed, draw(8, seed=6), 2)  # a graph, and another past
    video(stream, latents[:, : 2 * done], 2)
    saved, state = load(save(stream.state())), stream.state()
    resumed.restore(state)
    launched.restore(saved)
    for part in latents[:, 2 * done :].split(2, dim=1):
        pictures = stream(part)
        assert torch.equal(resumed(part), pictures) and torch.equal(launched(part), pictures)
    assert equal(state, saved)  # neither who gave it nor who got it has written to it
    assert equal(stream.state(), launched.state()) and equal(resumed.state(), launched.state())


def test_what_is_handed_out_no_replay_overwrites(start):
    stand_in = StandIn()
    decoder, latents = start(stand_in), draw(10)
    pictures, floats = [], []
    for part in latents.split(1, dim=1):
        pictures.append(decoder(part))
        if len(pictures) > 3:
            floats.append(decoder.decode(part))
    copies = [tensor.clone() for tensor in (*pictures, *floats)]
    flag = decoder.finite
    decoder.decode(torch.full_like(latents[:, :1], torch.nan))
    assert stand_in.replays > 10 and all(map(torch.equal, (*pictures, *floats), copies))
    assert flag and not decoder.finite


def test_two_decoders_of_one_network_take_turns(start):
    launched, latents = (start(), start()), (draw(8), draw(8, seed=6))
    first = start(StandIn())
    second = first.another()
    assert second.graphs not in (None, first.graphs) and launched[0].another().graphs is None
    for part in range(4):
        for decoder, plain, z in zip((first, second), launched, latents, strict=True):
            chunk = z[:, 2 * part : 2 * part + 2]
            assert torch.equal(decoder(chunk), plain(chunk))
    assert first.graphs.count == second.graphs.count == 1


def test_modes_of_torch_may_change_between_chunks(start):
    latents, expected = draw(10), video(start(), draw(10), 2)
    for modes in ("iiioo", "oooii", "ioioi"):  # inside and outside of inference mode
        decoder, made = start(StandIn()), []
        for mode, part in zip(modes, latents.split(2, dim=1), strict=True):
            with torch.inference_mode(mode == "i"):
                made.append(decoder(part))
        assert decoder.graphs.why_not is None and torch.equal(torch.cat(made, dim=1), expected)
        assert not any(tensor.is_inference() for tensor in decoder._kept.held.values())


def test_nothing_in_a_chunk_waits(start, net):
    """So that it can be captured, and the host runs ahead of what is launched."""
    decoder, latents = start(StandIn()), draw(12)
    with Waits(*net.parameters(), *net.buffers(), latents) as waits:
        pictures = [decoder(part) for part in latents.split(3, dim=1)]
        state = decoder.state()
    assert waits.found == [] and all(map(waits.is_there, (*pictures, *state.values())))


@pytest.mark.triton(3, 4)
def test_the_kernels_are_replayed(file, device, monkeypatch):
    monkeypatch.setattr(ops, "fused", lambda device: True)
    latents, stand_in, launched = draw(3, size=(1, 1)), StandIn(), WanDecoder.from_pretrained(file, device=device)
    monkeypatch.setattr("flexkern.model.vae.decoder.find_recorder", lambda net: lambda: stand_in)
    assert torch.equal(video(WanDecoder(launched.net, graphs=True), latents, 1), video(launched, latents, 1))
    assert stand_in.replays == 1


def test_a_capture_that_fails_leaves_the_pictures_as_they_would_be(start, caplog):
    capture.tell.cache_clear()
    decoder, latents = start(StandIn(fails=RuntimeError("operation not permitted\nwhen capturing"))), draw(10)
    with caplog.at_level(logging.WARNING, logger="flexkern"):
        assert torch.equal(video(decoder, latents, 2), video(start(), latents, 2))
    why = "a capture failed with RuntimeError: operation not permitted when capturing"
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"chunks of the VAE's decoder are not replayed as CUDA graphs: {why}"]
    assert decoder.graphs.count == 0 and decoder.graphs.why_not == why and f"launched: {why}" in repr(decoder.graphs)


class FailsLate(StandIn):
    """Fails when the function has run, as a capture after its trial run does."""

    def capture(self, run):
        run()
        raise ValueError("too late")


@pytest.mark.parametrize("sizes", [[2] * 5, [2, 2, 2, 2, 1, 1, 1]], ids=str)
def test_a_capture_that_fails_in_the_middle_leaves_the_past_alone(sizes, start, monkeypatch):
    decoder, latents = start(FailsLate()), draw(sum(sizes))
    if 1 in sizes:  # only the second graph fails, which is captured while the first one's memory holds the past
        attempts = iter([StandIn.capture, FailsLate.capture])
        monkeypatch.setattr(decoder.graphs._graphs._recorder, "capture", lambda run: next(attempts)(stand_in, run))
        stand_in = decoder.graphs._graphs._recorder
    launched = start()
    assert torch.equal(video(decoder, latents, sizes), video(launched, latents, sizes))
    assert equal(decoder.state(), launched.state()) and "too late" in decoder.graphs.why_not


def test_hooks_and_captures_of_others_are_respected(start, net):
    stand_in, calls = StandIn(), []
    decoder, latents = start(stand_in), draw(14)
    parts = iter(latents.split(2, dim=1))
    made = [decoder(next(parts)) for _ in range(3)]
    hook = net.decoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    made.append(decoder(next(parts)))
    hook.remove()
    assert calls == [1] and stand_in.replays == 1 and decoder.graphs.why_not == "modules of DecoderNet have hooks"
    stand_in.busy = "a capture is under way"
    made.append(decoder(next(parts)))
    assert stand_in.replays == 1 and decoder.graphs.why_not == stand_in.busy
    stand_in.busy = None
    made += map(decoder, parts)
    assert stand_in.replays == 3 and torch.equal(torch.cat(made, dim=1), video(start(), latents, 2))


def test_moved_weights_are_followed(start, file, monkeypatch):
    latents, made = draw(12), []
    for stand_in in (None, StandIn()):
        monkeypatch.setattr("flexkern.model.vae.decoder.find_recorder", lambda net, it=stand_in: lambda: it)
        decoder = WanDecoder.from_pretrained(file, graphs=stand_in is not None)
        made.append([video(decoder, latents[:, :6], 2)])
        bias = decoder.net.decoder.conv_out.bias
        bias.data = bias.data + 0.5  # new memory
        made[-1].append(video(decoder, latents[:, 6:], 2))
    assert all(map(torch.equal, *made)) and len(stand_in.graphs) == 2 and stand_in.replays == 4


def test_graphs_are_refused_where_there_can_be_none(net):
    with pytest.raises(ValueError, match="graphs need a CUDA GPU, the decoder is on 'cpu'"):
        WanDecoder(net, graphs=True)
    with pytest.raises(ValueError, match="graphs must be True or False, got 'on'"):
        WanDecoder(net, graphs="on")
    assert WanDecoder(net).graphs is None


def test_memory_holds_a_graph_beside_what_is_launched(start, caplog):
    capture.tell.cache_clear()
    latents, size = draw(8), dict(batch=1, height=1, width=2)
    decoder = start()
    launched, taken = decoder.peak_bytes(8, **size), decoder.graph_bytes(2, **size)
    expected = video(decoder, latents, 2)
    for memory, count in ((launched + taken, 1), (launched + taken - 1, 0)):
        decoder = start(StandIn(), memory=memory)
        with caplog.at_level(logging.WARNING, logger="flexkern"):
            assert torch.equal(video(decoder, latents, 2), expected)
        assert decoder.graphs.count == count and len(caplog.records) == 1 - count
    assert re.fullmatch(
        r".*: a graph takes 0.00\d+ GB, memory leaves 0.00\d+ GB beside what a launched chunk takes",
        caplog.text.strip(),
    )


def test_a_graph_gives_way_to_what_needs_its_memory(start, monkeypatch):
    size, large = dict(batch=1, height=1, width=2), dict(batch=1, height=3, width=3)
    plain = start()
    both = plain.peak_bytes(8, **size) + plain.graph_bytes(2, **size)
    memory = max(both, plain.peak_bytes(8, **large))
    assert memory < plain.peak_bytes(8, **large) + plain.graph_bytes(2, **size)
    decoder = start(StandIn(), memory=memory)
    video(decoder, draw(8), 2)
    decoder.reset()
    decoder(draw(2))  # fits beside the graph
    decoder(draw(1))
    assert decoder.graphs.count == 1 and decoder.graphs.why_not == "it is not shaped as the chunk before it"
    decoder.reset()
    latents = draw(6, size=(3, 3))
    assert torch.equal(decoder(latents[:, :2]), plain(latents[:, :2])) and decoder.graphs.count == 0
    assert torch.equal(video(decoder, latents[:, 2:], 2), video(plain, latents[:, 2:], 2))
    decoder = start(StandIn())
    video(decoder, draw(8), 2)
    monkeypatch.setattr(WanDecoder, "cut", lambda *_, **__: Cut(4, 1, 2))
    decoder.decode_video(draw(2, size=(1, 30)))
    assert decoder.graphs.count == 0  # tiles want all there is
