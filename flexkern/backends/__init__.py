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
    "flash-attn": "gather the pages, turn them, FlashAttention-2; needs a CUDA GPU, float16 or bfloat16",
    "xformers": "gather the pages, turn them, xformers.ops.memory_efficient_attention; needs a CUDA GPU",
    "reference": "the oracle: loops over frames, for checking, not for speed",
}
ON_CUDA = {"triton": "triton", "flash-attn": "flash_attn", "xformers": "xformers"}  # and the package each one needs


def why_not(name: str, device: torch.device | str | None = None) -> str | None:
    """Why a backend cannot run here, or on that device; None where it can."""
    if name not in BACKENDS:
        return "no backend has that name"
    if name not in ON_CUDA:
        return None
    if find_spec(ON_CUDA[name]) is None:
        return f"the package {name} is not installed"
    if name == "triton" and runs_in_interpreter():
        return None
    if not torch.cuda.is_available():
        otherwise = " (TRITON_INTERPRET=1 runs it on a CPU, slowly, for checking)" if name == "triton" else ""
        return f"it needs a CUDA GPU{otherwise}"
    if device is not None and torch.device(device).type != "cuda":
        return f"it needs tensors on a CUDA GPU, got device '{device}'"
    return None


def runs_in_interpreter() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def get_backend(name: str, device: torch.device | str | None = None) -> ModuleType:
    """The backend of that name. Raises ValueError saying what is there, and why the asked one is not."""
    if why := why_not(name, device):
        there = "; ".join(f"{known} ({doc})" for known, doc in BACKENDS.items() if why_not(known, device) is None)
        raise ValueError(f"backend {name!r} is not there: {why}. There is {there}")
    return import_module(f".{name.replace('-', '_')}", __name__)
