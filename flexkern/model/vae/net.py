"""The decoder of Wan 2.1's VAE: latents into pictures, with a memory of what its causal convolutions have seen.

The module tree carries diffusers' key names. All tensors inside are [B, T, H, W, C], channels last in memory, from the
latents' entry to the pictures' exit; T counts frames at the level's own rate. With N(x) = x / |x| * sqrt(C) * gamma:

    block       x + conv(silu(N(conv(silu(N(x))))))             3x3x3 convolutions, causal in time
    attention   x + proj(softmax(q k^T / sqrt(C)) v)            one head, over the places of a frame, of qkv(N(x))
    upsampler   in time: two frames of each but the first, by a causal convolution over three; in space: each pixel
                four times, then a 3x3 convolution
    decoder     conv, block, attention, block; levels of blocks, each but the last ending in an upsampler;
                conv(silu(N(x))), three colours in -1..1 and a little beyond

Three of its equations are computed in another form than they are written:

- Doubling and convolving is one transposed convolution of stride 2 with a 4x4 kernel (``fold_doubling``): 16 products
  for each pixel doubled instead of 36, and the doubled frames are never in memory.
- A causal convolution reads one buffer: the last two frames of its input so far, then the new ones, which the norm
  writes there. So a video in pieces needs neither padding in time nor concatenation.
- A block hands on its two summands; whoever normalises next adds them while it reads.

Source: Wan-Video/Wan2.1 wan/modules/vae.py; diffusers models/autoencoders/autoencoder_kl_wan.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexkern.model.vae.ops import add_norm, add_norm_silu, convolve, splice, takes_own, why_not_own

Convolutions = Literal["library", "hopper"]  # whose: torch's library's, or our kernel's
DOUBLING = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))  # rows of the 3-tap kernel that make each of the 4 taps


class Sizes(NamedTuple):
    """What the shapes of a checkpoint say of its decoder."""

    latent: int
    """channels of a latent"""
    widths: tuple[int, ...]
    """channels of the blocks of each level, the latents' own first"""
    blocks: int
    """of a level"""
    doubles_time: tuple[bool, ...]
    """whether the upsampler after each level but the last doubles time as well"""
    colours: int = 3

    @property
    def stretch(self) -> tuple[int, ...]:
        """Pictures that a frame of each level becomes, the first frame of a video apart."""
        found = [1]
        for doubles in reversed(self.doubles_time):
            found.insert(0, found[0] * (2 if doubles else 1))
        return tuple(found)


PUBLISHED = Sizes(16, (384, 384, 192, 96), 2, (True, True, False))  # Wan 2.1


class Sum:
    """Features [B, T, H, W, C] whose last addition is left to whoever reads them; they can be read once.

    So a block's input is freed as soon as the block is through with it, whoever called the block.
    """

    def __init__(self, value: Tensor, addend: Tensor | None = None):
        self._summands: list[tuple[Tensor, Tensor | None]] = [(value, addend)]

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Both summands, of which the first may be overwritten; the second is None for zero."""
        return self._summands.pop()

    def total(self) -> Tensor:
        """The sum itself."""
        value, addend = self.take()
        return value if addend is None else value.add_(addend)


@dataclass
class Past:
    """What a video's frames leave for the next ones: of each causal convolution's input, the last two frames."""

    held: dict[str, Tensor] = field(default_factory=dict)
    """[B, 2, H, W, C] by the convolution's name; none is ever written to, but ``graphs.InPlace``"""

    def __bool__(self) -> bool:
        return bool(self.held)


class CausalConv(nn.Conv3d):
    """A convolution over this frame and the two before; its input comes from ``splice``, with those two in front."""

    name = ""  # in the decoder
    own = False  # whether a kernel of ours computes it

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T + 2, H, W, inputs] -> [B, T, H, W, outputs]."""
        return convolve(x, self, own=self.own)

    def read_normed(self, x: Sum, norm: "Norm", past: Past) -> tuple[Tensor, Tensor]:
        """x, and what the convolution of silu(N(x)) is to be computed from."""
        total, buffer, past.held[self.name] = add_norm_silu(*x.take(), norm.gamma, past.held.get(self.name))
        return total, buffer

    def read(self, x: Tensor, past: Past) -> Tensor:
        """What the convolution of x is to be computed from."""
        buffer, past.held[self.name] = splice(x, past.held.get(self.name))
        return buffer


class Norm(nn.Module):
    """Holds gamma [C], in the checkpoint's shape [C, 1, ...]."""

    def __init__(self, channels: int, places: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * places))


class Block(nn.Module):
    """Two convolutions, each of the normalised input, around which the input goes unchanged, or through a 1x1x1 one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs, 3), CausalConv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs, 3), CausalConv(outputs, outputs)
        self.conv_shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Sum, past: Past) -> Sum:
        """[B, T, H, W, inputs] -> [B, T, H, W, outputs]."""
        total, buffer = self.conv1.read_normed(x, self.norm1, past)
        hidden = Sum(self.conv1(buffer))
        del buffer
        buffer = self.conv2.read_normed(hidden, self.norm2, past)[1]
        out, short = self.conv2(buffer), self.conv_shortcut
        del buffer
        return Sum(out, total if short is None else F.linear(total, short.weight.flatten(1), short.bias))


class Attention(nn.Module):
    """Every place of a frame looks at every other."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Sum) -> Sum:
        """[B, T, H, W, C] -> the same shape."""
        total, normed = add_norm(*x.take(), self.norm.gamma)
        qkv = F.linear(normed.flatten(0, 1).flatten(1, 2), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        query, key, value = qkv.unsqueeze(1).chunk(3, dim=-1)  # [B T, 1, H W, C] each
        attended = F.scaled_dot_product_attention(query, key, value)
        projected = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        return Sum(projected.view_as(total), total)


class Upsampler(nn.Module):
    """Doubles height and width, and for some levels the frames: all but a video's first one."""

    folded: Tensor

    def __init__(self, channels: int, outputs: int, *, doubles_time: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(channels, outputs, 3, padding=1)])
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if doubles_time else None
        self.register_buffer("folded", None, persistent=False)

    def forward(self, x: Tensor, past: Past, *, first: bool) -> Tensor:
        """[B, T, H, W, C] -> [B, T or 2 T, 2 H, 2 W, outputs]; first: the video begins with x[:, 0]."""
        if self.time_conv is not None:
            x = self._double_time(self.time_conv, x, past, first=first)
        frames = x.flatten(0, 1).movedim(-1, 1)
        doubled = F.conv_transpose2d(frames, self.folded, self._spatial.bias, stride=2, padding=1)
        return doubled.movedim(1, -1).contiguous().unflatten(0, x.shape[:2])

    def _double_time(self, conv: CausalConv, x: Tensor, past: Past, *, first: bool) -> Tensor:
        """Two frames of each; a video's first one stays single, and the convolution never sees it."""
        alone = 1 if first else 0
        batch, count, height, width, channels = x.shape
        out = x.new_empty(batch, 2 * count - alone, height, width, channels)
        out[:, :alone] = x[:, :alone]
        if count > alone:
            pairs = conv(conv.read(x[:, alone:], past)).unflatten(-1, (2, channels))
            out[:, alone:].unflatten(1, (-1, 2)).copy_(pairs.movedim(4, 2))
        elif first:
            past.held[conv.name] = x.new_zeros(batch, 2, height, width, channels)
        return out

    def fold(self, dtype: torch.dtype) -> None:
        """Take the spatial convolution's weight for the form that ``forward`` computes in, rounded once."""
        folded = fold_doubling(self._spatial.weight.double())
        self.folded = folded.to(dtype, memory_format=torch.channels_last)
        del self._spatial.weight

    @property
    def _spatial(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.resample[1])


class Level(nn.Module):
    """Blocks at one size of frames, and an upsampler to the next."""

    def __init__(self, widths: Sequence[int], upsampler: Upsampler | None):
        super().__init__()
        self.resnets = nn.ModuleList(Block(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, x: Sum, past: Past, *, first: bool) -> Sum:
        """[B, T, H, W, C] -> the next level's."""
        for block in self.resnets:
            x = block(x, past)
        if self.upsamplers is None:
            return x
        return Sum(self.upsamplers[0](x.total(), past, first=first))


class Middle(nn.Module):
    """Where each place of a frame sees all others."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(Block(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: Sum, past: Past) -> Sum:
        """[B, T, H, W, C] -> the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, past)), past)


class Decoder(nn.Module):
    """Everything after the first 1x1x1 convolution."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        widths, last = sizes.widths, len(sizes.widths) - 1
        self.conv_in = CausalConv(sizes.latent, widths[0])
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        inputs = widths[0]
        for i, width in enumerate(widths):
            up = None if i == last else Upsampler(width, width // 2, doubles_time=sizes.doubles_time[i])
            self.up_blocks.append(Level([inputs, *[width] * (sizes.blocks + 1)], up))
            inputs = width // 2
        self.norm_out, self.conv_out = Norm(widths[-1], 3), CausalConv(widths[-1], sizes.colours)

    def forward(self, z: Tensor, past: Past, at_once: Sequence[int]) -> Iterator[Tensor]:
        """Pictures [B, T, H, W, colours] of latent frames [B, F, h, w, C], in pieces that follow on each other.

        Args:
            z: What the first 1x1x1 convolution made.
            past: Of the video so far; afterwards it is that of these frames too.
            at_once: For each level how many of its frames are computed together, at most. The pictures are the same,
                the memory is not.
        """
        first = not past
        for part in z.split(at_once[0], dim=1):
            yield from self._rise(0, self.middle(part, past), past, at_once, first=first)
            first = False

    def middle(self, z: Tensor, past: Past) -> Sum:
        """What the levels begin with: all that looks at a whole frame is done."""
        return self.mid_block(Sum(self.conv_in(self.conv_in.read(z, past))), past)

    def rise(self, features: Tensor, past: Past, at_once: Sequence[int]) -> Iterator[Tensor]:
        """The pictures of a whole video from features [B, F, h, w, C] of ``middle``, or from a tile of them."""
        for i, part in enumerate(features.split(at_once[0], dim=1)):
            x = Sum(part.clone(memory_format=torch.contiguous_format))
            yield from self._rise(0, x, past, at_once, first=i == 0)

    def _rise(self, index: int, x: Sum, past: Past, at_once: Sequence[int], *, first: bool) -> Iterator[Tensor]:
        """The pictures of a level's input x."""
        risen: Sum = self.up_blocks[index](x, past, first=first)
        if index == len(self.up_blocks) - 1:
            yield self.conv_out(self.conv_out.read_normed(risen, self.norm_out, past)[1])
            return
        parts = [Sum(part) for part in risen.total().split(at_once[index + 1], dim=1)]
        for part in parts:
            yield from self._rise(index + 1, part, past, at_once, first=first)
            first = False


class DecoderNet(nn.Module):
    """The decoder with its weights in the form it computes in; ``prepare`` brings them into it."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.post_quant_conv = nn.Conv3d(sizes.latent, sizes.latent, 1)
        self.decoder = Decoder(sizes)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv):
                module.name = name.removeprefix("decoder.")

    @classmethod
    def random(cls, sizes: Sizes, *, dtype: torch.dtype, device: str | torch.device) -> "DecoderNet":
        """With random weights, ready to compute: to compile what a real one launches, or to time it."""
        with torch.device(device):
            net = cls(sizes).eval().requires_grad_(False)
            return net.prepare(torch.zeros(sizes.latent), torch.ones(sizes.latent), dtype)

    @torch.no_grad()
    def prepare(self, mean: Tensor, std: Tensor, dtype: torch.dtype) -> "DecoderNet":
        """Fold what can be folded in float64, round once, lay the weights out channels last.

        Args:
            mean: [latent], of each channel of the latents before they were normalised.
            std: [latent], their standard deviation.
            dtype: Of what is computed; the first, small convolution stays in float32.
        """
        conv, wide = self.post_quant_conv, torch.promote_types(dtype, torch.float32)
        assert conv.bias is not None
        weight, bias, mean, std = (x.double() for x in (conv.weight.flatten(1), conv.bias, mean, std))
        entry = (weight @ mean + bias).to(wide), (weight * std).to(wide)  # W (std * x + mean) + b
        for module in self.modules():
            if isinstance(module, Upsampler):
                module.fold(dtype)
        self.to(dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        conv.bias, conv.weight = map(_frozen, entry)
        return self

    def convolve_with(self, convolutions: Convolutions) -> "DecoderNet":
        """Choose who computes the 3x3x3 convolutions; the others stay with torch's library.

        Raises:
            ValueError: There is no such choice, or the kernel does not run on this device or in this dtype.
        """
        if convolutions not in get_args(Convolutions):
            choices = " or ".join(map(repr, get_args(Convolutions)))
            raise ValueError(f"convolutions must be {choices}, got {convolutions!r}")
        if convolutions == "hopper" and (why := why_not_own(self.device, self.dtype)):
            raise ValueError(f"convolutions 'hopper' cannot run: {why}")
        for conv in self.causal().values():
            conv.own = convolutions == "hopper" and takes_own(conv)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes."""
        return self.decoder.conv_out.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.decoder.conv_out.weight.device

    def causal(self) -> Mapping[str, CausalConv]:
        """The causal convolutions by name."""
        return {module.name: module for module in self.modules() if isinstance(module, CausalConv)}

    def forward(self, latents: Tensor, past: Past, at_once: Sequence[int]) -> Iterator[Tensor]:
        """Pictures [B, T, H, W, colours] of normalised latents [B, F, C, h, w], in pieces; see ``Decoder.forward``."""
        return self.decoder(self._enter(latents), past, at_once)

    def middle(self, latents: Tensor, past: Past) -> Iterator[Tensor]:
        """Features [B, 1, h, w, C] of one frame after the other, for ``rise``."""
        for frame in latents.split(1, dim=1):
            yield self.decoder.middle(self._enter(frame), past).total()

    def rise(self, features: Tensor, past: Past, at_once: Sequence[int]) -> Iterator[Tensor]:
        """As ``Decoder.rise``."""
        return self.decoder.rise(features, past, at_once)

    def _enter(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w], normalised -> [B, F, h, w, C], as the decoder takes them."""
        entry = self.post_quant_conv
        places = latents.movedim(2, -1).contiguous()  # products of another layout would round otherwise
        return F.linear(places.to(entry.weight.dtype), entry.weight, entry.bias).to(self.dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def fold_doubling(weight: Tensor) -> Tensor:
    """The kernel whose transposed convolution doubles and convolves at once.

    Output row 2i sees rows i - 1, i, i of the frame before it was doubled, and row 2i + 1 rows i, i, i + 1: two taps
    each, of which one is a sum. With stride 2 and padding 1, tap k of four meets output 2i - 1 + k.

    Args:
        weight: [outputs, inputs, 3, 3], of the convolution (padding 1) that follows on the doubling.

    Returns:
        [inputs, outputs, 4, 4].
    """
    taps = torch.tensor(DOUBLING, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ka,lb,oiab->iokl", taps, taps, weight)
