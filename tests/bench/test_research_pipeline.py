"""The research pipeline of the benches computes what the published ones computed, and what the engine does."""

from dataclasses import dataclass, replace

import pytest
import torch
import upstream
from both_loops import GRID, SIZE, Recorded, prompt_of
from recorded import DATA, PRESETS, TOLERANCE, RecordedNoise
from research_pipeline import ResearchWan, Video
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from flexkern.engine import Engine
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.policies import get_preset
from flexkern.policies.retention import Kept


@pytest.fixture(scope="module")
def model():
    model = CausalWan(CONFIGS["tiny"])
    model.load_state_dict(load_file(DATA / "tiny_wan.safetensors"))
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [name for name, chosen in PRESETS.items() if get_preset(*chosen).retention.evicted == "drop"],
)
def test_latents_and_cache_are_the_recorded_ones(model, name):
    tensors = load_file(DATA / f"{name}.safetensors")
    frames, noise, preset = tensors["noise"].shape[1], RecordedNoise(tensors), get_preset(*PRESETS[name])
    video = Video(
        ResearchWan.of(model), tensors["prompt"], preset=preset, noise=noise, frames=frames, size=(8, 8)
    )  # fmt: skip
    for _ in range(frames // 3):
        video.step()
    assert (video.latents - tensors["latents"]).abs().max() < TOLERANCE
    for layer, cache in enumerate(video.window.caches if "kv_k.0" in tensors else ()):
        held = int(cache.local_end)
        for ours, theirs in ((cache.key, tensors[f"kv_k.{layer}"]), (cache.value, tensors[f"kv_v.{layer}"])):
            assert (ours[:, :held] - theirs[:, :held]).abs().max() < TOLERANCE


@pytest.mark.parametrize("overrides", [{}, {"position.index": "slot"}], ids=["absolute", "by slot"])
def test_it_is_what_the_tests_call_the_published_semantics(model, overrides):
    """A sink with absolute positions is in no recording: here both are held together."""
    noise, preset = Recorded(5, 4), get_preset("longlive", {"retention.window": 9} | overrides)
    config = model.config
    video = Video(ResearchWan.of(model), prompt_of(1), preset=preset, noise=noise, frames=15, size=SIZE)
    for _ in range(5):
        video.step()
    memory = upstream.RollingMemory(
        config.num_layers, 1, config.num_heads, config.head_dim, *GRID, window=9, sink=3, slot=bool(overrides)
    )  # fmt: skip
    schedule = video.schedule
    theirs = upstream.run(
        model, memory, prompt_of(1), noise.video, noise.fresh, schedule.timesteps(), schedule.sigma
    )  # fmt: skip
    assert (video.latents - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["longlive", "flex"])
def test_the_engine_makes_the_same_video(model, name):
    """Far beyond the horizon, so that flex slows its bands from chunk to chunk and every key is turned anew."""
    preset, chunks = get_preset(name, {"retention.window": 9}), 5
    session = Engine(model, backend="sdpa", size=SIZE, horizon=6).session(
        prompt_of(1), preset=preset, noise=Recorded(chunks, 4)
    )
    ours, noise = [session.step().latents for _ in range(chunks)], session.noise
    noise.left = list(noise.fresh)
    video = Video(
        ResearchWan.of(model), prompt_of(1), preset=preset, noise=noise, frames=3 * chunks, size=SIZE, horizon=6
    )  # fmt: skip
    for _ in range(chunks):
        video.step()
    assert (video.latents - torch.cat(ours, dim=1)).abs().max() < TOLERANCE
    assert video.window.frames == session.cache.frames


class Turned(TorchDispatchMode):
    """How many pairs each product in complex128 turns."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mul.Tensor and out.dtype == torch.complex128:
            self.pairs.append(out.numel())
        return out


@pytest.mark.parametrize("name, keys", [("longlive", 3), ("flex", 9)])
def test_it_spares_nothing_that_research_code_does(model, monkeypatch, name, keys):
    """In every layer of every pass: two questions to the device; query, and new keys or the whole window, turned."""
    preset, config = get_preset(name, {"retention.window": 9}), model.config
    video = Video(ResearchWan.of(model), prompt_of(1), preset=preset, noise=Recorded(4, 4), frames=12, size=SIZE)
    for _ in range(3):
        video.step()
    asked, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: asked.append(tensor.dtype) or item(tensor))
    with Turned() as turned:
        video.step()
    layers, frame = 5 * config.num_layers, GRID[0] * GRID[1] * config.dim // 2
    assert asked.count(torch.int64) == 2 * layers
    # new keys are turned before the query, and so is a window
    assert turned.pairs == [keys * frame, 3 * frame] * layers


def test_weights_are_shared_and_what_it_cannot_do_is_refused(model):
    research, noise = ResearchWan.of(model), Recorded(1, 4)
    assert research.weight.data_ptr() == model.head.head.weight.data_ptr()
    begin = lambda preset: Video(research, prompt_of(1), preset=preset, noise=noise, frames=3, size=SIZE)

    @dataclass(frozen=True)
    class Other:
        capacity: int = 3
        pages: int = 3
        pinned: int = 0

        def keep(self, frames, incoming):
            return Kept(pages=())

    with pytest.raises(NotImplementedError, match="retention must be a SinkWindow, got Other"):
        begin(replace(get_preset("longlive"), retention=Other()))
    with pytest.raises(NotImplementedError, match="retention.evicted must be 'drop', got 'memory'"):
        begin("memrope")
    with pytest.raises(NotImplementedError, match="logits not scaled"):
        begin(get_preset("flex", {"position.logit_temp": 0.5, "position.scale": 4.0})).step()
    video = begin("longlive")
    video.step()
    with pytest.raises(ValueError, match="there is room for 3 frames"):
        video.step()
