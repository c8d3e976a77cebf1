"""Attention backends by name. Each is a module that satisfies ``Backend``; one that is named is never replaced.

``flexkern.backends.choice`` names one where the user does not.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flexkern.backends import generations
from flexkern.checks import did_you_mean
from flexkern.kernels import lacking
from flexkern.plan import ChunkPlan

if TYPE_CHECKING:
    from flexkern.backends import flash_attn, reference, sdpa, triton, xformers


class Pointwise(Protocol):
    """The operations of a block outside of self-attention; ``flexkern.kernels.reference`` defines each."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, /) -> Tensor:
        """x over its root mean square, times weight: x [..., C], weight [C]."""

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float, /) -> Tensor:
        """LayerNorm(x) * (1 + scale) + shift: x [B, F, S, C], scale and shift [B, F, C]."""

    def add_modulate(
        self, x: Tensor, update: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float,
        offset: float = 1.0, /,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """sum = x + update * gate, and LayerNorm(sum) * (offset + scale) + shift; shapes as ``modulate``'s."""


class Backend(Pointwise, Protocol):
    """Everything a backend computes; a module with these five functions is one."""

    def norm_rope_write(
        self, query: Tensor | None, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor,
        place_turn: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, eps: float, /,
    ) -> Tensor | None:  # fmt: skip
        """Write keys and values to their pages; return the query ready for attention. Shapes: as the oracle's."""

    def frame_attention(self, query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan, /) -> Tensor:
        """Softmax attention of query [B, F, S, H, D] over the pages [B, P, S, H, D] that the plan lists."""


BACKENDS = {
    "triton": "fused Triton kernels, one pass over the pages; needs a CUDA GPU",
    "sdpa": "gather the pages, turn them, torch.nn.functional.scaled_dot_product_attention",
    "flash-attn": "gather the pages, turn them, FlashAttention 4, 3 or 2; needs a CUDA GPU, float16 or bfloat16",
    "xformers": "gather the pages, turn them, xformers.ops.memory_efficient_attention; needs a CUDA GPU",
    "reference": "the oracle: loops over frames, for checking, not for speed",
}
ON_CUDA = ("triton", "flash-attn", "xformers")


def why_not(
    name: str,
    device: torch.device | str | None = None,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why a backend cannot run here, on that device, or with heads of that size and dtype; None where it can.

    Args:
        name: A key of ``BACKENDS``.
        device: Where its tensors will be, if known.
        head_dim: Channels of a head, if known.
        dtype: Of queries, keys and values, if known.
    """
    if name not in BACKENDS:
        return "no backend has that name"
    if name not in ON_CUDA:
        return None
    if not (generations.installed() if name == "flash-attn" else find_spec(name)):
        return f"the package {name} is not installed"
    if name == "triton" and (lacking := unfit_triton()):
        return lacking
    interpreted = name == "triton" and runs_in_interpreter()
    if name == "triton" and (unfit := unfit_for_kernels(head_dim, dtype, interpreted=interpreted)):
        return unfit
    if interpreted:
        return None
    if not torch.cuda.is_available():
        otherwise = " (TRITON_INTERPRET=1 runs it on a CPU, slowly, for checking)" if name == "triton" else ""
        return f"it needs a CUDA GPU{otherwise}"
    if device is not None and torch.device(device).type != "cuda":
        return f"it needs tensors on a CUDA GPU, got device '{device}'"
    if name == "flash-attn":
        return unfit_flash_attn(device)
    return unfit_gpu(torch.device(device or "cuda")) if name == "triton" else None


def unfit_for_kernels(head_dim: int | None, dtype: torch.dtype | None, *, interpreted: bool) -> str | None:
    """Why the kernels take no heads of that size, or that dtype; None where they do. ``unfit_triton`` comes first."""
    if head_dim is None and dtype is None:
        return None
    from flexkern.kernels.attention.tiles import unfit

    return unfit(head_dim or 64, dtype or torch.float32, interpreted=interpreted)


def unfit_gpu(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU; None where they can. ``unfit_triton`` comes first."""
    from flexkern.kernels.gpus import arch_of

    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, and this torch is built for HIP"
    try:
        arch_of(device)
    except NotImplementedError as error:
        return str(error)
    return None


def unfit_flash_attn(device: torch.device | str | None) -> str | None:
    """Why no installed FlashAttention runs on that CUDA device, the current one if None; None where one does."""
    try:
        generations.choose_for(device)
    except ImportError as error:
        return str(error)
    return None


def describe(name: str) -> str:
    """What a backend that can run here does, and by which library and version."""
    library = getattr(get_backend(name), "describe", None)
    return f"{BACKENDS[name]}: {library()}" if library else BACKENDS[name]


def unfit_triton() -> str | None:
    """Why the installed Triton cannot run the kernels; None where it can."""
    try:
        what = lacking()
    except Exception as error:  # whatever a broken installation raises, other backends still run
        return f"Triton cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    return what and f"it needs {what}"


def runs_in_interpreter() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1); ``unfit_triton`` comes first."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def get_backend(
    name: str,
    device: torch.device | str | None = None,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """The backend of that name.

    Args:
        name: A key of ``BACKENDS``.
        device: Where its tensors will be, if known.
        head_dim: Channels of a head, if known.
        dtype: Of queries, keys and values, if known.

    Raises:
        ValueError: The backend cannot run here; the message says why, and which ones can.
    """
    if why := why_not(name, device, head_dim=head_dim, dtype=dtype):
        there = "; ".join(f"{known} ({doc})" for known, doc in BACKENDS.items() if why_not(known, device) is None)
        meant = "" if name in BACKENDS else did_you_mean(name, ("auto", *BACKENDS))
        raise ValueError(f"backend {name!r} is not there: {why}. There is {there}{meant}")
    return cast(Backend, import_module(f".{name.replace('-', '_')}", __name__))


if TYPE_CHECKING:  # holds every module to the protocol
    _triton: Backend = triton
    _sdpa: Backend = sdpa
    _flash_attn: Backend = flash_attn
    _xformers: Backend = xformers
    _reference: Backend = reference
