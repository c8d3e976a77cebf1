"""The VAE loads from both layouts; decoded in any chunks it equals diffusers' one-shot decode; encode goes back."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch.nn import functional as F

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from flexkern.engine import Engine
from flexkern.model.vae import _diffusers_names, _sizes, load_tiny_decoder, load_vae
from flexkern.model.wan import CONFIGS, CausalWan

KEYS = json.loads((Path(__file__).parent.parent / "data" / "part_shapes.json").read_text())["vae"]
SMALL = {96: 8, 192: 16, 384: 32, 288: 24, 768: 64, 1152: 96}  # widths of the published VAE: those of the tests


def small(shape):
    return [SMALL.get(size, size) for size in shape]


@pytest.fixture(scope="module")
def state():
    """The published keys with random weights, an eighth to a twelfth as wide."""
    generator = torch.Generator().manual_seed(1)
    return {key: 0.1 * torch.randn(small(shape), generator=generator) for key, shape in KEYS.items()}


@pytest.fixture(scope="module")
def theirs(state):
    """diffusers' model with diffusers' own conversion of the same weights."""
    module = AutoencoderKLWan(base_dim=8)
    module.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "Wan2.1_VAE.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def vae(file):
    return load_vae(file)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 7, 16, 4, 6, generator=torch.Generator().manual_seed(2))


def column(values):
    return torch.tensor(values).view(1, 1, -1, 1, 1)


@pytest.fixture(scope="module")
def one_shot(theirs, latents):
    z = latents * column(theirs.config.latents_std) + column(theirs.config.latents_mean)
    with torch.no_grad():
        return theirs.decode(z.transpose(1, 2)).sample.transpose(1, 2)


def decoded(decoder, latents, sizes):
    return torch.cat([decoder.decode(part) for part in latents.split(sizes, dim=1)], dim=1)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_published_key_has_its_place():
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS.items()}
    renamed = _diffusers_names(state, Path("Wan2.1_VAE.pth"))
    with torch.device("meta"):
        expected = AutoencoderKLWan().state_dict()
    assert {key: t.shape for key, t in renamed.items()} == {key: t.shape for key, t in expected.items()}
    assert renamed.keys() == convert_wan_vae_to_diffusers(state).keys()
    assert all(renamed[key] is tensor for key, tensor in convert_wan_vae_to_diffusers(state).items())
    published = {"base_dim": 96, "decoder_base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    published |= {"temperal_downsample": [False, True, True], "in_channels": 3, "out_channels": 3}
    assert _sizes(renamed, Path("Wan2.1_VAE.pth")) == published


@pytest.mark.parametrize("layout", ["wan file", "wan folder", "comfy", "diffusers", "diffusers root", "shards"])
def test_layouts(layout, state, theirs, file, tmp_path):
    path = file if layout == "wan file" else file.parent if layout == "wan folder" else tmp_path
    if layout == "comfy":
        path = tmp_path / "wan_2.1_vae.safetensors"
        save_file(state, path)
    elif layout in ("diffusers", "diffusers root"):
        theirs.save_pretrained(tmp_path / "vae")
        path = tmp_path / "vae" if layout == "diffusers" else tmp_path
    elif layout == "shards":
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(load_vae(path).module, theirs)


def test_other_sizes_come_from_the_shapes_and_statistics_from_the_config(tmp_path):
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, False],
    }
    module = AutoencoderKLWan(**sizes, latents_mean=mean, latents_std=std).eval()
    module.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert same(vae.module, module) and (vae.spatial, vae.temporal, vae.channels) == (4, 2, 4)
    assert vae.mean.flatten().tolist() == pytest.approx(mean) and vae.std.flatten().tolist() == std
    latents = torch.randn(1, 3, 4, 4, 4)
    z = latents * column(std) + column(mean)
    with torch.no_grad():
        expected = module.decode(z.transpose(1, 2)).sample.transpose(1, 2)
    assert (vae.decoder().decode(latents) - expected).abs().max() < 1e-5
    assert vae.encode(torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8)).shape == (1, 3, 4, 4, 4)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has 4 channels and no config.json with latents_mean and latents_std"):
        load_vae(tmp_path)


def test_the_config_of_a_transformer_beside_it_is_not_the_vaes(file, theirs, tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "patch_size": [1, 2, 2]}))
    assert same(load_vae(tmp_path).module, theirs)


def test_wrong_files_say_what_is_wrong(state, tmp_path):
    def saved(content, name="vae.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_vae(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"looked for Wan2.1_VAE.pth, .*; there is 0"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="is no Wan VAE: cannot tell its sizes"):
        load_vae(saved({"blocks.0.weight": torch.ones(2)}))
    less = {key: tensor for key, tensor in state.items() if key != "decoder.upsamples.4.shortcut.bias"}
    missing = "missing 1: decoder.up_blocks.1.resnets.0.conv_shortcut.bias; unexpected 1: surplus; wrongly shaped 0"
    with pytest.raises(ValueError, match=re.escape(missing)):
        load_vae(saved(less | {"surplus": torch.ones(1)}))
    with pytest.raises(ValueError, match=re.escape("wrongly shaped 1: decoder.conv_out.bias [4] instead of [3]")):
        load_vae(saved(state | {"decoder.head.2.bias": torch.ones(4)}))
    with pytest.raises(ValueError, match="conv1.bias is torch.int8; expected floating point, not quantised"):
        load_vae(saved(state | {"conv1.bias": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(NotImplementedError, match="VAE of Wan 2.2"):
        load_vae(saved({"decoder.upsamples.0.upsamples.0.residual.0.gamma": torch.ones(2)}))


@pytest.mark.parametrize("sizes", [1, 3, 7, [2, 4, 1], [1, 6]], ids=str)
def test_every_chunking_equals_the_one_shot_decode(sizes, vae, latents, one_shot):
    assert one_shot.shape == (2, 25, 3, 32, 48) and one_shot.std() > 0.05
    assert (decoded(vae.decoder(), latents, sizes) - one_shot).abs().max() < 1e-5


def test_pictures_are_bytes(vae, latents, one_shot):
    decoder = vae.decoder()
    pixels = torch.cat([decoder(latents[:, :3]), decoder(latents[:, 3:])], dim=1)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 25, 32, 48, 3) and pixels.is_contiguous()
    exact = (one_shot.movedim(2, -1) + 1) * 127.5
    assert (pixels - exact).abs().max() < 0.5 + 1e-2


def test_bytes_and_pictures_are_clamped(state, latents, tmp_path):
    torch.save(state | {"decoder.head.2.bias": torch.tensor([9.0, -9.0, 0.0])}, tmp_path / "vae.pth")
    vae = load_vae(tmp_path / "vae.pth")
    red, green, blue = vae.decoder()(latents[:, :1]).unbind(-1)
    assert red.min() == 255 and green.max() == 0 and 0 < blue.min() < blue.max() < 255
    assert vae.decoder().decode(latents[:, :1]).abs().max() == 1


def test_sessions_do_not_share_their_past(vae, latents):
    one, other = vae.decoder(), vae.decoder()
    alone = vae.decoder().decode(latents[:, :2])
    first = one.decode(latents[:, :1])
    other.decode(latents[:, 3:5])
    assert torch.equal(torch.cat([first, one.decode(latents[:, 1:2])], dim=1), alone)


@pytest.mark.parametrize("done", [1, 2, 4], ids=["Rep", "two", "full"])
def test_a_restored_state_goes_on_bit_for_bit(done, vae, latents):
    decoder = vae.decoder()
    decoder.decode(latents[:, :done])
    stored = save(decoder.state())
    rest = decoder.decode(latents[:, done:])
    resumed = vae.decoder()
    resumed.restore(load(stored))
    assert torch.equal(resumed.decode(latents[:, done:]), rest)
    assert resumed.state().keys() == decoder.state().keys()


def test_an_empty_state_starts_anew_and_a_foreign_one_is_refused(vae, latents):
    decoder = vae.decoder()
    empty = decoder.state()
    first = decoder.decode(latents[:, :2])
    state = decoder.state()
    decoder.restore(empty)
    assert torch.equal(decoder.decode(latents[:, :2]), first)
    for wrong in ({}, {"kinds": state["kinds"][:-1]}, {k: t for k, t in state.items() if k != "slot.0"}):
        with pytest.raises(ValueError, match="expected the state of a decoder with 3. slots, got"):
            decoder.restore(wrong)


def test_what_it_keeps_does_not_grow(vae, latents):
    decoder, kept = vae.decoder(), []
    for i in range(7):
        decoder.decode(latents[:, i : i + 1])
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in decoder.state().values()))
    assert kept[2:] == [kept[2]] * 5


def test_latents_that_do_not_fit_are_refused(vae, latents):
    decoder = vae.decoder()
    with pytest.raises(ValueError, match=re.escape("latents must be [B, F, 16, h, w], got [2, 16, 7, 4, 6]")):
        decoder(latents.transpose(1, 2))
    with pytest.raises(ValueError, match=re.escape("got [2, 0, 16, 4, 6]")):
        decoder(latents[:, :0])
    decoder(latents[:, :1])
    with pytest.raises(ValueError, match=re.escape("latents so far had B, h, w = [2, 4, 6], got [1, 4, 6]")):
        decoder(latents[:1, 1:2])


@pytest.mark.parametrize("pictures", [1, 5, 9])
def test_encode_equals_the_one_shot_encode(pictures, vae, theirs):
    pixels = torch.randint(256, (2, pictures, 32, 48, 3), dtype=torch.uint8)
    latents = vae.encode(pixels)
    with torch.no_grad():
        mode = theirs.encode(pixels.movedim(-1, 1).float() / 127.5 - 1).latent_dist.mode().transpose(1, 2)
    expected = (mode - column(theirs.config.latents_mean)) / column(theirs.config.latents_std)
    assert latents.shape == (2, 1 + pictures // 4, 16, 4, 6) and latents.dtype == torch.float32
    assert (latents - expected).abs().max() < 1e-5


def test_pictures_that_cannot_be_encoded_are_refused(vae):
    pixels = torch.zeros(1, 6, 32, 48, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape("pictures must be 4k+1, for instance 5 or 9, got 6")):
        vae.encode(pixels)
    with pytest.raises(ValueError, match="height and width must be multiples of 8, got 30x48"):
        vae.encode(pixels[:, :5, :30])
    with pytest.raises(ValueError, match=re.escape("pixels must be uint8 [B, pictures, height, width, 3], got")):
        vae.encode(pixels.float())


def test_bfloat16_is_close(file, latents, one_shot):
    decoder = load_vae(file, dtype=torch.bfloat16).decoder()
    assert (decoder.decode(latents[:, :3]).float() - one_shot[:, :9]).abs().mean() < 0.02


def test_full_size_decodes_a_chunk(tmp_path):
    """The published file at its full size; its tensors are views of one, so that it takes 16 MB on disk."""
    noise = 0.03 * torch.randn(384 * 384 * 27)
    state = {key: noise[: torch.Size(shape).numel()].view(shape) for key, shape in KEYS.items()}
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    vae = load_vae(tmp_path)
    assert sum(weight.numel() for weight in vae.module.parameters()) == 126_892_531
    pixels = vae.decoder()(torch.randn(1, 3, 16, 8, 8))
    assert pixels.shape == (1, 9, 64, 64, 3)


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


def test_the_engine_takes_them(vae, tmp_path):
    torch.save(tiny_state(), tmp_path / "taew2_1.pth")
    for factory in (vae.decoder, load_tiny_decoder(tmp_path)):
        model = CausalWan(CONFIGS["tiny"]).eval().requires_grad_(False)
        engine = Engine(model, encoder=vae.encode, decoder=factory, size=(4, 4), chunk=1)
        session = engine.session(torch.zeros(1, model.config.text_len, model.config.text_dim))
        session.prefill(torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8))
        assert session.next_frame == 2
        assert session.step().pixels.shape[2:] == (32, 32, 3)
