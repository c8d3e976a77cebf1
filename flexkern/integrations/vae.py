"""Our decoder inside diffusers' VAE, or inside the VAE wrapper of Self-Forcing and what descends from it.

    from flexkern.integrations import vae
    vae.patch(pipe.vae)          # of a WanPipeline; or pipeline.vae, of a CausalInferencePipeline
    vae.unpatch(pipe.vae)

The weights are those of the VAE; its encoder stays. Source: diffusers 0.42.1, AutoencoderKLWan.decode; Self-Forcing,
utils/wan_wrapper.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.integrations.replaced import Replaced, arguments, undo_patch
from flexkern.model.vae import WanDecoder

HANDLE = "flexkern_decoder"  # the VAE's attribute that holds its patch


def patch(vae: nn.Module, *, memory: int | None = None) -> "Patch":
    """Decode with ours until ``unpatch``, or the handle's ``undo``.

    Args:
        vae: diffusers' ``AutoencoderKLWan``, or a ``WanVAEWrapper``; already in its dtype and on its device. Tiling and
            slicing of diffusers have no effect meanwhile.
        memory: The most bytes that decoding may take; see ``WanDecoder``.

    Returns:
        A handle, which may be used as a context manager.

    Raises:
        NotImplementedError: The VAE of Wan 2.2.
        ValueError: It is another module, or patched already. Nothing has changed.
    """
    return Patch(vae, memory)


def unpatch(vae: nn.Module) -> None:
    """Give the VAE its own decoder back.

    Raises:
        ValueError: It was not patched.
    """
    undo_patch(vae, HANDLE, "vae")


class Patch(Replaced):
    """What was replaced in a VAE, and how to undo it. Leaving it as a context manager undoes it."""

    def __init__(self, vae: Any, memory: int | None):
        if getattr(vae, HANDLE, None) is not None:
            raise ValueError("the VAE is patched already: call unpatch first")
        kind = type(vae)
        super().__init__()
        # decode itself: up to diffusers 0.36 a hook around it hides its arguments
        if hasattr(vae, "config") and hasattr(kind, "_decode") and arguments(kind._decode)[:2] == ("z", "return_dict"):
            self.decoder = WanDecoder.from_module(vae, normalised=False, memory=memory)
            self.replace(vae, "decode", self._decode)
        elif hasattr(kind, "decode_to_pixel") and arguments(kind.decode_to_pixel) == ("latent", "use_cache"):
            self.decoder = WanDecoder.from_module(vae.model, memory=memory)
            self.replace(vae, "decode_to_pixel", self._decode_to_pixel)
            self.replace(vae.model, "clear_cache", self._clearing(vae.model.clear_cache))
        else:
            expected = "an AutoencoderKLWan, or a WanVAEWrapper with decode_to_pixel(latent, use_cache)"
            hint = "; pass its .vae" if hasattr(vae, "vae") else ""
            raise ValueError(f"vae must be {expected}, got {kind.__name__}{hint}")
        self.replace(vae, HANDLE, self)
        self._vae, self._parameters = vae, list(vae.parameters())  # held, so that no other ever has the id of one
        self._weights = self._stamp()

    def __repr__(self) -> str:
        state = "in place" if vars(self._vae).get(HANDLE) is self else "undone"
        return f"Patch({type(self._vae).__name__}, {state}: {self.decoder})"

    def _stamp(self) -> list[tuple[int, torch.dtype, int]]:
        """What changes with the VAE's weights: which they are, their dtype, how often they were written."""
        return [(id(p), p.dtype, 0 if p.is_inference() else p._version) for p in self._vae.parameters()]

    def _fitting(self, latents: Tensor) -> Tensor:
        """The latents. Raises ValueError where the VAE was moved, cast or loaded after it was patched."""
        if self._stamp() != self._weights:
            raise ValueError(
                "the VAE's weights or their dtype changed after it was patched: unpatch and patch it again"
            )
        if latents.device != self.decoder.device:
            raise ValueError(
                f"the decoder is on {self.decoder.device}, latents on {latents.device}: patch the VAE last"
            )
        return latents

    @torch.no_grad()
    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Instead of diffusers': z [B, C, F, h, w], not normalised, a whole video."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = self.decoder.decode_video(self._fitting(z).transpose(1, 2)).transpose(1, 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @torch.no_grad()
    def _decode_to_pixel(self, latent: Tensor, use_cache: bool = False) -> Tensor:
        """Instead of the wrapper's: latent [B, F, C, h, w]; with use_cache it goes on with the video so far."""
        latents = self._fitting(latent)
        pictures = self.decoder.decode(latents) if use_cache else self.decoder.another().decode_video(latents)
        return pictures.float()

    def _clearing(self, original: Callable[[], None]) -> Callable[[], None]:
        def clear_cache() -> None:
            self.decoder.reset()
            original()

        return clear_cache
