"""Library attention to be measured against: softmax(q k / sqrt(D)) v, no mask, keys gathered and turned beforehand.

Each peer takes and returns [B, tokens, H, D]. It is imported when it is first used; one that is missing says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library. load: imports it and returns its attention. quantised: not bf16, so it has another error budget."""

    load: Callable[[], Attention]
    quantised: bool = False
    on_cpu: bool = False


def _sdpa(backend: SDPBackend) -> Callable[[], Attention]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    return lambda: attend


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # so that every shape is compiled, and none falls back to eager
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda *qkv: compiled(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def first(out) -> Tensor:
    """The output of a library that may also return a log-sum-exp."""
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    return lambda *qkv: first(flash_attn_func(*qkv))


def _flash_attn_3() -> Attention:
    from flash_attn_interface import flash_attn_func

    return lambda *qkv: first(flash_attn_func(*qkv))


def _flash_attn_2() -> Attention:
    from flash_attn import flash_attn_func

    return lambda *qkv: first(flash_attn_func(*qkv))


def _xformers() -> Attention:
    from xformers.ops import memory_efficient_attention

    return lambda *qkv: memory_efficient_attention(*qkv)


def _sage() -> Attention:
    from sageattention import sageattn

    return lambda *qkv: sageattn(*qkv, tensor_layout="NHD")


def _flashinfer() -> Attention:
    from flashinfer import single_prefill_with_kv_cache

    return lambda *qkv: torch.stack(
        [single_prefill_with_kv_cache(*one, causal=False) for one in zip(*qkv, strict=True)]
    )


PEERS = {
    "sdpa cudnn": Peer(load=_sdpa(SDPBackend.CUDNN_ATTENTION)),
    "sdpa flash": Peer(load=_sdpa(SDPBackend.FLASH_ATTENTION)),
    "sdpa efficient": Peer(load=_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "sdpa math": Peer(load=_sdpa(SDPBackend.MATH), on_cpu=True),
    "flex": Peer(load=_flex),
    "flash-attn 4": Peer(load=_flash_attn_4),
    "flash-attn 3": Peer(load=_flash_attn_3),
    "flash-attn 2": Peer(load=_flash_attn_2),
    "xformers": Peer(load=_xformers),
    "flashinfer": Peer(load=_flashinfer),
    "sageattention": Peer(load=_sage, quantised=True),
}


def get_peer(name: str, device: str) -> Attention | str:
    """That library's attention, or why it cannot run here."""
    peer = PEERS[name]
    if device == "cpu" and not peer.on_cpu:
        return "needs a CUDA GPU"
    if device != "cpu" and peer.on_cpu:
        return "holds all scores in memory: for a CPU only"
    try:
        return peer.load()
    except Exception as fault:  # an import may fail in any way: missing, built for another torch, no compiler
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
