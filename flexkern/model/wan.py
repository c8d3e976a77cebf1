"""The causal Wan 2.1 transformer: few-step autoregressive video (Self-Forcing, LongLive, CausVid, ...).

The module tree carries the published checkpoints' key names, so a cleaned state dict loads with ``strict=True``.
Attention over time is not in here: every block hands query, key and value to ``memory.attend`` and does not know
whether they meet a paged cache (``flexkern.memory.PagedMemory``) or a training mask (``flexkern.demo.train``).

    x += gate_1 * SelfAttention(LN(x) * (1 + scale_1) + shift_1)
    x += CrossAttention(LN_affine(x))
    x += gate_2 * FeedForward(LN(x) * (1 + scale_2) + shift_2)

Shapes: B batch, F frames, S tokens of a frame, C = dim, H heads, D = C / H, L text tokens.
Source: Wan-Video/Wan2.1 wan/modules/model.py; Self-Forcing wan/modules/causal_model.py.
"""

import math
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """Sizes of a causal Wan transformer. ``prediction`` is what the head outputs: flow (noise - x0) or x0 itself."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    prediction: str = "flow"

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "in_dim",
            "out_dim",
            "text_len",
            "text_dim",
            "freq_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim must be num_heads even head dims, got dim={self.dim}, num_heads={self.num_heads}")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ValueError(f"patch_size must be (1, height, width), got {self.patch_size}")
        if not (self.qk_norm and self.cross_attn_norm):
            raise NotImplementedError(
                "only qk_norm=True and cross_attn_norm=True, as in every published Wan 2.1, are supported"
            )
        if self.prediction not in ("flow", "x0"):
            raise ValueError(f"prediction must be 'flow' or 'x0', got {self.prediction!r}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def to_dict(self) -> dict:
        return asdict(self)


CONFIGS = {
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "tiny": WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, freq_dim=64, text_len=32, text_dim=48),
}


class Memory(Protocol):
    """Where self-attention finds its keys and values."""

    def attend(
        self, layer: int, query: Tensor | None, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention output [B, F, S, H, D] of layer ``layer``.

        query, key, value: [B, F, S, H, D] before normalisation and rotation. norms: RMSNorm weights [C] of query and
        key. A query of None means that only keys and values are wanted; the result is then ignored.
        """

    @property
    def ops(self):
        """The backend's pointwise operations: rms_norm, modulate, gate_residual (``flexkern.kernels.reference``)."""


TextKV = list[tuple[Tensor, Tensor]]  # per layer: key, value [B, L, H, D]


class RMSNorm(nn.Module):
    """Holds the weight of an RMSNorm over all heads; the backend applies it."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Projections(nn.Module):
    """Query, key, value and output projections with RMSNorm on query and key, shared by both kinds of attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)


class Block(nn.Module):
    def __init__(self, config: WanConfig, index: int):
        super().__init__()
        dim = config.dim
        self.index, self.heads, self.eps = index, config.num_heads, config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Projections(dim)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = Projections(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def text_keys(self, text: Tensor, ops) -> tuple[Tensor, Tensor]:
        """Key and value [B, L, H, D] of the embedded text [B, L, C]."""
        attn = self.cross_attn
        key = ops.rms_norm(attn.k(text), attn.norm_k.weight, self.eps)
        return self.split_heads(key), self.split_heads(attn.v(text))

    def attend_text(self, x: Tensor, text: tuple[Tensor, Tensor], ops) -> Tensor:
        attn = self.cross_attn
        query = self.split_heads(ops.rms_norm(attn.q(x), attn.norm_q.weight, self.eps)).flatten(1, 2)
        heads_first = (t.transpose(1, 2) for t in (query, *text))
        out = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        return attn.o(out.flatten(2).view_as(x))

    def forward(self, x: Tensor, time: Tensor, text, memory: Memory, *, keys_only: bool) -> Tensor | None:
        """x: [B, F, S, C]; time: [B, F, 6, C]; text: (key, value). With keys_only it stops after writing them."""
        ops = memory.ops
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.unsqueeze(1) + time).unbind(2)
        attn = self.self_attn
        h = ops.modulate(x, scale, shift, self.eps)
        query = None if keys_only else self.split_heads(attn.q(h))
        key, value = self.split_heads(attn.k(h)), self.split_heads(attn.v(h))
        norms = attn.norm_q.weight, attn.norm_k.weight
        attended = memory.attend(self.index, query, key, value, norms)
        if keys_only:
            return None
        x = ops.gate_residual(x, attn.o(attended.flatten(-2)), gate)
        x = x + self.attend_text(self.norm3(x), text, ops)
        return ops.gate_residual(x, self.ffn(ops.modulate(x, ffn_scale, ffn_shift, self.eps)), ffn_gate)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor, ops) -> Tensor:
        shift, scale = (self.modulation.unsqueeze(1) + time.unsqueeze(2)).unbind(2)
        return self.head(ops.modulate(x, scale, shift, self.eps))


class CausalWan(nn.Module):
    """The transformer. ``forward`` denoises one chunk, ``text_keys`` prepares a prompt once."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.head.weight.device

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a latent frame of height x width."""
        _, ph, pw = self.config.patch_size
        if height % ph or width % pw:
            raise ValueError(f"latent frame must be a multiple of {ph}x{pw}, got {height}x{width}")
        return height // ph, width // pw

    def text_keys(self, text: Tensor, ops) -> TextKV:
        """Cross-attention keys and values of a prompt, for every layer.

        text: [B, L, text_dim], the text encoder's output, zero behind the prompt and as long as the model was trained
        with (padding is attended: Wan has no text mask).
        """
        if text.dim() != 3 or text.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, {self.config.text_dim}], got {list(text.shape)}")
        embedded = self.text_embedding(text.to(self.dtype))
        return [block.text_keys(embedded, ops) for block in self.blocks]

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, F, in_dim, h, w] -> tokens [B, F, S, C], by row, then column."""
        _, ph, pw = self.config.patch_size
        b, f, c, h, w = latents.shape
        patches = latents.view(b, f, c, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 2, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.reshape(b, f, (h // ph) * (w // pw), -1), weight, self.patch_embedding.bias)

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[B, F, S, ph * pw * out_dim], channel fastest -> [B, F, out_dim, h, w]."""
        _, ph, pw = self.config.patch_size
        b, f = tokens.shape[:2]
        x = tokens.view(b, f, height // ph, width // pw, ph, pw, self.config.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, self.config.out_dim, height, width)

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps [B, F] in 0..1000 -> embedding [B, F, C] and its projection [B, F, 6, C]."""
        half = self.config.freq_dim // 2
        freq = torch.pow(10000, -torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
        angle = timesteps.double().unsqueeze(-1) * freq
        time = self.time_embedding(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.dtype))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: TextKV, memory: Memory, *, keys_only: bool = False
    ) -> Tensor | None:
        """Denoise one chunk; its keys and values end up in ``memory``.

        latents: [B, F, in_dim, h, w]. timesteps: [B, F], 0 (clean) to 1000 (noise). text: from ``text_keys``.
        keys_only: run for the keys and values alone; what the last layer does behind them, and the head, are skipped.
        Returns the prediction [B, F, out_dim, h, w], or None with keys_only.
        """
        height, width = latents.shape[-2:]
        x = self.patchify(latents.to(self.dtype))
        time, projected = self.embed_time(timesteps)
        last = len(self.blocks) - 1
        for block, text_kv in zip(self.blocks, text, strict=True):
            x = block(x, projected, text_kv, memory, keys_only=keys_only and block.index == last)
        return None if keys_only else self.unpatchify(self.head(x, time, memory.ops), height, width)
