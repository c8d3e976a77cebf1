"""Attention backends by name. Each is a module with the same five functions; none is chosen in silence for another.

    rms_norm(x, weight, eps)            modulate(x, scale, shift, eps)            gate_residual(x, update, gate)
    norm_rope_write(query, key, value, query_weight, key_weight, place_turn, key_pages, value_pages, slots, eps)
    frame_attention(query, key_pages, value_pages, plan)

The first four are those of ``flexkern.kernels.reference``; the last takes a ``flexkern.plan.ChunkPlan``.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = {
    "triton": "fused Triton kernels, one pass over the pages; needs a CUDA GPU",
    "sdpa": "gather the pages, turn them, torch.nn.functional.scaled_dot_product_attention",
    "reference": "the oracle: loops over frames, for checking, not for speed",
}
ABSENT = {
    "flash-attn": "its binding is not part of this version yet",
    "xformers": "its binding is not part of this version yet",
}


def why_not(name: str, device: torch.device | str | None = None) -> str | None:
    """Why a backend cannot run here, or on that device; None where it can."""
    if name not in BACKENDS:
        return ABSENT.get(name, "no backend has that name")
    if name != "triton":
        return None
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU (TRITON_INTERPRET=1 runs it on a CPU, slowly, for checking)"
    if device is not None and torch.device(device).type != "cuda":
        return f"it needs tensors on a CUDA GPU, got device '{device}'"
    return None


def get_backend(name: str, device: torch.device | str | None = None) -> ModuleType:
    """The backend of that name. Raises ValueError saying what is there, and why the asked one is not."""
    if why := why_not(name, device):
        there = "; ".join(f"{known} ({doc})" for known, doc in BACKENDS.items() if why_not(known, device) is None)
        raise ValueError(f"backend {name!r} is not there: {why}. There is {there}")
    return import_module(f".{name}", __name__)
