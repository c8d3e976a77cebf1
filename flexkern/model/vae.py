"""Wan 2.1's VAE, through diffusers: pictures into latents, latents into pictures, one chunk at a time.

    vae = load_vae("Wan2.1-T2V-1.3B")  # or its Wan2.1_VAE.pth, or a diffusers folder
    engine = Engine(model, encoder=vae.encode, decoder=vae.decoder)

A latent frame is decoded with what its causal convolutions have kept of the frames before, so every chunking gives the
pictures of the one-shot decode, in memory that does not grow with the video.

Source: Wan-Video/Wan2.1 wan/modules/vae.py; diffusers models/autoencoders/autoencoder_kl_wan.py and its conversion in
loaders/single_file_utils.py.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.model.decoder import ChunkDecoder, LatentForm
from flexkern.model.families import CHANNELS
from flexkern.model.files import find_files, some_of
from flexkern.model.load import declared, fill, fitting, need, read_part
from flexkern.model.tiny_decoder import load_tiny_decoder

__all__ = ["StreamingDecoder", "WanVAE", "load_tiny_decoder", "load_vae", "validate_vae"]

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
EMPTY, REPEATED, HELD = range(3)  # what a slot of the decoder's past holds: nothing, diffusers' "Rep", a tensor


class WanVAE:
    """An ``AutoencoderKLWan`` with the engine's interfaces: latents are normalised, [B, F, C, h, w].

    channels, spatial, temporal: those of ``LatentForm``.
    """

    def __init__(self, module: Any):
        config = module.config
        self.module = module
        self.channels, self.spatial, self.temporal = _latent_form(config)
        weight = module.post_quant_conv.weight
        self.dtype, self.device = weight.dtype, weight.device
        statistics = (config.latents_mean, config.latents_std)
        self.mean, self.std = (torch.tensor(each, device=self.device).view(-1, 1, 1, 1) for each in statistics)

    def decoder(self) -> "StreamingDecoder":
        """A decoder for one session."""
        return StreamingDecoder(self)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The clean latents of pictures: the means, of which nothing is sampled.

        The first picture becomes a latent frame, then every ``temporal`` pictures one.

        Args:
            pixels: uint8 [B, pictures, height, width, 3].

        Returns:
            float32 [B, F, C, h, w], normalised.

        Raises:
            ValueError: Another number of pictures, or sizes that ``spatial`` does not divide.
        """
        if pixels.dim() != 5 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8 or 0 in pixels.shape:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"pixels must be uint8 [B, pictures, height, width, 3], got {got}")
        batch, pictures, height, width, _ = pixels.shape
        if height % self.spatial or width % self.spatial:
            raise ValueError(f"height and width must be multiples of {self.spatial}, got {height}x{width}")
        if pictures % self.temporal != 1 % self.temporal:
            near = pictures - (pictures - 1) % self.temporal
            counts = f"{near} or {near + self.temporal}" if near > 0 else "1"
            raise ValueError(f"pictures must be {self.temporal}k+1, for instance {counts}, got {pictures}")
        frames = 1 + (pictures - 1) // self.temporal
        shape = batch, frames, self.channels, height // self.spatial, width // self.spatial
        latents = torch.empty(shape, device=self.device)
        past: list[Tensor | str | None] = [None] * _count_slots(self.module.encoder)
        for i in range(frames):
            group = pixels[:, max(0, 1 + self.temporal * (i - 1)) : 1 + self.temporal * i].to(self.device)
            x = (group.movedim(-1, 1).float() / 127.5 - 1).to(self.dtype)
            hidden = self.module.quant_conv(self.module.encoder(x, feat_cache=past, feat_idx=[0]))
            mean = hidden[:, : self.channels].float()  # the other half is the variance
            latents[:, i] = ((mean - self.mean) / self.std).squeeze(2)
        return latents


class StreamingDecoder(ChunkDecoder):
    """Decodes with the causal convolutions' past: the two last frames of each one's input, as diffusers keeps them."""

    def __init__(self, vae: WanVAE):
        super().__init__(
            channels=vae.channels, spatial=vae.spatial, temporal=vae.temporal, dtype=vae.dtype, device=vae.device
        )
        self.vae = vae
        self._slots: list[Tensor | str | None] = [None] * _count_slots(vae.module.decoder)

    def state(self) -> dict[str, Tensor]:
        kinds = [HELD if isinstance(slot, Tensor) else EMPTY if slot is None else REPEATED for slot in self._slots]
        held = {f"slot.{i}": slot for i, slot in enumerate(self._slots) if isinstance(slot, Tensor)}
        return {"kinds": torch.tensor(kinds, dtype=torch.uint8), **held}

    def restore(self, state: dict[str, Tensor]) -> None:
        kinds = state["kinds"].tolist() if "kinds" in state else []
        held = {f"slot.{i}" for i, kind in enumerate(kinds) if kind == HELD}
        if len(kinds) != len(self._slots) or held != state.keys() - {"kinds"}:
            raise ValueError(f"expected the state of a decoder with {len(self._slots)} slots, got {some_of(state)}")
        self._slots = [{EMPTY: None, REPEATED: "Rep"}.get(kind) for kind in kinds]
        for name in held:
            tensor = state[name].to(self.device, self.dtype).contiguous()
            self._slots[int(name.removeprefix("slot."))] = tensor

    def _past(self) -> tuple[int, int, int] | None:
        first = self._slots[0]  # the input of the first convolution, [B, C, 1 or 2, h, w]
        return (first.shape[0], first.shape[-2], first.shape[-1]) if isinstance(first, Tensor) else None

    def _step(self, frame: Tensor, first: bool) -> Tensor:
        module = self.vae.module
        z = module.post_quant_conv((frame.unsqueeze(2).float() * self.vae.std + self.vae.mean).to(self.dtype))
        pictures = module.decoder(z, feat_cache=self._slots, feat_idx=[0], first_chunk=first)
        # one memory format for all, so that a restored past takes the same path through the convolutions
        self._slots = [slot.contiguous() if isinstance(slot, Tensor) else slot for slot in self._slots]
        by_picture: Tensor = pictures.transpose(1, 2)
        return by_picture


def _count_slots(module: nn.Module) -> int:
    """At least as many as the causal convolutions of an encoder or decoder use; those of shortcuts keep nothing."""
    return sum(isinstance(layer, nn.Conv3d) for layer in module.modules())


def _latent_form(config: Any) -> LatentForm:
    """Of an ``AutoencoderKLWan`` of this configuration."""
    return LatentForm(config.z_dim, 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temperal_downsample))


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """The VAE of a checkpoint, ready to encode and decode.

    Bytes: 508 MB in float32.

    Args:
        path: Wan2.1_VAE.pth, another file with its keys or diffusers', or the folder of either.
        device: Where it runs.
        dtype: Of the weights and of what is computed.

    Raises:
        FileNotFoundError: No weights are there.
        ImportError: Names the extra that has diffusers.
        NotImplementedError: The VAE of Wan 2.2.
        ValueError: Lists the keys that do not fit.
    """
    make, state = _read(Path(path), headers=False)
    return WanVAE(fill(make, state, str(path), dtype=dtype, device=device))


def validate_vae(path: str | Path) -> LatentForm:
    """The latents that the VAE makes, told from names and shapes. Raises what ``load_vae`` would."""
    make, state = _read(Path(path), headers=True)
    module: Any = fitting(make, state, str(path))
    return _latent_form(module.config)


def _read(path: Path, *, headers: bool) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """What builds the module, and its tensors under the names of diffusers."""
    files = find_files(path, "vae", FOLDER_FILES)
    diffusers = need("diffusers", "the VAE")
    found = declared(files)
    found = found if found.get("_class_name") == "AutoencoderKLWan" else {}  # beside Wan's own file, the transformer's
    state = _diffusers_names(read_part(files, headers=headers), path)
    if found.get("is_residual") or found.get("patch_size") not in (None, 1):
        raise NotImplementedError(f"{path} is the VAE of Wan 2.2; supported: that of Wan 2.1")
    sizes = _sizes(state, path)
    statistics = {name: found[name] for name in ("latents_mean", "latents_std") if name in found}
    if len(statistics) < 2 and sizes["z_dim"] != CHANNELS:
        raise ValueError(f"{path} has {sizes['z_dim']} channels and no config.json with latents_mean and latents_std")
    return lambda: diffusers.AutoencoderKLWan(**sizes, **statistics), state


def _diffusers_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Wan's names replaced by those of diffusers; a name that fits no rule comes back as it is."""
    if any(re.search(r"upsamples\.\d+\.upsamples\.|down_blocks\.\d+\.resnets\.", key) for key in state):
        raise NotImplementedError(f"{path} is the VAE of Wan 2.2; supported: that of Wan 2.1")
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


def _sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
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
            f"{path} is no Wan VAE: cannot tell its sizes ({error!r}); it holds {some_of(state)}"
        ) from None
