"""The ways to make a video that ``bench_engine.py`` races: the engine's backends, and the eager research pipeline."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from breakdown import Marked, Parts
from research_pipeline import ResearchWan, Video
from roofs import DEVICE
from torch import Tensor

from flexkern.engine import Engine
from flexkern.kernels.attention.select import selected
from flexkern.model.wan import CausalWan
from flexkern.noise import Noise, ResearchNoise
from flexkern.policies import Preset

ENGINES: dict[str, dict[str, Any]] = {  # a row each, and keywords of Engine; the first gets most of the time
    "triton": {"backend": "triton"},
    "triton-no-graphs": {"backend": "triton", "graphs": False},  # what graphs are worth
    "sdpa": {"backend": "sdpa"},
}
RESEARCH = "research"
CHUNK = 3  # latent frames


@dataclass(frozen=True, kw_only=True)
class Made:
    """Milliseconds of a chunk: until its pictures are there, where it is decoded, and of denoising alone."""

    ms: float
    denoise_ms: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all paths share. vae: diffusers' module, None for no pictures. most: chunks that a video may have."""

    model: CausalWan
    vae: Any
    text: Tensor
    size: tuple[int, int]
    preset: Preset
    most: int


def wait(tensor: Tensor) -> None:
    """Until the device has computed it."""
    tensor[(0,) * tensor.dim()].item()


def count_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


class OfEngine:
    """A session of the engine. keywords: of ``Engine``."""

    def __init__(self, setup: Setup, **keywords: Any):
        self.setup, self.session, decoder = setup, None, None
        if setup.vae is not None:
            from flexkern.model.vae import WanDecoder

            net = WanDecoder.from_module(setup.vae).net
            decoder = lambda: Marked(WanDecoder(net))
        self.engine = Engine(setup.model, size=setup.size, chunk=CHUNK, decoder=decoder, **keywords)
        self.shared = count_bytes(setup.model)

    def begin(self, noise: Noise | None = None) -> None:
        """A new video, of the preset's noise where no other is given."""
        self.session = self.engine.session(self.setup.text, preset=self.setup.preset, seed=0, noise=noise)

    def end(self) -> None:
        """Forget the video."""
        self.session = self.latents = None

    def step(self) -> Made:
        """Make the next chunk; its clean latents are ``latents`` then."""
        began = time.perf_counter()
        chunk = self.session.step()
        wait(chunk.latents if chunk.pixels is None else chunk.pixels)
        taken = 1000 * (time.perf_counter() - began)
        self.latents = chunk.latents
        return Made(ms=taken, denoise_ms=1000 * chunk.spent.denoise)

    def finish(self) -> float:
        """Milliseconds a chunk of decoding what is not decoded yet: nothing."""
        return 0.0

    def kernel(self, parts: Parts) -> str:
        """Which kernel its attention is."""
        model = self.setup.model
        if self.engine.backend_name != "triton":
            return parts.attention_kernel
        return selected(model.device, model.config.head_dim, model.dtype).path


class OfResearch:
    """A video of the research pipeline: decoded at its end, in one go, by diffusers' decoder."""

    def __init__(self, setup: Setup):
        self.setup, self.video = setup, None
        self.model = ResearchWan.of(setup.model)
        self.shared = count_bytes(setup.model) + (count_bytes(setup.vae) if setup.vae is not None else 0)

    def begin(self, noise: Noise | None = None) -> None:
        """A new video; its noise is drawn on the device, that of all frames at once, where no other is given."""
        setup, frames = self.setup, CHUNK * self.setup.most
        if noise is None:
            shape = 1, frames, setup.model.config.out_dim, *setup.size
            noise = ResearchNoise(shape, torch.Generator(DEVICE).manual_seed(0), setup.model.dtype)
        self.video = Video(
            self.model, setup.text, preset=setup.preset, noise=noise, frames=frames, size=setup.size, chunk=CHUNK
        )  # fmt: skip

    def end(self) -> None:
        self.video = self.latents = None

    def step(self) -> Made:
        began = time.perf_counter()
        self.latents = self.video.step()
        wait(self.latents)
        taken = 1000 * (time.perf_counter() - began)
        return Made(ms=taken, denoise_ms=taken)

    def finish(self) -> float:
        """Milliseconds a chunk of decoding the video so far."""
        if self.setup.vae is None:
            return 0.0
        from flexkern.model.vae import DiffusersDecoder, WanVAE

        decoder = DiffusersDecoder(WanVAE(self.setup.vae, backend="diffusers"))
        began = time.perf_counter()
        wait(self.video.decode(decoder))
        return 1000 * (time.perf_counter() - began) * CHUNK / self.video.made

    def kernel(self, parts: Parts) -> str:
        return parts.attention_kernel


Way = OfEngine | OfResearch


def ways() -> dict[str, Callable[[Setup], Way]]:
    """What makes each path: the first engine, the research pipeline, then the other engines."""
    first, *others = ({name: partial(OfEngine, **keywords)} for name, keywords in ENGINES.items())
    return {**first, RESEARCH: OfResearch, **{name: make for other in others for name, make in other.items()}}
