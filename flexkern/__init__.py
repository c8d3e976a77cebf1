"""Horizon extension and fused inference kernels for autoregressive video diffusion."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """``flexkern.Engine``, loaded when it is first asked for: importing the package costs nothing."""
    if name == "Engine":
        from flexkern.engine import Engine

        return Engine
    raise AttributeError(f"module 'flexkern' has no attribute {name!r}")
