"""Horizon extension and fused inference kernels for autoregressive video diffusion."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.finite import NotFiniteError
    from flexkern.functional import attention, frame_turns, paged_attention, turn_place
    from flexkern.model.vae import WanDecoder
    from flexkern.pipeline import Checkpoint
    from flexkern.session import Session

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Engine",
    "NotFiniteError",
    "Session",
    "WanDecoder",
    "attention",
    "frame_turns",
    "paged_attention",
    "turn_place",
]

_HOMES = {
    "Checkpoint": "flexkern.pipeline",
    "Engine": "flexkern.engine",
    "NotFiniteError": "flexkern.finite",
    "Session": "flexkern.session",
    "WanDecoder": "flexkern.model.vae",
    "attention": "flexkern.functional",
    "frame_turns": "flexkern.functional",
    "paged_attention": "flexkern.functional",
    "turn_place": "flexkern.functional",
}


def __getattr__(name: str) -> object:
    """``flexkern.Engine`` and others, loaded when first asked for: importing the package costs nothing."""
    if name.startswith("_"):  # what Python itself looks for
        raise AttributeError(f"module 'flexkern' has no attribute {name!r}")
    if name not in _HOMES:
        from flexkern.checks import did_you_mean

        raise AttributeError(f"module 'flexkern' has no attribute {name!r}{did_you_mean(name, __all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
