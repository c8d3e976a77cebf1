"""The VAE's weight files: read under diffusers' names from either layout, and put into either decoder.

Source: Wan-Video/Wan2.1 wan/modules/vae.py; diffusers loaders/single_file_utils.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.checks import is_float32, require
from flexkern.model.decoder import LatentForm
from flexkern.model.families import CHANNELS
from flexkern.model.files import find_files, some_of
from flexkern.model.load import declared, fill, fitting, need, read_part
from flexkern.model.vae.net import Convolutions, DecoderNet, Sizes

FOLDER_FILES = ("Wan2.1_VAE.pth", "diffusion_pytorch_model*.safetensors")
QUANT_NAMES = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
WAN_NAMES = {  # front of a name within the encoder or the decoder
    "conv1.": "conv_in.",
    "downsamples.": "down_blocks.",
    "middle.0.": "mid_block.resnets.0.",
    "middle.1.": "mid_block.attentions.0.",
    "middle.2.": "mid_block.resnets.1.",
    "head.0.": "norm_out.",
    "head.2.": "conv_out.",
}
RESIDUAL_NAMES = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
RESIDUAL_NAMES["shortcut"] = "conv_shortcut"
# of the latents of Wan 2.1's VAE, before they are normalised: mean and standard deviation of each channel
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What weight files or a module hold of a VAE."""

    where: str
    """for messages"""
    state: Mapping[str, Tensor]
    """every tensor, under diffusers' name"""
    sizes: Mapping[str, Any]
    """as arguments of AutoencoderKLWan"""
    mean: Sequence[float]
    """of each channel of latents, before they are normalised"""
    std: Sequence[float]

    def __post_init__(self) -> None:
        channels = self.sizes["z_dim"]
        for name, values in (("latents_mean", self.mean), ("latents_std", self.std)):
            fine = isinstance(values, Sequence) and len(values) == channels and all(map(is_float32, values))
            told = f"{self.where}: {name} must be {channels} finite numbers, one for each channel"
            require(
                fine and (name == "latents_mean" or min(values) > 0),
                f"{told}{', more than 0' * (name != 'latents_mean')}",
            )

    @property
    def form(self) -> LatentForm:
        """Of its latents."""
        sizes = self.sizes
        return LatentForm(sizes["z_dim"], 2 ** (len(sizes["dim_mult"]) - 1), 2 ** sum(sizes["temperal_downsample"]))

    def decoder_sizes(self) -> Sizes:
        """Of the decoder."""
        sizes = self.sizes
        widths = tuple(sizes["decoder_base_dim"] * times for times in reversed(sizes["dim_mult"]))
        doubles = tuple(reversed(sizes["temperal_downsample"]))
        return Sizes(sizes["z_dim"], widths, sizes["num_res_blocks"], doubles, sizes["out_channels"])


def read_vae(path: str | Path, *, headers: bool = False) -> Held:
    """What the files at ``path`` hold.

    Args:
        path: Wan2.1_VAE.pth, another file with its keys or diffusers', or the folder of either.
        headers: Read tensors of safetensors without their data.

    Raises:
        FileNotFoundError: No weights are there.
        NotImplementedError: The VAE of Wan 2.2.
        ValueError: It is no VAE of Wan.
    """
    path = Path(path)
    files = find_files(path, "vae", FOLDER_FILES)
    found = declared(files)
    found = found if found.get("_class_name") == "AutoencoderKLWan" else {}  # beside Wan's own file, the transformer's
    state = diffusers_names(read_part(files, headers=headers), path)
    if found.get("is_residual") or found.get("patch_size") not in (None, 1):
        raise NotImplementedError(f"{path} is the VAE of Wan 2.2; supported: that of Wan 2.1")
    sizes = vae_sizes(state, path)
    told = "latents_mean" in found and "latents_std" in found
    if not told and sizes["z_dim"] != CHANNELS:
        raise ValueError(f"{path} has {sizes['z_dim']} channels and no config.json with latents_mean and latents_std")
    mean, std = (found["latents_mean"], found["latents_std"]) if told else (MEAN, STD)
    return Held(where=str(path), state=state, sizes=sizes, mean=mean, std=std)


def held_by(module: nn.Module) -> Held:
    """What diffusers' AutoencoderKLWan holds, or Wan's own VAE, whose latents are those of Wan 2.1.

    Raises:
        NotImplementedError: The VAE of Wan 2.2.
        ValueError: It is neither.
    """
    config, where = getattr(module, "config", None), type(module).__name__
    state = diffusers_names(module.state_dict(), where)
    mean, std = (getattr(config, name, known) for name, known in (("latents_mean", MEAN), ("latents_std", STD)))
    return Held(where=where, state=state, sizes=vae_sizes(state, where), mean=mean, std=std)


def make_autoencoder(held: Held) -> Callable[[], Any]:
    """What builds diffusers' module. Raises ImportError where diffusers is not installed."""
    diffusers = need("diffusers", "the VAE's encoder")
    return lambda: diffusers.AutoencoderKLWan(**held.sizes, latents_mean=held.mean, latents_std=held.std)


def load_autoencoder(held: Held, *, dtype: torch.dtype, device: str | torch.device) -> Any:
    """diffusers' module with the weights. Raises ValueError that lists the keys that do not fit."""
    return fill(make_autoencoder(held), dict(held.state), held.where, dtype=dtype, device=device)


def load_net(
    held: Held, *, dtype: torch.dtype, device: str | torch.device, convolutions: Convolutions = "library"
) -> DecoderNet:
    """Our decoder with the weights, ready to compute.

    Raises:
        ValueError: Lists the keys that do not fit; or the convolutions cannot be computed so.
    """
    wide = torch.promote_types(dtype, torch.float32)
    net = fill(lambda: DecoderNet(held.decoder_sizes()), _decoding(held), held.where, dtype=wide, device=device)
    mean, std = (torch.tensor(each, dtype=torch.float64, device=device) for each in (held.mean, held.std))
    return net.prepare(mean, std, dtype).convolve_with(convolutions)


def validate_net(held: Held) -> None:
    """Raises ValueError where our decoder does not fit the tensors' names and shapes."""
    fitting(lambda: DecoderNet(held.decoder_sizes()), _decoding(held), held.where)


def _decoding(held: Held) -> dict[str, Tensor]:
    """The tensors of the decoder."""
    return {key: tensor for key, tensor in held.state.items() if key.startswith(("decoder.", "post_quant_conv."))}


def diffusers_names(state: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """Wan's names replaced by those of diffusers; a name that fits no rule comes back as it is."""
    if any(re.search(r"upsamples\.\d+\.upsamples\.|down_blocks\.\d+\.resnets\.", key) for key in state):
        raise NotImplementedError(f"{where} is the VAE of Wan 2.2; supported: that of Wan 2.1")
    if not any(".downsamples." in key or ".upsamples." in key for key in state):
        return dict(state)
    resampled = [int(match[1]) for key in state if (match := re.match(r"decoder\.upsamples\.(\d+)\.resample", key))]
    return {_diffusers_name(key, min(resampled, default=len(state))): tensor for key, tensor in state.items()}


def _diffusers_name(key: str, run: int) -> str:
    """run: how many residual blocks follow on each other in the decoder before it upsamples."""
    half, dot, rest = key.partition(".")
    if half in QUANT_NAMES:
        return f"{QUANT_NAMES[half]}.{rest}"
    for theirs, ours in WAN_NAMES.items():
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    if match := re.match(r"upsamples\.(\d+)\.", rest):
        level, index = divmod(int(match[1]), run + 1)
        within = "upsamplers.0" if index == run else f"resnets.{index}"
        rest = f"up_blocks.{level}.{within}.{rest[match.end() :]}"
    for theirs, ours in RESIDUAL_NAMES.items():
        rest = rest.replace(f".{theirs}.", f".{ours}.")
    return half + dot + rest


def vae_sizes(state: Mapping[str, Tensor], where: str | Path) -> dict[str, Any]:
    """The sizes that the shapes show, as arguments of ``AutoencoderKLWan``."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        base, colours = shapes["encoder.conv_in.weight"][:2]
        levels: list[list[int]] = [[]]
        temporal: list[bool] = []
        for i in range(1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down_blocks."))):
            block = f"encoder.down_blocks.{i}"
            if f"{block}.resample.1.weight" in shapes:
                levels.append([])
                temporal.append(f"{block}.time_conv.weight" in shapes)
            else:
                levels[-1].append(shapes[f"{block}.conv1.weight"][0] // base)
        multiples = [level[-1] for level in levels]
        return {
            "base_dim": base, "decoder_base_dim": shapes["decoder.norm_out.gamma"][0] // multiples[0],
            "z_dim": shapes["post_quant_conv.weight"][0], "dim_mult": multiples, "num_res_blocks": len(levels[0]),
            "temperal_downsample": temporal, "in_channels": colours,
            "out_channels": shapes["decoder.conv_out.weight"][0],
        }  # fmt: skip
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{where} is no Wan VAE: cannot tell its sizes ({error!r}); it holds {some_of(state)}"
        ) from None
