"""Our decoder, one video at a time, in bounded memory.

    decoder = WanDecoder.from_pretrained("Wan2.1-T2V-1.3B", device="cuda", dtype=torch.bfloat16)
    pictures = decoder(latents)  # those of the next latent frames, uint8 [B, pictures, height, width, 3]
    decoder.reset()  # before another video

How many pictures are computed together follows from the memory that it may take, and changes nothing about them.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from flexkern.model.decoder import ChunkDecoder
from flexkern.model.files import some_of
from flexkern.model.vae.net import DecoderNet, Past, Sizes
from flexkern.model.vae.ops import to_bytes
from flexkern.model.vae.weights import held_by, load_net, read_vae

ON_CPU = 4 * 2**30  # bytes that a decoder takes on a CPU if it can; on a GPU it is a quarter of the GPU's memory
BEFORE = 2  # frames that a causal convolution keeps


class WanDecoder(ChunkDecoder):
    """Decodes latents of Wan 2.1 with a network of our own; its pictures are those of diffusers' decoder.

    Args:
        net: With its weights; may be shared by many decoders.
        memory: The most bytes that weights, past and what is being computed may take, for latents of any size;
            convolutions may want workspace beside it. Default: a quarter of the GPU's memory, 4 GiB on a CPU, or what
            one picture at a time takes where that is more.
    """

    def __init__(self, net: DecoderNet, *, memory: int | None = None):
        sizes = net.sizes
        super().__init__(
            channels=sizes.latent, spatial=2 ** (len(sizes.widths) - 1), temporal=sizes.stretch[0], dtype=net.dtype,
            device=net.device,
        )  # fmt: skip
        self.net, self.memory = net, memory
        self._kept = Past()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        memory: int | None = None,
    ) -> "WanDecoder":  # fmt: skip
        """The decoder of a checkpoint; needs torch and safetensors alone.

        Args:
            path: Wan2.1_VAE.pth, another file with its keys or diffusers', or the folder of either.
            device: Where to decode.
            dtype: Of what is computed.
            memory: As above.

        Raises:
            FileNotFoundError: No weights are there.
            NotImplementedError: The VAE of Wan 2.2.
            ValueError: Lists the keys that do not fit.
        """
        return cls(load_net(read_vae(path), dtype=dtype, device=device), memory=memory)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        normalised: bool = True,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
    ) -> "WanDecoder":
        """The decoder with the weights of a VAE that is in memory, on its device.

        Args:
            module: diffusers' AutoencoderKLWan, or Wan's own VAE.
            normalised: Whether latents come as a transformer makes them; False for those that AutoencoderKLWan takes.
            dtype: Of what is computed. Default: the module's.
            memory: As above.

        Raises:
            NotImplementedError: The VAE of Wan 2.2.
            ValueError: It is another module.
        """
        held = held_by(module)
        if not normalised:
            held = replace(held, mean=[0.0] * len(held.mean), std=[1.0] * len(held.std))
        weight = held.state["post_quant_conv.weight"]
        return cls(load_net(held, dtype=dtype or weight.dtype, device=weight.device), memory=memory)

    def another(self) -> "WanDecoder":
        """A decoder for another video, with the same weights."""
        return WanDecoder(self.net, memory=self.memory)

    def reset(self) -> None:
        """Forget the video so far: the next latents begin another one."""
        self._kept = Past()

    def state(self) -> dict[str, Tensor]:
        return dict(self._kept.held)

    def restore(self, state: dict[str, Tensor]) -> None:
        expected = {name: conv.in_channels for name, conv in self.net.causal().items()}
        widths = {name: tensor.shape[-1] for name, tensor in state.items() if tensor.dim() == 5}
        if state and (widths != expected or len(widths) != len(state)):
            raise ValueError(f"expected the state of a decoder of {len(expected)} convolutions, got {some_of(state)}")
        held = {name: tensor.to(self.device, self.dtype).contiguous() for name, tensor in state.items()}
        self._kept = Past(held)

    def pictures_at_once(self, count: int, *, batch: int, height: int, width: int) -> int:
        """How many pictures are computed together.

        Args:
            count: Latent frames of a call.
            batch: Videos.
            height: Of a latent frame.
            width: Of a latent frame.

        Raises:
            ValueError: ``memory`` was given, and does not suffice for one.
        """
        most = count * self.temporal
        peak = lambda pictures: self.peak_bytes(pictures, batch=batch, height=height, width=width)
        allowed = self._allowed() if self.memory is None else self.memory
        steps = [*range(most, 0, -self.temporal), *sorted({*self.net.sizes.stretch}, reverse=True)]
        found = next((pictures for pictures in steps if peak(pictures) <= allowed), None)
        if found is None and self.memory is not None:
            size = f"{height * self.spatial}x{width * self.spatial}"
            needed = f"{peak(1) / 1e9:.3g} GB for {batch} video{'s' * (batch > 1)} of {size}"
            raise ValueError(f"memory must be at least {needed}, one picture at a time, got {allowed / 1e9:.3g} GB")
        return found or 1

    def peak_bytes(self, pictures: int, *, batch: int, height: int, width: int) -> int:
        """The most bytes that tensors take, weights, past and pictures in the making.

        Latents, finished pictures and what libraries want as workspace come on top.

        Args:
            pictures: Computed together.
            batch: Videos.
            height: Of a latent frame.
            width: Of a latent frame.
        """
        tensors = chain(self.net.parameters(), self.net.buffers())
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        held, working = count_elements(self.net.sizes, pictures)
        elements = batch * height * width * (held + working)
        return weights + elements * self.dtype.itemsize

    def _write(self, pictures: Tensor, out: Tensor) -> None:
        if out.dtype == torch.uint8:
            to_bytes(pictures, out)
        else:
            super()._write(pictures, out)

    def _allowed(self) -> int:
        if self.device.type != "cuda":
            return ON_CPU
        return torch.cuda.get_device_properties(self.device).total_memory // 4

    def _past(self) -> tuple[int, int, int] | None:
        if not self._kept:
            return None
        first = self._kept.held["conv_in"]
        return first.shape[0], first.shape[2], first.shape[3]

    def _pictures(self, frames: Tensor, *, first: bool) -> Iterator[Tensor]:
        batch, count, _, height, width = frames.shape
        pictures = self.pictures_at_once(count, batch=batch, height=height, width=width)
        return self.net(frames, self._kept, frames_at_once(self.net.sizes, pictures))


def frames_at_once(sizes: Sizes, pictures: int) -> tuple[int, ...]:
    """How many frames of each level make at most so many pictures; one at least."""
    return tuple(max(1, pictures // stretch) for stretch in sizes.stretch)


def count_elements(sizes: Sizes, pictures: int) -> tuple[int, int]:
    """Elements for each place of a latent frame: those that the past takes, and the most that are being computed.

    A block holds its input, its output or the hidden features, the buffer of a convolution, which is two frames longer,
    and the two frames that replace those of the past. Wherever a level's input is cut into pieces, all of it waits
    beside them.
    """
    at_once = frames_at_once(sizes, pictures)
    last = len(sizes.widths) - 1
    held, working, waiting = BEFORE * sizes.latent, 0, 0
    arriving, inputs, area = at_once[0], sizes.widths[0], 1
    for level, width in enumerate(sizes.widths):
        count, doubles = min(at_once[level], arriving), level < last and sizes.doubles_time[level]
        convolutions = 2 * (sizes.blocks + 1) - 1 + (4 if level == 0 else 0) + (1 if level == last or doubles else 0)
        held += BEFORE * area * (inputs + convolutions * width)
        if count < arriving:
            waiting += arriving * area * inputs
        widest = max(inputs, width)
        block = (3 * count + 2 * BEFORE) * widest + (count * widest if inputs != width else 0)
        looks = 7 * count * width if level == 0 else 0  # query, key, value, and what goes in and out
        times = 2 if doubles else 1
        rises = 0
        if level < last:
            in_time = (3 * count * times + 2 * BEFORE) * width if doubles else 0
            rises = max(in_time, times * count * (width + 4 * (width // 2)) + (count * width if doubles else 0))
        working = max(working, waiting + area * max(block, looks, rises))
        arriving, inputs, area = times * count, width // 2, 4 * area
    return held, working
