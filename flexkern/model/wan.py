"""The causal Wan 2.1 transformer: few-step autoregressive video (Self-Forcing, LongLive, CausVid, ...).

The module tree carries the published checkpoints' key names, so a cleaned state dict loads with ``strict=True``.
Attention over time is not in here: every block hands query, key and value to ``memory.attend``, and does not know
whether that is a paged cache (``flexkern.memory.PagedMemory``) or a training mask (``flexkern.demo.train``).

    x += gate_1 * SelfAttention(LN(x) * (1 + scale_1) + shift_1)
    x += CrossAttention(LN_affine(x))
    x += gate_2 * FeedForward(LN(x) * (1 + scale_2) + shift_2)

Every sum is followed by a norm of it, so one operation, ``add_modulate``, does both: between two of them the stream of
tokens is x and what is still to be added to it (``Stream``).

Letters: see the glossary (flexkern/docs/architecture.md).
Source: Wan-Video/Wan2.1 wan/modules/model.py; Self-Forcing wan/modules/causal_model.py.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexkern.backends import Pointwise
from flexkern.checks import check_fields, require
from flexkern.memory import Memory
from flexkern.model.savings import fold_padding, joined, products, stack
from flexkern.model.schedule import Prediction

COUNTS = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_len", "text_dim", "freq_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """Sizes of a causal Wan transformer."""

    dim: int
    """channels C of a token"""
    ffn_dim: int
    """channels inside a feed-forward"""
    num_heads: int
    """heads H of an attention"""
    num_layers: int
    """layers L"""
    in_dim: int = 16
    """channels of a latent"""
    out_dim: int = 16
    """channels of a prediction"""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """frames, rows and columns of latents in a token"""
    text_len: int = 512
    """rows of a prompt's embedding, padding included"""
    text_dim: int = 4096
    """channels of a prompt's embedding"""
    freq_dim: int = 256
    """channels of a timestep's sinusoidal embedding"""
    eps: float = 1e-6
    """of every norm"""
    qk_norm: bool = True
    """whether queries and keys are normalised; always, in Wan 2.1"""
    cross_attn_norm: bool = True
    """whether the input of cross-attention is normalised; always, in Wan 2.1"""
    prediction: Prediction = "flow"
    """what the head outputs: flow (noise - x0), or x0 itself"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check_fields(self)
        for name in COUNTS:
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        sizes = f"dim={self.dim}, num_heads={self.num_heads}"
        even = self.dim % self.num_heads == 0 and self.head_dim % 2 == 0
        require(even, f"dim must be num_heads even head dims, got {sizes}")
        planar = len(self.patch_size) == 3 and self.patch_size[0] == 1
        require(planar, f"patch_size must be (1, height, width), got {self.patch_size}")
        if not (self.qk_norm and self.cross_attn_norm):
            raise NotImplementedError(
                "only qk_norm=True and cross_attn_norm=True, as in every published Wan 2.1, are supported"
            )

    @property
    def head_dim(self) -> int:
        """Channels D of a head."""
        return self.dim // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as arguments of ``WanConfig``."""
        return asdict(self)


CONFIGS = {
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "tiny": WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, freq_dim=64, text_len=32, text_dim=48),
}


TextKV = Sequence[tuple[Tensor, ...]]
"""What a prompt became, for every layer: key and value [B, n, H, D] of its n rows, and, where one row stands for many,
what is added to their logits, [1, 1, 1, n] (of other models, whatever their forward reads)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Tokens between two layers: x + update * gate, not added up yet."""

    x: Tensor
    """[B, F, S, C]"""
    update: Tensor | None = None
    """[B, F, S, C]; None for nothing"""
    gate: Tensor | None = None
    """[B, F, C]; None for 1"""

    def normed(
        self, ops: Pointwise, scale: Tensor, shift: Tensor, eps: float, offset: float = 1.0
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum, and LayerNorm of it * (offset + scale) + shift; scale and shift [B, F, C]."""
        if self.update is None:
            assert offset == 1.0, "only a modulation reads tokens to which nothing was added"
            return self.x, ops.modulate(self.x, scale, shift, eps)
        return ops.add_modulate(self.x, self.update, self.gate, scale, shift, eps, offset)


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

    @property
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """What all read the same tokens in self-attention; in memory, keys and values lie together in it."""
        return self.q, self.k, self.v


class Block(nn.Module):
    """One layer: self-attention through a memory, cross-attention to the prompt, feed-forward."""

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
        """[..., C] -> [..., H, D]."""
        return x.unflatten(-1, (self.heads, -1))

    def text_keys(self, text: Tensor, ops: Pointwise) -> tuple[Tensor, Tensor]:
        """Key and value [B, L, H, D] of the embedded text [B, L, C]."""
        attn = self.cross_attn
        key = ops.rms_norm(attn.k(text), attn.norm_k.weight, self.eps)
        return self.split_heads(key), self.split_heads(attn.v(text))

    def attend_text(self, x: Tensor, text: tuple[Tensor, ...], ops: Pointwise) -> Tensor:
        attn = self.cross_attn
        query = self.split_heads(ops.rms_norm(attn.q(x), attn.norm_q.weight, self.eps)).flatten(1, 2)
        q, k, v = (t.transpose(1, 2) for t in (query, *text[:2]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=text[2] if len(text) > 2 else None).transpose(1, 2)
        return attn.o(out.flatten(2).view_as(x))

    def forward(
        self, stream: Stream, time: Tensor, text: tuple[Tensor, ...], memory: Memory, *, keys_only: bool
    ) -> Stream | None:
        """The stream after the block. With keys_only, it only writes keys and values to memory.

        Args:
            stream: Of the block before.
            time: [B, F, 6, C], this layer's modulation for the timesteps.
            text: As ``text_keys`` returns it.
            memory: What self-attention goes through.
            keys_only: Stop behind the keys and values.
        """
        ops, attn = memory.ops, self.self_attn
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = time.unbind(2)
        x, h = stream.normed(ops, scale, shift, self.eps)
        *query, key, value = map(self.split_heads, products((attn.k, attn.v) if keys_only else attn.qkv, h))
        norms = attn.norm_q.weight, attn.norm_k.weight
        attended = memory.attend(self.index, query[0] if query else None, key, value, norms)
        if keys_only or attended is None:
            return None
        weight, bias = (p.expand_as(gate) for p in (self.norm3.weight, self.norm3.bias))
        stream = Stream(x=x, update=attn.o(attended.flatten(-2)), gate=gate)
        x, h = stream.normed(ops, weight, bias, self.eps, offset=0.0)
        x, h = Stream(x=x, update=self.attend_text(h, text, ops)).normed(ops, ffn_scale, ffn_shift, self.eps)
        return Stream(x=x, update=self.feed_forward(h), gate=ffn_gate)

    def feed_forward(self, h: Tensor) -> Tensor:
        """As ``ffn``; on a GPU, in 16 bits, GELU is part of the first product."""
        up, activation, down = self.ffn
        hooked = activation._forward_hooks or activation._forward_pre_hooks
        # cuBLASLt does not say how exact its tanh is: what nobody has measured stays out of float32
        wide = h.dtype.itemsize > 2
        if not h.is_cuda or wide or hooked or (plain := joined([up])) is None:
            return cast(Tensor, self.ffn(h))
        weight, bias, _ = plain
        inner = torch._addmm_activation(bias, h.flatten(0, -2), weight.t(), use_gelu=True)
        return cast(Tensor, down(inner.view(*h.shape[:-1], -1)))


class Head(nn.Module):
    """The last modulation and projection, from tokens to predictions."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, stream: Stream, time: Tensor, ops: Pointwise) -> Tensor:
        """Tokens [B, F, S, C], time [B, F, C] -> [B, F, S, patch * out_dim]."""
        shift, scale = (self.modulation.unsqueeze(1) + time.unsqueeze(2)).unbind(2)
        return self.head(stream.normed(ops, scale, shift, self.eps)[1])


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
        """Of its weights."""
        return self.head.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.head.head.weight.device

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a latent frame. Raises ValueError for a size that patches do not tile."""
        return token_grid(self.config.patch_size, height, width)

    def text_keys(self, text: Tensor, ops: Pointwise) -> list[tuple[Tensor, ...]]:
        """Cross-attention keys and values of a prompt, for every layer.

        Args:
            text: The text encoder's output [B, L, text_dim], zero after the prompt, with L as the model was trained
                (padding is attended: Wan has no text mask).
            ops: Pointwise operations of a backend.

        Returns:
            Where no gradients are wanted, without most of the padding (``fold_padding``), which weighs as before.

        Raises:
            ValueError: text is not [B, L, text_dim].
        """
        if text.dim() != 3 or text.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, {self.config.text_dim}], got {list(text.shape)}")
        text, *bias = (text,) if torch.is_grad_enabled() else fold_padding(text, self.dtype)
        embedded = self.text_embedding(text.to(self.dtype))
        return [(*cast(Block, block).text_keys(embedded, ops), *bias) for block in self.blocks]

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
        """Denoise one chunk; afterwards ``memory`` holds its keys and values.

        Args:
            latents: [B, F, in_dim, h, w].
            timesteps: [B, F], 0 (clean) to 1000 (noise).
            text: From ``text_keys``.
            memory: What self-attention goes through.
            keys_only: Run for keys and values alone: all that comes after them in the last layer is skipped.

        Returns:
            The prediction [B, F, out_dim, h, w], or None with keys_only.
        """
        height, width = latents.shape[-2:]
        stream = Stream(x=self.patchify(latents.to(self.dtype)))
        time, projected = self.embed_time(timesteps)
        blocks = cast(Sequence[Block], self.blocks)
        modulations = torch.stack([block.modulation for block in blocks]).unsqueeze(2) + projected
        last = len(blocks) - 1
        for block, text_kv, modulation in zip(blocks, text, modulations, strict=True):
            stream = block(stream, modulation, text_kv, memory, keys_only=keys_only and block.index == last)
        return None if keys_only else self.unpatchify(self.head(stream, time, memory.ops), height, width)

    def stack_products(self) -> None:
        """Lay the weights of each layer's self-attention together, so that its query, key and value are one product.

        Names, values and ``state_dict`` stay as they are. Whatever replaces the parameters afterwards, like a move to
        another dtype, undoes it: the three products are then three again, with the same result but for rounding.
        """
        for block in cast(Sequence[Block], self.blocks):
            stack(block.self_attn.qkv)


def token_grid(patch_size: tuple[int, int, int], height: int, width: int) -> tuple[int, int]:
    """Token rows and columns of a latent frame. Raises ValueError for a size that patches do not tile."""
    _, ph, pw = patch_size
    if height % ph or width % pw:
        raise ValueError(f"latent frame must be a multiple of {ph}x{pw}, got {height}x{width}")
    return height // ph, width // pw
