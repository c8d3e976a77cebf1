"""Our decoder equals diffusers' to 1e-5, however it is cut in time, in the memory that it says."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexkern.model.vae import load_vae, ops
from flexkern.model.vae.decoder import WanDecoder
from flexkern.model.vae.graphs import ChunkGraphs
from flexkern.model.vae.memory import Cut, count_elements, frames_at_once, reach, spans
from flexkern.model.vae.net import PUBLISHED, DecoderNet, Past, fold_doubling
from flexkern.testing import assert_as_accurate

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")


@pytest.fixture(scope="module")
def decoder(file):
    return WanDecoder.from_pretrained(file)


@pytest.fixture
def at_once(monkeypatch):
    """Sets how many pictures every decoder computes together."""
    return lambda count: monkeypatch.setattr(WanDecoder, "pictures_at_once", lambda *_, **__: count)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(5, 7), (9, 4), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("sizes", [1, 3, 7], ids=str)
def test_any_size_in_any_chunks(size, sizes, decoder, diffusers_decode):
    latents = draw(1, 7, 16, *size)
    expected, stream = diffusers_decode(latents), decoder.another()
    pieces = torch.cat([stream.decode(part) for part in latents.split(sizes, dim=1)], dim=1)
    assert pieces.shape == expected.shape and (pieces - expected).abs().max() < 1e-5


@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 8, 28])
def test_any_number_of_pictures_at_once(pictures, decoder, latents, one_shot, at_once):
    at_once(pictures)
    stream = decoder.another()
    made = torch.cat([stream.decode(latents[:, :3]), stream.decode(latents[:, 3:])], dim=1)
    assert (made - one_shot).abs().max() < 1e-5


@pytest.mark.parametrize("done", [1, 2, 4])
@pytest.mark.parametrize("pictures", [1, 12])
def test_a_restored_decoder_goes_on_bit_for_bit(done, pictures, decoder, latents, at_once):
    at_once(pictures)
    stream, resumed = decoder.another(), decoder.another()
    stream.decode(latents[:, :done])
    resumed.restore(load(save(stream.state())))
    for part in latents[:, done:].split(2, dim=1):
        assert torch.equal(resumed.decode(part), stream.decode(part))
    assert all(torch.equal(tensor, stream.state()[name]) for name, tensor in resumed.state().items())


def test_a_state_of_other_widths_is_refused(decoder, latents):
    stream = decoder.another()
    stream.decode(latents[:, :1])
    state = stream.state()
    for wrong in (state | {"conv_in": state["conv_out"]}, state | {"conv_in": torch.ones(2)}):
        with pytest.raises(ValueError, match="expected the state of a decoder of 32 convolutions, got 32: "):
            stream.restore(wrong)


def test_reset_begins_another_video(decoder, latents):
    stream = decoder.another()
    first = stream(latents[:, :2])
    stream.reset()
    assert torch.equal(stream(latents[:, :2]), first)
    stream.reset()
    assert stream(latents[:1, :1, :, :2]).shape == (1, 1, 16, 48, 3)


def test_a_state_is_never_written_to(decoder, latents):
    stream = decoder.another()
    stream.decode(latents[:, :2])
    state = stream.state()
    copy = {name: tensor.clone() for name, tensor in state.items()}
    stream.decode(latents[:, 2:])
    assert all(torch.equal(tensor, copy[name]) for name, tensor in state.items())


def test_latents_are_not_written_to(decoder, latents):
    copy = latents.clone()
    decoder.another()(latents)
    assert torch.equal(latents, copy)


def test_the_layout_of_latents_in_memory_does_not_matter(decoder):
    latents = draw(2, 3, 16, 1, 2)
    expected = decoder.another().decode(latents)
    for order in ((1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 4, 2)):
        turned = latents.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
        assert turned.stride() != latents.stride() and torch.equal(decoder.another().decode(turned), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_close_as_that_of_diffusers(dtype, file, latents, one_shot):
    ours, entitled = (load_vae(file, dtype=dtype, backend=name).decoder() for name in ("flexkern", "diffusers"))
    error = lambda decoder: (decoder.decode(latents[:1, :3]).float() - one_shot[:1, :9]).abs().mean()
    assert 0 < error(ours) <= 1.05 * error(entitled)


def test_folding_equals_doubling_and_convolving():
    weight, x = draw(3, 5, 3, 3), draw(2, 5, 4, 7)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    folded = F.conv_transpose2d(x, fold_doubling(weight), stride=2, padding=1)
    assert (folded - F.conv2d(doubled, weight, padding=1)).abs().max() < 1e-5


@pytest.mark.triton(3, 4)
@interpreted
def test_the_kernels_make_the_same_pictures(decoder, diffusers_decode, monkeypatch):
    monkeypatch.setattr(ops, "fused", lambda device: True)
    latents, stream = draw(2, 2, 16, 1, 2), decoder.another()
    expected = diffusers_decode(latents)
    made = torch.cat([stream.decode(latents[:, :1]), stream.decode(latents[:, 1:])], dim=1)
    assert (made - expected).abs().max() < 1e-5
    stream.reset()
    pixels = stream(latents[:, :1])
    assert (pixels - (expected[:, :1].movedim(2, -1) + 1) * 127.5).abs().max() < 0.5 + 1e-2


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, those given apart; ``most`` is their peak."""

    def __init__(self, apart):
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self.seen.add(storage._cdata)
                self.now += size
                weakref.finalize(storage, self.free, storage._cdata, size)
        self.most = max(self.most, self.now)
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def conv3d_in_its_layout(x, weight, bias, stride, padding, *_):
    """The convolution's output, which torch lays out channels first on the device "meta" alone."""
    sizes = [size + 2 * pad - tap + 1 for size, pad, tap in zip(x.shape[2:], padding, weight.shape[2:], strict=True)]
    shape = x.shape[0], weight.shape[0], *sizes
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


@pytest.fixture(scope="module")
def hollow():
    """The published decoder without data; in float32, where norms need no second copy, as in the kernels."""
    with torch.device("meta"):
        net = DecoderNet(PUBLISHED).requires_grad_(False)
        return net.prepare(torch.ones(16), torch.ones(16), torch.float32)


@pytest.mark.parametrize(("pictures", "size"), [(1, (90, 160)), (2, (33, 17)), (4, (60, 104)), (12, (60, 104))])
def test_it_takes_the_memory_that_it_says(pictures, size, hollow, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: torch.empty_like(query))
    monkeypatch.setattr(F, "conv3d", conv3d_in_its_layout)
    decoder = WanDecoder(hollow)
    latents, past = torch.empty(1, 3, 16, *size, device="meta"), Past()
    weights = [*hollow.parameters(), *hollow.buffers()]
    with Live([latents, *weights]) as live:
        for _ in range(3):
            for made in hollow(latents, past, frames_at_once(PUBLISHED, pictures)):
                del made
    held = sum(tensor.numel() for tensor in past.held.values())
    assert held == count_elements(PUBLISHED, pictures)[0] * size[0] * size[1]
    own = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    said = decoder.peak_bytes(pictures, batch=1, height=size[0], width=size[1])
    assert 0.99 * said <= live.most + own - latents.nbytes <= said


class Again:
    """What captures nothing: it runs the function, again for each replay."""

    def __init__(self, run=None):
        self.replay = run

    def capture(self, run):
        run()
        return Again(run)

    def why_not(self):
        return None


@pytest.mark.parametrize(("pictures", "size"), [(2, (33, 17)), (12, (60, 104))])
def test_a_graph_takes_the_memory_that_it_says(pictures, size, hollow, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: torch.empty_like(query))
    monkeypatch.setattr(F, "conv3d", conv3d_in_its_layout)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which has no answer for "meta"
    monkeypatch.setattr(WanDecoder, "pictures_at_once", lambda *_, **__: pictures)
    latents, past, graphs = torch.empty(1, 3, 16, *size, device="meta"), Past(), ChunkGraphs(hollow, Again)
    at_once = frames_at_once(PUBLISHED, pictures)
    takes = WanDecoder(hollow).graph_bytes(3, batch=1, height=size[0], width=size[1])
    for made in hollow(latents, past, at_once):
        del made
    assert graphs(latents, past, at_once, takes=takes, room=takes) is None
    apart = [latents, *hollow.parameters(), *hollow.buffers(), *past.held.values()]
    with Live(apart) as live:
        made = [sum(piece.shape[1] for piece in graphs(latents, past, at_once, takes=takes, room=takes)) for _ in "123"]
    assert made == [12] * 3 and 0.99 * takes <= live.most <= takes


def test_pictures_at_once_follow_from_the_memory(hollow):
    at_480p = dict(batch=1, height=60, width=104)
    peak = lambda pictures: WanDecoder(hollow).peak_bytes(pictures, **at_480p)
    assert peak(1) < peak(2) < peak(4) < peak(12) < peak(84)
    for pictures in (1, 2, 4, 8, 12):
        assert WanDecoder(hollow, memory=peak(pictures)).pictures_at_once(3, **at_480p) == pictures
    assert WanDecoder(hollow, memory=peak(4) - 1).pictures_at_once(3, **at_480p) == 2
    assert WanDecoder(hollow, memory=peak(99)).pictures_at_once(3, **at_480p) == 12
    assert WanDecoder(hollow).pictures_at_once(3, **at_480p) == 1  # the default does not refuse
    # of 84, as many as leave a buffer of (52 + 2) * 480 * 832 * 96 elements, which 32 bits count
    assert WanDecoder(hollow, memory=10**12).pictures_at_once(21, **at_480p) == 52
    assert WanDecoder(hollow, memory=10**12).cut(21, **at_480p) == (52, 1, 1)
    with pytest.raises(
        ValueError, match=r"memory must be at least 5.34 GB for 1 video of 480x832, one pic.*, got 1 GB"
    ):
        WanDecoder(hollow, memory=10**9).pictures_at_once(3, **at_480p)


def test_720p_fits_6_gb_in_bfloat16(hollow):
    widths = PUBLISHED
    held, working = count_elements(widths, 1)
    weights = sum(tensor.numel() for tensor in [*hollow.parameters(), *hollow.buffers()])
    assert 2 * (weights + 90 * 160 * (held + working)) < 6e9


@pytest.mark.parametrize("cut", [Cut(1, 2, 1), Cut(4, 1, 3)], ids=str)
def test_tiles_leave_no_seam(cut, decoder, diffusers_decode, monkeypatch):
    monkeypatch.setattr(WanDecoder, "cut", lambda *_, **__: cut)
    latents = draw(2, 2, 16, 28 if cut.rows > 1 else 2, 30 if cut.columns > 1 else 2)
    expected = diffusers_decode(latents)
    stream = decoder.another()
    made = stream.decode_video(latents)
    assert made.shape == expected.shape and (made - expected).abs().max() < 1e-5
    assert bool(stream.finite) and not stream.state()


def test_a_margin_that_is_narrower_leaves_seams(decoder, diffusers_decode, monkeypatch):
    """So that the one before is known to be able to fail; the outer places of the reach weigh next to nothing."""
    monkeypatch.setattr(WanDecoder, "cut", lambda *_, **__: Cut(4, 2, 1))
    monkeypatch.setattr("flexkern.model.vae.decoder.reach", lambda sizes: 1)
    latents = draw(1, 1, 16, 8, 3)
    assert (decoder.another().decode_video(latents) - diffusers_decode(latents)).abs().max() > 1e-5


def test_spans_cover_a_side_once():
    assert spans(10, 1, 3) == [(0, 10, 0, 10)]
    assert spans(31, 3, 4) == [(0, 14, 0, 10), (6, 24, 4, 10), (16, 31, 4, 11)]
    assert reach(PUBLISHED) == 13  # 7 places of a picture: 4, 10, 6, 12, 7, 13


def test_a_video_is_tiled_only_where_memory_demands_it(hollow):
    at = dict(batch=1, height=135, width=240)
    decoder = lambda memory: WanDecoder(hollow, memory=memory)
    peak = lambda cut: decoder(1).peak_bytes(cut.pictures, count=21, cut=cut, **at)
    assert decoder(peak(Cut(1, 1, 1))).cut(21, **at) == (1, 1, 1)
    # as the page on the VAE says for bfloat16
    assert decoder(2 * 4 * 10**9).cut(21, batch=1, height=90, width=160) == (1, 1, 2)
    assert decoder(2 * 3 * 10**9).cut(21, batch=1, height=60, width=104) == (2, 1, 1)
    assert decoder(2 * 6 * 10**9).cut(21, **at) == (4, 2, 2)
    tiled = decoder(8 * 10**9).cut(21, **at)
    assert tiled.rows * tiled.columns > 1 and peak(tiled) <= 8 * 10**9
    assert WanDecoder(hollow).cut(21, **at).pictures >= 1
    with pytest.raises(
        ValueError, match=r"memory must be at least .* GB for 1 video of 1080x1920, in 16 tiles to a side"
    ):
        decoder(10**9).cut(21, **at)


def test_tiles_take_the_memory_that_they_say(hollow, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: torch.empty_like(query))
    monkeypatch.setattr(F, "conv3d", conv3d_in_its_layout)
    cut, size = Cut(4, 2, 2), (60, 104)
    monkeypatch.setattr(WanDecoder, "cut", lambda *_, **__: cut)
    monkeypatch.setattr("flexkern.model.vae.decoder.all_finite", lambda x: torch.ones((), dtype=torch.bool))
    latents, decoder = torch.empty(1, 5, 16, *size, device="meta"), WanDecoder(hollow)
    weights = [*hollow.parameters(), *hollow.buffers()]
    with Live([latents, *weights]) as live:
        out = decoder.decode_video(latents)
    own = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    said = decoder.peak_bytes(cut.pictures, batch=1, height=size[0], width=size[1], count=5, cut=cut)
    pictures = 4 * cut.pictures * (43 * 8) * (65 * 8) * 3  # of a tile with its margins
    assert 0.9 * said <= live.most + own - out.untyped_storage().nbytes() - pictures <= said


@pytest.fixture
def own(monkeypatch):
    """Lets a decoder compute with our own convolutions on a CPU: the kernel is played; lists what they were asked."""
    from gluon_player import played

    kernels, asked = played("vae.causal_conv", ("warpgroup",), ("prepared", "common", "gpus"), 0), []

    def convolve(buffer, weight, bias):
        asked.append((buffer.shape, weight.shape))
        return kernels.causal_conv_hopper(buffer, weight, bias)

    monkeypatch.setattr("flexkern.kernels.vae.causal_conv.causal_conv_hopper", convolve)
    monkeypatch.setattr("flexkern.model.vae.net.why_not_own", lambda device, dtype: None)
    return asked


@pytest.mark.triton(3, 6)
@interpreted
def test_our_own_convolutions_make_the_same_pictures_however_a_video_is_cut(file, latents, own, at_once):
    latents = latents[:1, :3, :, :2, :3]
    exact = WanDecoder.from_pretrained(file, dtype=torch.float64).decode(latents)
    entitled = WanDecoder.from_pretrained(file, dtype=torch.bfloat16).decode(latents)
    assert not own
    decoder = WanDecoder.from_pretrained(file, dtype=torch.bfloat16, convolutions="hopper")
    pictures = decoder.decode(latents)
    assert_as_accurate(pictures, exact, entitled)
    assert {weight[:2] for _, weight in own} == {(32, 32)}, "of those tests only the widest are multiples of 32"
    assert {weight[2:] for _, weight in own} == {(3, 3, 3)}
    for pieces, count in ((1, 1), (2, 12)):
        at_once(count)
        stream = decoder.another()
        cut = torch.cat([stream.decode(part) for part in latents.split(pieces, dim=1)], dim=1)
        assert_as_accurate(cut, exact, entitled)


def test_convolutions_that_cannot_be_are_refused(file, theirs):
    for make in (WanDecoder.from_pretrained, lambda _, **options: WanDecoder.from_module(theirs, **options)):
        with pytest.raises(ValueError, match="convolutions must be 'library' or 'hopper', got 'cudnn'"):
            make(file, convolutions="cudnn")
        with pytest.raises(ValueError, match="convolutions 'hopper' cannot run: .*Triton"):
            make(file, convolutions="hopper")
