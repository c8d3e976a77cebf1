"""Wan 2.1's VAE. ``net`` is the mathematics of the decoder, ``decoder`` runs it, ``codec`` adds diffusers' encoder."""

from flexkern.model.vae.codec import DiffusersDecoder, VaeBackend, WanVAE, load_vae, validate_vae
from flexkern.model.vae.decoder import WanDecoder

__all__ = ["DiffusersDecoder", "VaeBackend", "WanDecoder", "WanVAE", "load_vae", "validate_vae"]
