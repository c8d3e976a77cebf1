"""Horizon extension and fused inference kernels for autoregressive video diffusion."""

__version__ = "0.1.0"
