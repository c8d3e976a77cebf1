"""The kernels of ``flexkern.kernels``: one pass over the pages, no key is gathered, copied or turned."""

from torch import Tensor

from flexkern.kernels.attention.portable import frame_attention as attend_frames
from flexkern.kernels.pages.norm_rope_write import norm_rope_write
from flexkern.kernels.pointwise.add_modulate import add_modulate
from flexkern.kernels.pointwise.modulate import modulate
from flexkern.kernels.pointwise.rms_norm import rms_norm
from flexkern.plan import ChunkPlan

__all__ = ["add_modulate", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]


def frame_attention(query: Tensor, key_pages: Tensor, value_pages: Tensor, plan: ChunkPlan) -> Tensor:
    """Softmax attention of query [B, F, S, H, D] over the listed pages; as ``reference.frame_attention``.

    Raises NotImplementedError for head dims and dtypes that no kernel takes: Wan's are 64 and 128.
    """
    pages = key_pages, value_pages, plan.read_slots
    return attend_frames(query, *pages, plan.turn, plan.logit_scale, plan.bias)[0]
