"""Weights of the published names at an eighth to a twelfth of the published widths, in diffusers' module and ours."""

import json
from pathlib import Path

import pytest
import torch

from flexkern.model.vae import load_vae

KEYS = json.loads((Path(__file__).parent.parent.parent / "data" / "part_shapes.json").read_text())["vae"]
SMALL = {96: 8, 192: 16, 384: 32, 288: 24, 768: 64, 1152: 96}  # widths of the published VAE: those of the tests


def small(shape):
    return [SMALL.get(size, size) for size in shape]


@pytest.fixture(scope="session")
def state():
    """The published keys with random weights, an eighth to a twelfth as wide."""
    generator = torch.Generator().manual_seed(1)
    return {key: 0.1 * torch.randn(small(shape), generator=generator) for key, shape in KEYS.items()}


@pytest.fixture(scope="session")
def diffusers():
    """The package, which our decoder does without."""
    return pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')


@pytest.fixture(scope="session")
def theirs(state, diffusers):
    """diffusers' model with diffusers' own conversion of the same weights."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    module = diffusers.AutoencoderKLWan(base_dim=8)
    module.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "Wan2.1_VAE.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def vae(file, diffusers):
    return load_vae(file)


@pytest.fixture(scope="session")
def latents():
    return torch.randn(2, 7, 16, 4, 6, generator=torch.Generator().manual_seed(2))


def column(values):
    return torch.tensor(values).view(1, 1, -1, 1, 1)


@pytest.fixture(scope="session")
def published_keys():
    """Names and shapes of Wan2.1_VAE.pth."""
    return KEYS


@pytest.fixture(scope="session")
def diffusers_decode(theirs):
    """What diffusers' decoder makes of normalised latents [B, F, C, h, w] at once: [B, pictures, 3, height, width]."""

    def decode(latents):
        z = latents * column(theirs.config.latents_std) + column(theirs.config.latents_mean)
        with torch.no_grad():
            return theirs.decode(z.transpose(1, 2)).sample.transpose(1, 2)

    return decode


@pytest.fixture(scope="session")
def one_shot(diffusers_decode, latents):
    return diffusers_decode(latents)
