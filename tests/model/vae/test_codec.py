"""The VAE loads from both layouts; decoded in any chunks it equals diffusers' one-shot decode; encode goes back."""

import json
import re

import pytest
import torch
from safetensors.torch import load, save, save_file

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from flexkern.engine import Engine
from flexkern.model.vae import WanDecoder, WanVAE, load_vae, validate_vae
from flexkern.model.vae.weights import MEAN, STD, diffusers_names, vae_sizes
from flexkern.model.wan import CONFIGS, CausalWan


@pytest.fixture(scope="module", params=["flexkern", "diffusers"])
def vae(request, file):
    return load_vae(file, backend=request.param)


def column(values):
    return torch.tensor(values).view(1, 1, -1, 1, 1)


def decoded(decoder, latents, sizes):
    return torch.cat([decoder.decode(part) for part in latents.split(sizes, dim=1)], dim=1)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_published_key_has_its_place(published_keys):
    state = {key: torch.empty(shape, device="meta") for key, shape in published_keys.items()}
    renamed = diffusers_names(state, "Wan2.1_VAE.pth")
    with torch.device("meta"):
        expected = AutoencoderKLWan().state_dict()
    assert {key: t.shape for key, t in renamed.items()} == {key: t.shape for key, t in expected.items()}
    assert renamed.keys() == convert_wan_vae_to_diffusers(state).keys()
    assert all(renamed[key] is tensor for key, tensor in convert_wan_vae_to_diffusers(state).items())
    published = {"base_dim": 96, "decoder_base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    published |= {"temperal_downsample": [False, True, True], "in_channels": 3, "out_channels": 3}
    assert vae_sizes(renamed, "Wan2.1_VAE.pth") == published


def test_the_statistics_are_those_of_diffusers():
    with torch.device("meta"):
        config = AutoencoderKLWan(base_dim=8).config
    assert list(MEAN) == config.latents_mean and list(STD) == config.latents_std


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
    assert same(load_vae(path, backend="diffusers").module, theirs)
    own = load_vae(path)
    assert same(own.net, WanDecoder.from_pretrained(path).net) and same(own.net, WanDecoder.from_module(theirs).net)
    assert own.module.decoder is None and same(own.module.encoder, theirs.encoder)


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
    assert same(vae.module.encoder, module.encoder) and (vae.spatial, vae.temporal, vae.channels) == (4, 2, 4)
    assert vae.mean.flatten().tolist() == pytest.approx(mean) and vae.std.flatten().tolist() == std
    latents = torch.randn(1, 3, 4, 4, 4)
    z = latents * column(std) + column(mean)
    with torch.no_grad():
        expected = module.decode(z.transpose(1, 2)).sample.transpose(1, 2)
    for backend in ("flexkern", "diffusers"):
        assert (load_vae(tmp_path, backend=backend).decoder().decode(latents) - expected).abs().max() < 1e-5
    assert vae.encode(torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8)).shape == (1, 3, 4, 4, 4)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has 4 channels and no config.json with latents_mean and latents_std"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("latents_mean", [0.0] * 3, "latents_mean must be 16 finite numbers, one for each channel"),
        ("latents_mean", [float("nan")] * 16, "latents_mean must be 16 finite numbers"),
        ("latents_std", ["1"] * 16, "latents_std must be 16 finite numbers, one for each channel, more than 0"),
        ("latents_std", [1.0] * 15 + [0.0], "latents_std must be .*more than 0"),
        ("latents_std", 1.0, "latents_std must be"),
    ],
)
def test_statistics_that_no_latents_could_have_are_refused(theirs, tmp_path, name, values, words):
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: values}))
    for way in (validate_vae, load_vae):
        with pytest.raises(ValueError, match=f"{tmp_path}: {words}"):
            way(tmp_path)


def test_the_config_of_a_transformer_beside_it_is_not_the_vaes(file, theirs, tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "patch_size": [1, 2, 2]}))
    assert same(load_vae(tmp_path).module.encoder, theirs.encoder)


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


@pytest.mark.parametrize("backend", ["flexkern", "diffusers"])
def test_bytes_and_pictures_are_clamped(backend, state, latents, tmp_path):
    torch.save(state | {"decoder.head.2.bias": torch.tensor([9.0, -9.0, 0.0])}, tmp_path / "vae.pth")
    vae = load_vae(tmp_path / "vae.pth", backend=backend)
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
    one = sorted(state.keys() - {"kinds"})[0]
    for wrong in ({one: state[one]}, {k: t for k, t in state.items() if k != one}, state | {"other": state[one]}):
        with pytest.raises(ValueError, match=r"expected the state of a decoder (of|with) 3. (convolutions|slots), got"):
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


def test_auto_takes_ours_unless_the_module_has_other_layers(theirs, latents, one_shot):
    assert WanVAE(theirs).backend == "flexkern" and WanVAE(theirs, backend="diffusers").backend == "diffusers"
    assert theirs.decoder is not None
    other = AutoencoderKLWan(base_dim=8, attn_scales=[0.5]).eval()
    vae = WanVAE(other)
    assert vae.backend == "diffusers" and vae.decoder().decode(latents[:1, :1]).shape == (1, 1, 3, 32, 48)
    with pytest.raises(ValueError, match="'flexkern' does not decode with this VAE, 'diffusers' does"):
        WanVAE(other, backend="flexkern")


def test_headers_tell_the_form_of_the_latents(file):
    assert validate_vae(file) == (16, 8, 4)


def test_full_size_decodes_a_chunk(published_keys, tmp_path):
    """The published file at its full size; its tensors are views of one, so that it takes 16 MB on disk."""
    noise = 0.03 * torch.randn(384 * 384 * 27)
    state = {key: noise[: torch.Size(shape).numel()].view(shape) for key, shape in published_keys.items()}
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    vae = load_vae(tmp_path)
    encoding = sum(weight.numel() for weight in vae.module.parameters())
    decoding = sum(weight.numel() for weight in vae.net.parameters())
    doubled = 9 * (384 * 192 + 384 * 192 + 192 * 96)  # weights of the convolutions that are folded
    assert encoding + decoding + doubled == 126_892_531
    pixels = vae.decoder()(torch.randn(1, 3, 16, 8, 8))
    assert pixels.shape == (1, 9, 64, 64, 3)


def test_the_engine_takes_it(vae):
    model = CausalWan(CONFIGS["tiny"]).eval().requires_grad_(False)
    engine = Engine(model, encoder=vae.encode, decoder=vae.decoder, size=(4, 4), chunk=1)
    session = engine.session(torch.zeros(1, model.config.text_len, model.config.text_dim))
    session.prefill(torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8))
    assert session.next_frame == 2
    assert session.step().pixels.shape[2:] == (32, 32, 3)
