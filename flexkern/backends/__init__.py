"""Attention backends by name. Each is a module with the same five functions; none is chosen in silence for another.

    rms_norm(x, weight, eps)            modulate(x, scale, shift, eps)            gate_residual(x, update, gate)
    norm_rope_write(query, key, value, query_weight, key_weight, place_turn, key_pages, value_pages, slots, eps)
    frame_attention(query, key_pages, value_pages, plan)

The first four are those of ``flexkern.kernels.reference``; the last takes a ``flexkern.plan.ChunkPlan``.
"""

from importlib import import_module
from types import ModuleType

BACKENDS = {
    "sdpa": "gather the pages, turn them, torch.nn.functional.scaled_dot_product_attention",
    "reference": "the oracle: loops over frames, for checking, not for speed",
}
ABSENT = {
    "triton": "its kernels are not part of this version yet",
    "flash-attn": "its binding is not part of this version yet",
    "xformers": "its binding is not part of this version yet",
}


def get_backend(name: str) -> ModuleType:
    """The backend of that name. Raises ValueError saying what is there, and why the asked one is not."""
    if name in BACKENDS:
        return import_module(f".{name}", __name__)
    why = ABSENT.get(name, "no backend has that name")
    there = "; ".join(f"{known} ({doc})" for known, doc in BACKENDS.items())
    raise ValueError(f"backend {name!r} is not there: {why}. There is {there}")
