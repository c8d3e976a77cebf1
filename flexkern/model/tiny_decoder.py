"""The tiny decoder TAEHV for Wan 2.1 (taew2_1): previews of a video for a fraction of the VAE's work.

Each block of it sees its own input and that of the frame before, so the past it keeps is one frame per block. It reads
normalised latents as they are; its pictures resemble those of the VAE, they do not equal them.

Source: madebyollin/taehv taehv.py (architecture, names, the last rows of a time kernel that is too large).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flexkern.model.decoder import ChunkDecoder, LatentForm
from flexkern.model.files import find_files, some_of
from flexkern.model.load import fill, fitting, read_part

FOLDER_FILES = ("taew2_1.safetensors", "taew2_1.pth")
STRIDES = (1, 2, 2)  # by which the three levels stretch time; each doubles height and width
GROW = (7, 13, 19)  # indices in the sequence of what stretches time
SPATIAL, TEMPORAL = 8, 4
WIDTHS = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
LAST = "decoder.22.weight"


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Memory(nn.Module):
    """A residual block over a frame and the one before it."""

    def __init__(self, width: int):
        super().__init__()
        first, second, third = (nn.Conv2d(inputs * width, width, 3, padding=1) for inputs in (2, 1, 1))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        changed: Tensor = self.conv(torch.cat((x, before), dim=1))
        return torch.relu(changed + x)


class _Grow(nn.Module):
    """Makes ``stride`` frames of each."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stretched: Tensor = self.conv(x)
        return stretched.reshape(-1, *x.shape[1:])


class _Net(nn.Module):
    def __init__(self, channels: int, widths: list[int]):
        super().__init__()
        layers: list[nn.Module] = [_Clamp(), nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, following, stride in zip(widths, widths[1:], STRIDES, strict=False):
            layers += [_Memory(width), _Memory(width), _Memory(width), nn.Upsample(scale_factor=2)]
            layers += [_Grow(width, stride), nn.Conv2d(width, following, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))


class TinyDecoder(ChunkDecoder):
    """Decodes with the last input of each block; the pictures that a start from nothing spoils are left out."""

    def __init__(self, net: _Net):
        first = net.get_parameter("decoder.1.weight")
        form = LatentForm(first.shape[1], SPATIAL, TEMPORAL)
        super().__init__(**form._asdict(), dtype=first.dtype, device=first.device)
        self._net = net
        self._held: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        return dict(self._held)

    def restore(self, state: dict[str, Tensor]) -> None:
        expected = {str(i) for i, layer in enumerate(self._net.decoder) if isinstance(layer, _Memory)}
        if state.keys() not in (set(), expected):
            raise ValueError(f"expected the state of a tiny decoder of {len(expected)} blocks, got {some_of(state)}")
        self._held = {name: tensor.to(self.device, self.dtype) for name, tensor in state.items()}

    def _past(self) -> tuple[int, int, int] | None:
        first = self._held.get("3")  # the input of the first block, as high and wide as the latent
        return None if first is None else (first.shape[0], *first.shape[-2:])

    def _pictures(self, frames: Tensor, *, first: bool) -> Iterator[Tensor]:
        for i, frame in enumerate(frames.unbind(1)):
            yield self._decode(frame.to(self.dtype), first=first and i == 0)

    def _decode(self, x: Tensor, *, first: bool) -> Tensor:
        """One latent frame [B, C, h, w] -> its pictures."""
        batch = x.shape[0]
        for i, layer in enumerate(self._net.decoder):
            if isinstance(layer, _Memory):
                frames = x.unflatten(0, (batch, -1))
                before = torch.zeros_like(frames[:, 0]) if first else self._held[str(i)]
                self._held[str(i)] = frames[:, -1].clone()
                x = layer(x, torch.cat((before.unsqueeze(1), frames[:, :-1]), dim=1).flatten(0, 1))
            else:
                x = layer(x)
        pictures: Tensor = x.unflatten(0, (batch, -1)).movedim(2, -1) * 2 - 1
        return pictures[:, self.temporal - 1 :] if first else pictures


def load_tiny_decoder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], TinyDecoder]:
    """A factory of decoders, for ``Engine(decoder=...)``.

    Args:
        path: taew2_1.pth, taew2_1.safetensors or their folder.
        device: Where to decode.
        dtype: Of the weights and of what is computed.

    Raises:
        FileNotFoundError: No weights are there.
        NotImplementedError: A tiny decoder of another model.
        ValueError: Lists the keys that do not fit.
    """
    make, state = _read(Path(path), headers=False)
    return partial(TinyDecoder, fill(make, state, str(path), dtype=dtype, device=device))


def validate_tiny_decoder(path: str | Path) -> LatentForm:
    """The latents that the decoder takes, told from names and shapes. Raises what ``load_tiny_decoder`` would."""
    make, state = _read(Path(path), headers=True)
    net = fitting(make, state, str(path))
    return LatentForm(net.get_parameter("decoder.1.weight").shape[1], SPATIAL, TEMPORAL)


def _read(path: Path, *, headers: bool) -> tuple[Callable[[], _Net], dict[str, Tensor]]:
    """What builds the network, and its tensors."""
    state = read_part(find_files(path, "", FOLDER_FILES), headers=headers)
    state = {key: tensor for key, tensor in state.items() if not key.startswith("encoder.")}
    channels, widths = _sizes(state, path)
    for index, width, stride in zip(GROW, widths, STRIDES, strict=False):
        if (weight := state.get(f"decoder.{index}.conv.weight")) is not None:
            state[f"decoder.{index}.conv.weight"] = weight[-width * stride :]
    return partial(_Net, channels, widths), state


def _sizes(state: Mapping[str, Tensor], path: Path) -> tuple[int, list[int]]:
    """Channels of a latent, and the widths of the levels."""
    shapes = {key: tuple(state[key].shape) for key in (*WIDTHS, LAST) if key in state}
    if len(shapes) < 5 or any(len(shape) != 4 for shape in shapes.values()):
        names = sorted({re.sub(r"\.\D.*", "", key) for key in state})
        raise ValueError(
            f"{path} is no TAEHV decoder: it lacks some of {', '.join((*WIDTHS, LAST))}; it has {some_of(names)}"
        )
    if shapes[LAST][0] != 3:
        raise NotImplementedError(f"{path} makes {shapes[LAST][0]} channels; supported: 3, as for Wan 2.1")
    return shapes[WIDTHS[0]][1], [shapes[key][0] for key in WIDTHS]
