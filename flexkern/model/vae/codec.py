"""Wan 2.1's VAE: pictures into latents by diffusers' encoder, latents into pictures by our decoder, or by diffusers'.

    vae = load_vae("Wan2.1-T2V-1.3B")  # or its Wan2.1_VAE.pth, or a diffusers folder
    engine = Engine(model, encoder=vae.encode, decoder=vae.decoder)

A latent frame is decoded with what its causal convolutions have kept of the frames before, so every chunking gives the
pictures of the one-shot decode, in memory that does not grow with the video.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexkern.model.decoder import ChunkDecoder, LatentForm
from flexkern.model.files import some_of
from flexkern.model.load import fitting
from flexkern.model.vae.decoder import WanDecoder
from flexkern.model.vae.net import DecoderNet
from flexkern.model.vae.weights import held_by, load_autoencoder, load_net, make_autoencoder, read_vae, validate_net

VaeBackend = Literal["auto", "flexkern", "diffusers"]
EMPTY, REPEATED, HELD = range(3)  # what a slot of diffusers' past holds: nothing, its "Rep", a tensor


class WanVAE:
    """The VAE with the engine's interfaces: latents are normalised, [B, F, C, h, w].

    channels, spatial, temporal: those of ``LatentForm``. backend: the decoder in use, "flexkern" or "diffusers".

    Args:
        module: diffusers' ``AutoencoderKLWan``, which encodes.
        backend: Of the decoder. "auto" takes ours, or diffusers' where the module has layers that ours does not.
        net: Our decoder, where it is loaded already; then the module needs none.

    Raises:
        ValueError: Our decoder does not have the module's layers.
    """

    def __init__(self, module: Any, *, backend: VaeBackend = "auto", net: DecoderNet | None = None):
        config = module.config
        self.module, self.net = module, net
        if net is None and backend != "diffusers":
            self.net = _own_net(module, required=backend == "flexkern")
        self.backend = "diffusers" if self.net is None else "flexkern"
        strides = 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temperal_downsample)
        self.channels, self.spatial, self.temporal = config.z_dim, *strides
        weight = module.quant_conv.weight
        self.dtype, self.device = weight.dtype, weight.device
        statistics = (config.latents_mean, config.latents_std)
        self.mean, self.std = (torch.tensor(each, device=self.device).view(-1, 1, 1, 1) for each in statistics)

    def decoder(self) -> ChunkDecoder:
        """A decoder for one session."""
        return DiffusersDecoder(self) if self.net is None else WanDecoder(self.net)

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


class DiffusersDecoder(ChunkDecoder):
    """diffusers' decoder, with what it keeps for its causal convolutions: the two last frames of each one's input."""

    def __init__(self, vae: WanVAE):
        super().__init__(
            channels=vae.channels, spatial=vae.spatial, temporal=vae.temporal, dtype=vae.dtype, device=vae.device
        )
        self.vae = vae
        self._slots: list[Tensor | str | None] = [None] * _count_slots(vae.module.decoder)

    def state(self) -> dict[str, Tensor]:
        kinds = [HELD if isinstance(slot, Tensor) else EMPTY if slot is None else REPEATED for slot in self._slots]
        held = {f"slot.{i}": slot for i, slot in enumerate(self._slots) if isinstance(slot, Tensor)}
        return {"kinds": torch.tensor(kinds, dtype=torch.uint8, device="cpu"), **held}

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

    def _pictures(self, frames: Tensor, *, first: bool) -> Iterator[Tensor]:
        for i, frame in enumerate(frames.split(1, dim=1)):
            yield self._decode(frame.transpose(1, 2), first=first and i == 0)

    def _decode(self, frame: Tensor, *, first: bool) -> Tensor:
        """One latent frame [B, C, 1, h, w] -> its pictures."""
        module = self.vae.module
        z = module.post_quant_conv((frame.float() * self.vae.std + self.vae.mean).to(self.dtype))
        pictures: Tensor = module.decoder(z, feat_cache=self._slots, feat_idx=[0], first_chunk=first)
        # one memory format for all, so that a restored past takes the same path through the convolutions
        self._slots = [slot.contiguous() if isinstance(slot, Tensor) else slot for slot in self._slots]
        return pictures.movedim(1, -1)


def _count_slots(module: nn.Module) -> int:
    """At least as many as the causal convolutions of an encoder or decoder use; those of shortcuts keep nothing."""
    return sum(isinstance(layer, nn.Conv3d) for layer in module.modules())


def _own_net(module: Any, *, required: bool) -> DecoderNet | None:
    """Our decoder with the module's weights; None where it does not fit and need not."""
    weight = module.post_quant_conv.weight
    try:
        return load_net(held_by(module), dtype=weight.dtype, device=weight.device)
    except (ValueError, NotImplementedError) as error:
        if required:
            raise ValueError(f"backend 'flexkern' does not decode with this VAE, 'diffusers' does: {error}") from error
        return None


def load_vae(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: VaeBackend = "auto",
) -> WanVAE:
    """The VAE of a checkpoint, ready to encode and decode.

    Bytes: 508 MB in float32.

    Args:
        path: Wan2.1_VAE.pth, another file with its keys or diffusers', or the folder of either.
        device: Where it runs.
        dtype: Of the weights and of what is computed.
        backend: Of the decoder: "flexkern" is our own, and "auto" takes it.

    Raises:
        FileNotFoundError: No weights are there.
        ImportError: Names the extra that has diffusers.
        NotImplementedError: The VAE of Wan 2.2.
        ValueError: Lists the keys that do not fit.
    """
    held = read_vae(path)
    module = load_autoencoder(held, dtype=dtype, device=device)
    if backend == "diffusers":
        return WanVAE(module, backend=backend)
    module.decoder = module.post_quant_conv = None
    return WanVAE(module, net=load_net(held, dtype=dtype, device=device))


def validate_vae(path: str | Path) -> LatentForm:
    """The latents that the VAE makes, told from names and shapes. Raises what ``load_vae`` would."""
    held = read_vae(path, headers=True)
    fitting(make_autoencoder(held), held.state, held.where)
    validate_net(held)
    return held.form
