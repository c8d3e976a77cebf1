"""The tiny decoder equals the whole video at once, goes on bit for bit, and refuses those of other models."""

import re

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch.nn import functional as F

from flexkern.engine import Engine
from flexkern.model.tiny_decoder import load_tiny_decoder
from flexkern.model.wan import CONFIGS, CausalWan


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 7, 16, 4, 6, generator=torch.Generator().manual_seed(2))


def decoded(decoder, latents, sizes):
    return torch.cat([decoder.decode(part) for part in latents.split(sizes, dim=1)], dim=1)


def tiny_state(channels=16, widths=(12, 10, 8, 6), rows=(1, 2, 2)):
    """The names and kinds of taew2_1.pth with random weights; rows: strides of the stored time kernels."""
    shapes, place = {"1": (widths[0], channels, 3)}, 3
    for width, following, stride in zip(widths, widths[1:], rows, strict=False):
        for block in range(place, place + 3):
            shapes |= {f"{block}.conv.{i}": (width, width * (2 if i == 0 else 1), 3) for i in (0, 2, 4)}
        shapes |= {f"{place + 4}.conv": (width * stride, width, 1), f"{place + 5}": (following, width, 3)}
        place += 6
    shapes["22"] = (3, widths[-1], 3)
    generator = torch.Generator().manual_seed(3)
    state = {"encoder.0.weight": torch.ones(2)}
    for name, (out, inputs, side) in shapes.items():
        scale = (inputs * side * side) ** -0.5
        state[f"decoder.{name}.weight"] = scale * torch.randn(out, inputs, side, side, generator=generator)
        if name in ("1", "22") or ".conv." in name:
            state[f"decoder.{name}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return state


def tiny_reference(state, latents):
    """All frames of one video [F, C, h, w] at once, layer by layer -> pictures [n, 3, H, W] in -1..1."""
    conv = lambda x, name: F.conv2d(
        x, state[f"decoder.{name}.weight"], state.get(f"decoder.{name}.bias"),
        padding=state[f"decoder.{name}.weight"].shape[-1] // 2,
    )  # fmt: skip
    x = F.relu(conv(torch.tanh(latents / 3) * 3, 1))
    for place in (3, 9, 15):
        for block in range(place, place + 3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            h = F.relu(conv(torch.cat([x, before], dim=1), f"{block}.conv.0"))
            x = F.relu(conv(F.relu(conv(h, f"{block}.conv.2")), f"{block}.conv.4") + x)
        x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        grown = conv(x, f"{place + 4}.conv")
        x = torch.cat([torch.stack(part.chunk(len(part) // x.shape[1])) for part in grown])
        x = conv(x, place + 5)
    return conv(F.relu(x), 22)[3:].clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("sizes", [1, 3, 7, [2, 4, 1]], ids=str)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tiny_decoder_equals_the_whole_video_at_once(sizes, suffix, latents, tmp_path):
    state = tiny_state()
    if suffix == "pth":
        torch.save(state, tmp_path / "taew2_1.pth")
    else:
        save_file(state, tmp_path / "taew2_1.safetensors")
    make = load_tiny_decoder(tmp_path)
    expected = torch.stack([tiny_reference(state, video) for video in latents])
    assert expected.shape == (2, 25, 3, 32, 48) and expected.std() > 0.1
    assert (decoded(make(), latents, sizes) - expected).abs().max() < 1e-5
    assert (make()(latents) - (expected.movedim(2, -1) + 1) * 127.5).abs().max() < 0.5 + 1e-2


def test_tiny_decoder_takes_the_last_rows_of_a_larger_time_kernel(latents, tmp_path):
    stored = tiny_state(rows=(2, 2, 2))
    torch.save(stored, tmp_path / "taew2_1.pth")
    state = stored | {"decoder.7.conv.weight": stored["decoder.7.conv.weight"][-12:]}
    expected = tiny_reference(state, latents[0])
    assert (load_tiny_decoder(tmp_path)().decode(latents[:1])[0] - expected).abs().max() < 1e-5


def test_tiny_decoder_goes_on_bit_for_bit(latents, tmp_path):
    torch.save(tiny_state(), tmp_path / "taew2_1.pth")
    make = load_tiny_decoder(tmp_path)
    decoder, resumed = make(), make()
    decoder.decode(latents[:, :2])
    resumed.restore(load(save(decoder.state())))
    assert torch.equal(resumed.decode(latents[:, 2:]), decoder.decode(latents[:, 2:]))
    with pytest.raises(ValueError, match=re.escape("latents so far had B, h, w = [2, 4, 6], got [1, 4, 6]")):
        resumed(latents[:1])
    with pytest.raises(ValueError, match="expected the state of a tiny decoder of 9 blocks, got 1: 3"):
        resumed.restore({"3": torch.ones(1)})
    resumed.restore(make().state())
    assert torch.equal(resumed.decode(latents[:, :2]), make().decode(latents[:, :2]))


def test_tiny_decoders_of_other_models_are_refused(tmp_path):
    path = tmp_path / "tae.pth"
    state = tiny_state()
    torch.save(state | {"decoder.22.weight": torch.ones(12, 6, 3, 3)}, path)
    with pytest.raises(NotImplementedError, match="makes 12 channels; supported: 3, as for Wan 2.1"):
        load_tiny_decoder(path)
    torch.save({key: tensor for key, tensor in state.items() if key != "decoder.8.weight"}, path)
    with pytest.raises(ValueError, match="is no TAEHV decoder: it lacks some of decoder.1.weight"):
        load_tiny_decoder(path)
    torch.save({key: tensor for key, tensor in state.items() if key != "decoder.4.conv.2.bias"}, path)
    with pytest.raises(ValueError, match="missing 1: decoder.4.conv.2.bias; unexpected 0"):
        load_tiny_decoder(path)


def test_the_engine_takes_it(tmp_path):
    torch.save(tiny_state(), tmp_path / "taew2_1.pth")
    model = CausalWan(CONFIGS["tiny"]).eval().requires_grad_(False)
    engine = Engine(model, decoder=load_tiny_decoder(tmp_path), size=(4, 4), chunk=1)
    session = engine.session(torch.zeros(1, model.config.text_len, model.config.text_dim))
    assert session.step().pixels.shape[2:] == (32, 32, 3)
