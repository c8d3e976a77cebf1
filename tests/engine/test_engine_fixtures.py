"""Agreement with the published pipelines: what they computed, at a tiny size in float32, is in tests/data."""

import json

import pytest
import torch
from recorded import DATA, PRESETS, TOLERANCE, RecordedNoise
from safetensors import safe_open
from safetensors.torch import load_file

import flexkern
from flexkern.engine import Engine
from flexkern.kernels import reference
from flexkern.model.schedule import SCHEDULES
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.plan import turns
from flexkern.policies import get_preset


@pytest.fixture(scope="module")
def model():
    model = CausalWan(CONFIGS["tiny"])
    model.load_state_dict(load_file(DATA / "tiny_wan.safetensors"))
    return model.eval()


@pytest.fixture(scope="module", params=PRESETS)
def recorded(request):
    path = DATA / f"{request.param}.safetensors"
    with safe_open(path, "pt") as file:
        return request.param, file.metadata(), load_file(path)


def rendered(model, name, tensors, backend):
    engine = Engine(model, schedule=SCHEDULES["self-forcing"], backend=backend, size=(8, 8))
    noise = RecordedNoise(tensors)
    frames = tensors["noise"].shape[1]
    session = engine.session(tensors["prompt"], preset=get_preset(*PRESETS[name]), frames=frames, noise=noise)
    return session, torch.cat([chunk.latents for chunk in session], dim=1)


def test_schedule_is_the_recorded_one(recorded):
    _, metadata, _ = recorded
    assert SCHEDULES["self-forcing"].timesteps() == json.loads(metadata["denoising_steps"])


def test_latents_and_cache_agree(model, recorded):
    name, _, tensors = recorded
    session, latents = rendered(model, name, tensors, "sdpa")
    assert (latents - tensors["latents"]).abs().max() < TOLERANCE

    cache, slots = session.cache, torch.tensor(session.cache.slots)
    tokens = len(slots) * cache.keys.shape[3]
    if "kv_v.0" not in tensors:
        return  # the code lets go of its cache, or keeps its keys turned otherwise
    for layer in range(model.config.num_layers):
        values = cache.values[layer][:, slots].flatten(1, 2)
        assert (values - tensors[f"kv_v.{layer}"][:, :tokens]).abs().max() < TOLERANCE
        keys, pairs = cache.keys[layer][:, slots], model.config.head_dim // 2
        if session.preset.position.index == "slot":  # recorded without any rotation, ours has the one by place
            back = session.window.place_turn * torch.tensor((1.0, -1.0))
            keys = reference.rotate(keys, reference.pad_turn(back, pairs, front=True)[:, None])
        else:
            theta = torch.from_numpy(session.preset.position.frequencies(22))
            angle = torch.tensor(cache.frames).double()[:, None] * theta
            keys = reference.rotate(keys, reference.pad_turn(turns(angle), pairs)[None, :, None, None])
        interleaved = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2).flatten(1, 2)
        assert (interleaved - tensors[f"kv_k.{layer}"][:, :tokens]).abs().max() < TOLERANCE


def test_the_oracle_backend_agrees(model):
    name = "longlive_inf"
    tensors = load_file(DATA / f"{name}.safetensors")
    _, latents = rendered(model, name, tensors, "reference")
    assert (latents - tensors["latents"]).abs().max() < TOLERANCE


@pytest.mark.triton(3, 4)
def test_the_kernels_agree(model, device):
    """The first two chunks, so that the interpreter ends: the second reads the first one's pages."""
    tensors = load_file(DATA / "sf_local.safetensors")
    engine = Engine(model.to(device), schedule=SCHEDULES["self-forcing"], backend="triton", size=(8, 8))
    session = engine.session(
        tensors["prompt"].to(device), preset=get_preset(*PRESETS["sf_local"]), noise=RecordedNoise(tensors)
    )
    latents = torch.cat([session.step().latents for _ in range(2)], dim=1).cpu()
    model.cpu()
    assert (latents - tensors["latents"][:, :6]).abs().max() < 1e-5


def test_a_wrong_window_or_position_does_not_agree(model):
    """The recordings tell the policies apart."""
    tensors = load_file(DATA / "longlive_inf.safetensors")
    for wrong in ({"retention.sink": 0}, {"retention.window": 12}, {"position.index": "absolute"}):
        engine = Engine(model, size=(8, 8))
        chosen = get_preset(*PRESETS["longlive_inf"])
        session = engine.session(
            tensors["prompt"], preset=get_preset(chosen, wrong), noise=RecordedNoise(tensors), frames=21
        )
        latents = torch.cat([chunk.latents for chunk in session], dim=1)
        assert (latents - tensors["latents"]).abs().max() > 100 * TOLERANCE


def test_bfloat16_stays_near_float32():
    """The same loop from a checkpoint on disk in bfloat16: the research pipelines differ by 6e-3 relative there."""
    tensors = load_file(DATA / "sf_local.safetensors")
    engine = flexkern.Engine.from_pretrained(DATA / "tiny_wan.safetensors", dtype=torch.bfloat16, size=(8, 8))
    noise, chosen = RecordedNoise(tensors), get_preset(*PRESETS["sf_local"])
    session = engine.session(tensors["prompt"], preset=chosen, frames=18, noise=noise)
    latents = torch.cat([chunk.latents for chunk in session], dim=1)
    assert 1e-4 < (latents - tensors["latents"]).norm() / tensors["latents"].norm() < 1e-2
