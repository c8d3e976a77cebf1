"""Kernels of the VAE's decoder. Features are [B, T, H, W, C], channels last; T counts frames at their level's rate."""

from .. import require_triton

require_triton()
