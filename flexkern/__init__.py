"""Horizon extension and fused inference kernels for autoregressive video diffusion."""

from importlib import import_module

__version__ = "0.1.0"

HOMES = {"Engine": "engine", "attention": "functional", "paged_attention": "functional"}


def __getattr__(name: str) -> object:
    """``flexkern.Engine`` and others, loaded when first asked for: importing the package costs nothing."""
    if name not in HOMES:
        raise AttributeError(f"module 'flexkern' has no attribute {name!r}")
    return getattr(import_module(f"flexkern.{HOMES[name]}"), name)
