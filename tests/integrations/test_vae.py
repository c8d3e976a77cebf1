"""Patched VAEs of diffusers and of Self-Forcing's kind make the pictures they made before, and can be given back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
import layouts
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from flexkern.integrations import vae

SIZES = (1, 7, 16, 3, 5)


@pytest.fixture(scope="module")
def state():
    return layouts.tiny_vae()


@pytest.fixture
def module(state):
    made = AutoencoderKLWan(base_dim=8)
    made.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
    return made.eval().requires_grad_(False)


class Video(nn.Module):
    """Holds weights under Wan's own names; counts how often its cache was cleared."""

    def __init__(self, state):
        super().__init__()
        self.state, self.cleared = state, 0

    def state_dict(self):
        return self.state

    def clear_cache(self):
        self.cleared += 1


class WanVAEWrapper(nn.Module):
    """The methods of Self-Forcing's wrapper that a patch replaces or relies on."""

    def __init__(self, state):
        super().__init__()
        self.model = Video(state)

    def decode_to_pixel(self, latent, use_cache=False):
        return "its own"


@pytest.fixture(scope="module")
def z():
    return torch.randn(2, 16, 4, 3, 5, generator=torch.Generator().manual_seed(3))


def test_diffusers_decodes_the_same(module, z):
    before = module.decode(z).sample
    with vae.patch(module) as handle:
        after = module.decode(z, return_dict=False)[0]
        assert after.shape == before.shape and (after - before).abs().max() < 1e-5
        assert torch.equal(module.decode(z).sample, after)  # a video's past does not reach the next one
        assert not handle.decoder.state()
        assert module.encode(torch.zeros(1, 3, 1, 16, 16)).latent_dist.mean.shape == (1, 16, 1, 2, 2)
        with pytest.raises(ValueError, match="patched already: call unpatch first"):
            vae.patch(module)
    assert torch.equal(module.decode(z).sample, before) and "decode" not in vars(module)


def test_a_wrapper_decodes_whole_videos_and_goes_on_with_its_cache(state, module):
    wrapper, latents = WanVAEWrapper(state), torch.randn(SIZES, generator=torch.Generator().manual_seed(4))
    mean, std = (
        torch.tensor(each).view(-1, 1, 1, 1) for each in (module.config.latents_mean, module.config.latents_std)
    )
    expected = module.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    vae.patch(wrapper)
    for _ in range(2):
        whole = wrapper.decode_to_pixel(latents)
        assert whole.shape == (1, 25, 3, 24, 40) and (whole - expected).abs().max() < 1e-5
        parts = [wrapper.decode_to_pixel(part, use_cache=True) for part in latents.split((3, 1, 3), dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
        wrapper.model.clear_cache()
    assert wrapper.model.cleared == 2
    vae.unpatch(wrapper)
    assert wrapper.decode_to_pixel(latents) == "its own" and "clear_cache" not in vars(wrapper.model)


def test_what_cannot_be_patched_is_left_alone(module, z):
    with pytest.raises(ValueError, match=r"vae must be an AutoencoderKLWan, or a WanVAEWrapper .*, got Linear"):
        vae.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got an unpatched AutoencoderKLWan"):
        vae.unpatch(module)
    with pytest.raises(NotImplementedError, match="AutoencoderKLWan is the VAE of Wan 2.2"):
        vae.patch(AutoencoderKLWan(base_dim=8, decoder_base_dim=8, is_residual=True))
    vae.patch(module)
    with pytest.raises(ValueError, match="the decoder is on cpu, latents on meta: patch the VAE last"):
        module.decode(z.to("meta"))


def test_memory_is_bounded_by_the_patch(module, z):
    before = module.decode(z).sample
    with vae.patch(module) as handle:
        whole = dict(batch=2, height=3, width=5)
        tiled = handle.decoder.cut(4, **whole)
        least = handle.decoder.peak_bytes(1, **whole)
    assert tiled == (16, 1, 1)
    with vae.patch(module, memory=least):
        assert (module.decode(z).sample - before).abs().max() < 1e-5
    with (
        vae.patch(module, memory=10_000),
        pytest.raises(ValueError, match=r"memory must be at least 0.00\d* GB for 2 videos .* got 1e-05 GB"),
    ):
        module.decode(z)


def change(module, how):
    """Weights that are not those of the patch any more."""
    other = AutoencoderKLWan(base_dim=8).state_dict()
    if how == "loaded":
        module.load_state_dict(other)
    elif how == "assigned":
        module.load_state_dict(other, assign=True)
    elif how == "cast":
        module.to(torch.bfloat16)
    else:
        with torch.no_grad():
            module.post_quant_conv.weight.mul_(2)


@pytest.mark.parametrize("how", ["loaded", "assigned", "cast", "trained"])
def test_the_old_weights_do_not_go_on_in_silence(module, z, how):
    handle = vae.patch(module)
    assert repr(handle).startswith("Patch(AutoencoderKLWan, in place: WanDecoder(float32 on cpu")
    module.decode(z)
    change(module, how)
    z = z.to(next(module.parameters()).dtype)
    with pytest.raises(ValueError, match="changed after it was patched: unpatch and patch it again"):
        module.decode(z)
    vae.unpatch(module)
    assert "undone" in repr(handle)
    own = module.decode(z).sample
    with vae.patch(module):
        assert (module.decode(z).sample - own).abs().max() < (0.1 if how == "cast" else 1e-4)


def test_a_pipeline_is_told_to_hand_over_its_vae(module):
    with pytest.raises(ValueError, match="got SimpleNamespace; pass its .vae"):
        vae.patch(SimpleNamespace(vae=module))
