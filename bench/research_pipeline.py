"""An eager pipeline that does what the published research code does: what people run today, beside the engine.

    model = ResearchWan.of(causal_wan)  # the same weights, not copied
    video = Video(model, embedding, preset="longlive", noise=noise, frames=120, size=(60, 104))
    for _ in range(40): video.step()
    pictures = video.decode(decoder)  # all of them, at the end

It spares neither a launch nor a byte. Query, key and value are three products. Norms and modulation run operation by
operation in float32. Turns are products in complex128, whose table is built at every call: of query and key where
positions are absolute, of the query and the whole window, in every layer at every step, where they follow the window or
the length of the video. The cache is a tensor of tokens that is shifted left by clone and copy; where it ends is asked
of the device in every layer. The clean pass runs to the end of the head.

Weights, schedule, noise and the angles of a preset are the package's; cache, plan, attention and kernels are not.
Letters: see the glossary (flexkern/docs/architecture.md).
Source: Self-Forcing wan/modules/causal_model.py, wan/modules/model.py and pipeline/causal_inference.py; LongLive
wan/modules/causal_model_infinity.py, which turns the window anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexkern.checks import require
from flexkern.model.decoder import ChunkDecoder
from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.noise import Noise
from flexkern.policies import Preset, get_preset
from flexkern.policies.position import HORIZON
from flexkern.policies.retention import SinkWindow

BASE = 10000.0


def unit(angle: Tensor) -> Tensor:
    """e^(i angle) in complex128."""
    return torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())


def place_factors(count: int, bands: int) -> Tensor:
    """Rotation of each row, or column: complex128 [count, bands]."""
    theta = BASE ** (-torch.arange(bands, dtype=torch.float64) / bands)
    return unit(torch.arange(count)[:, None] * theta)


def turn(x: Tensor, time: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x [B, N * rows * columns, H, D], pairs interleaved, turned in complex128 by a table that is built here.

    Args:
        x: Queries or keys of N frames.
        time: Of each frame, complex128 [N, G, T], G = 1 or H.
        rows: Of each row, complex128 [rows, bands].
        columns: Of each column, complex128 [columns, bands].
    """
    frames, groups = time.shape[:2]
    grid = frames, len(rows), len(columns), groups
    parts = time[:, None, None], rows[None, :, None, None], columns[None, None, :, None]
    table = torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)
    turned = []
    for video in x:
        pairs = torch.view_as_complex(video.to(torch.float64).reshape(*video.shape[:2], -1, 2))
        turned.append(torch.view_as_real(pairs * table).flatten(2))
    return torch.stack(turned).type_as(x)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, L, H, D], [B, M, H, D], [B, M, H, D] -> [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(kw_only=True)
class Cache:
    """Keys and values of a layer, [B, tokens, H, D]; where they end in cache and video, as scalars on the device."""

    key: Tensor
    value: Tensor
    local_end: Tensor
    global_end: Tensor


class Window:
    """What self-attention of every layer sees: the tokens of the frames that a preset keeps.

    Args:
        config: Of the model.
        preset: Its position and retention policies act; a change of prompt is not supported.
        batch: Videos that go in step.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        dtype: Of keys and values.
        device: Of keys and values.

    Raises:
        NotImplementedError: The preset keeps other frames than a sink and the last ones.
    """

    def __init__(
        self, config: WanConfig, preset: Preset, *, batch: int, rows: int, columns: int, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        retention = preset.retention
        if not isinstance(retention, SinkWindow):
            raise NotImplementedError(f"retention must be a SinkWindow, got {type(retention).__name__}")
        if retention.evicted != "drop":
            raise NotImplementedError(f"retention.evicted must be 'drop', got {retention.evicted!r}")
        self.position, self.device, self.heads = preset.position, device, config.num_heads
        self.sink, self.size, self.tokens = retention.sink, retention.window, rows * columns
        third = config.head_dim // 2 // 3
        self.bands = config.head_dim // 2 - 2 * third
        self.rows, self.columns = (place_factors(count, third).to(device) for count in (rows, columns))
        fixed = preset.position.mode == "none" and preset.position.table is None
        stays = fixed and preset.position.index == "absolute" and preset.position.sink_gap is None
        self.moves = not stays  # keys are turned anew
        shape = batch, self.size * self.tokens, config.num_heads, config.head_dim
        zeros = lambda: torch.zeros(shape, dtype=dtype, device=device)
        end = lambda: torch.zeros((), dtype=torch.long, device=device)
        self.caches = [
            Cache(key=zeros(), value=zeros(), local_end=end(), global_end=end()) for _ in range(config.num_layers)
        ]
        self.frames: list[int] = []
        self.start = 0

    def begin(self, frames: Sequence[int]) -> None:
        """Before the passes of a chunk: which frames they see, and how far each is turned."""
        held, recent = self.frames[self.sink :], self.size - self.sink - len(frames)
        require(recent >= 0, f"the window must hold the sink and {len(frames)} frames, got {self.size}")
        self.frames = [*self.frames[: self.sink], *held[max(0, len(held) - recent) :], *frames]
        self.start = frames[0] * self.tokens
        if not self.moves:
            theta = torch.from_numpy(self.position.frequencies(self.bands))
            self.query_time = self.key_time = unit(torch.tensor(frames)[:, None, None] * theta).to(self.device)
            return
        phases = self.position.phases(query=frames, visible=self.frames, bands=self.bands, heads=self.heads)
        if len(phases.key) > 1 or (phases.logit_scale != 1).any():
            raise NotImplementedError("positions must be modulated by chunk, and logits not scaled")
        self.query_time = unit(torch.from_numpy(phases.query)).to(self.device)
        self.key_time = unit(torch.from_numpy(phases.key[0])).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Put a chunk's keys and values [B, F * S, H, D] into the cache, then attend to all of it."""
        cache, size, sink = self.caches[layer], self.size * self.tokens, self.sink * self.tokens
        end = self.start + key.shape[1]
        filled = int(cache.local_end.item() + end - cache.global_end.item())
        if filled > size:
            evicted = filled - size
            for held in (cache.key, cache.value):
                held[:, sink : size - evicted] = held[:, sink + evicted :].clone()
            filled = size
        new = slice(filled - key.shape[1], filled)
        cache.key[:, new] = key if self.moves else self._turn(key, self.key_time)
        cache.value[:, new] = value
        cache.global_end.fill_(end)
        cache.local_end.fill_(filled)
        keys, values = cache.key[:, :filled], cache.value[:, :filled]
        if self.moves:
            keys = self._turn(keys, self.key_time)
        return attention(self._turn(query, self.query_time), keys, values)

    def _turn(self, x: Tensor, time: Tensor) -> Tensor:
        return turn(x, time, self.rows, self.columns)


class RMSNorm(nn.Module):
    """In float32, operation by operation."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    """In float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class Attention(nn.Module):
    """Projections, and the norms of query and key over all heads."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: WanConfig, index: int):
        super().__init__()
        dim, self.index = config.dim, index
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.norm1, self.norm2 = (LayerNorm(dim, eps=config.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = LayerNorm(dim, eps=config.eps)
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def forward(self, x: Tensor, time: Tensor, text: tuple[Tensor, Tensor], window: Window) -> Tensor:
        """x [B, F * S, C] after the layer; time [B, F, 6, C]."""
        by_frame = time.shape[1], -1
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            self.modulation.float().unsqueeze(1) + time.float()
        ).chunk(6, dim=2)

        def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return (x.float().unflatten(1, by_frame) * (1 + scale) + shift).flatten(1, 2).type_as(x)

        def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
            return (x.float() + (update.float().unflatten(1, by_frame) * gate).flatten(1, 2)).type_as(x)

        attn = self.self_attn
        h = modulated(self.norm1(x), scale, shift)
        attended = window.attend(self.index, attn.query(h), *attn.keys(h))
        x = gated(x, attn.o(attended.flatten(2)), gate)
        cross = self.cross_attn
        x = x + cross.o(attention(cross.query(self.norm3(x)), *text).flatten(2))
        return gated(x, self.ffn(modulated(self.norm2(x), ffn_scale, ffn_shift)), ffn_gate)


class Head(nn.Module):
    """From tokens to predictions."""

    def __init__(self, config: WanConfig):
        super().__init__()
        _, ph, pw = config.patch_size
        self.norm = LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F * S, C], time [B, F, C] -> [B, F * S, patch * out_dim]."""
        shift, scale = (self.modulation.float().unsqueeze(1) + time.float().unsqueeze(2)).chunk(2, dim=2)
        h = self.norm(x).float().unflatten(1, (time.shape[1], -1)) * (1 + scale) + shift
        return self.head(h.flatten(1, 2).type_as(x))


class ResearchWan(nn.Module):
    """The transformer, with the published names of its weights."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.head = Head(config)

    @classmethod
    def of(cls, model: CausalWan) -> "ResearchWan":
        """The same transformer: its weights are those tensors, not copies of them."""
        with torch.device("meta"):
            made = cls(model.config)
        made.load_state_dict(model.state_dict(), assign=True)
        return made.eval().requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.head.head.weight

    def text_keys(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of cross-attention for an embedding [B, L, text_dim], of every layer."""
        embedded = self.text_embedding(prompt.to(self.weight.device, self.weight.dtype))
        return [block.cross_attn.keys(embedded) for block in self.blocks]

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Sequence[tuple[Tensor, Tensor]], window: Window
    ) -> Tensor:
        """The prediction [B, F, out_dim, h, w] for latents [B, F, in_dim, h, w] at timesteps [B, F]."""
        x = self.patch_embedding(latents.to(self.weight.dtype).transpose(1, 2))
        _, _, frames, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)
        half = self.config.freq_dim // 2
        angle = timesteps.double()[..., None] * BASE ** (-torch.arange(half, device=x.device).double() / half)
        time = self.time_embedding(torch.cat((angle.cos(), angle.sin()), dim=-1).to(x.dtype))
        projected = self.time_projection(time).unflatten(-1, (6, -1))
        for block, keys in zip(self.blocks, text, strict=True):
            x = block(x, projected, keys, window)
        patches = self.head(x, time).view(len(x), frames, rows, columns, *self.config.patch_size[1:], -1)
        return torch.einsum("bfhwpqc->bfchpwq", patches).flatten(-2).flatten(3, 4)


class Video:
    """One video: chunk by chunk through all denoising steps, and decoded when it is whole.

    Args:
        model: The transformer.
        prompt: Embedding [B, L, text_dim].
        preset: Its position and retention policies act.
        noise: What frames start from, and what is drawn between steps.
        frames: Latent frames that there is room for.
        size: Height and width of a latent frame.
        schedule: Noise levels of a chunk.
        chunk: Latent frames denoised together.
        horizon: Latent frames that the model was trained on.

    Raises:
        NotImplementedError: The preset's positions or its retention are not supported.
    """

    def __init__(
        self, model: ResearchWan, prompt: Tensor, *, preset: str | Preset, noise: Noise, frames: int,
        size: tuple[int, int], schedule: Schedule | None = None, chunk: int = 3, horizon: int = HORIZON,
    ):  # fmt: skip
        self.model, self.noise, self.chunk, self.schedule = model, noise, chunk, schedule or Schedule()
        chosen, (_, ph, pw), weight = get_preset(preset), model.config.patch_size, model.weight
        self.window = Window(
            model.config, chosen.for_horizon(horizon).resolve(), batch=len(prompt), rows=size[0] // ph,
            columns=size[1] // pw, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        with torch.inference_mode():
            self.text = model.text_keys(prompt)
        self.frames, self.made = frames, 0

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Clean latents [B, F, C, h, w] of the next chunk. Raises ValueError where there is no room for them."""
        frames = list(range(self.made, self.made + self.chunk))
        require(frames[-1] < self.frames, f"there is room for {self.frames} frames")
        self.window.begin(frames)
        kind = self.model.config.prediction
        z = self.noise.initial(frames).to(self.model.weight.device)
        if not self.made:
            self.latents = z.new_zeros(len(z), self.frames, *z.shape[2:])
        timesteps = self.schedule.timesteps()
        for i, timestep in enumerate(timesteps):
            clean = self.schedule.clean(z, self._predict(z, timestep), timestep, kind)
            if i + 1 < len(timesteps):
                z = self.schedule.noisy(clean, self.noise.renoise(frames, i).to(clean.device), timesteps[i + 1])
        self.latents[:, frames] = clean
        self._predict(clean, self.schedule.context_timestep)
        self.made += self.chunk
        return clean

    @torch.inference_mode()
    def decode(self, decoder: ChunkDecoder) -> Tensor:
        """Pictures of all frames so far, uint8 [B, pictures, height, width, 3], in one go."""
        return decoder(self.latents[:, : self.made])

    def _predict(self, z: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full(z.shape[:2], timestep, dtype=torch.float32, device=z.device)
        return self.model(z, timesteps, self.text, self.window)
