"""LongLive's own pipelines (branch v1.0), on the cache, attention and noise of this package.

    from flexkern.integrations import longlive
    longlive.patch(pipeline, preset="flex")     # a loaded pipeline of LongLive; its script goes on as before
    longlive.unpatch(pipeline)

As ``flexkern.integrations.self_forcing``, for LongLive's plain, switch and interactive pipelines, with or without its
LoRA and its infinite attention. A change of prompt is the preset's ``switch`` policy. Source: LongLive v1.0,
pipeline/causal_inference.py, pipeline/interactive_causal_inference.py, wan/modules/causal_model.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.backends.choice import AUTO
from flexkern.integrations.self_forcing import ATTENTION, SELF_FORCING, Patch, Upstream, unpatch
from flexkern.policies import Preset

__all__ = ["LONGLIVE", "patch", "unpatch"]

LONGLIVE = Upstream(
    name="LongLive",
    pipelines=("CausalInferencePipeline", "SwitchCausalInferencePipeline", "InteractiveCausalInferencePipeline"),
    attention=(*ATTENTION, "sink_recache_after_switch"),
    initialize=(*SELF_FORCING.initialize, "kv_cache_size_override"),
    returns_update=True,
    horizon=240,
)


def patch(pipeline: nn.Module, preset: str | Preset = "flex", *, seed: int | None = None, backend: str = AUTO) -> Patch:
    """Run a pipeline of LongLive with the preset; patch it after its LoRA is applied.

    The preset's ``switch`` decides what a new prompt does to the cache; the pipeline's ``global_sink`` is not used.

    Args:
        pipeline: A loaded pipeline, already in its dtype and on its device.
        preset: The method: a name, or a ``Preset``.
        seed: As in ``flexkern.integrations.self_forcing.patch``.
        backend: Name of the attention backend, "auto" or a key of ``flexkern.backends.BACKENDS``.

    Returns:
        A handle, which may be used as a context manager.

    Raises:
        ValueError: The pipeline is not one of LongLive v1.0; the message says what was found. Nothing has changed.
    """
    handle = Patch(pipeline, LONGLIVE, preset, seed, backend)
    if hasattr(pipeline, "_recache_after_switch"):
        handle.replace(pipeline, "_recache_after_switch", partial(_switch, handle))
    return handle


def _switch(handle: Patch, output: Tensor, current_start_frame: int, new_conditional_dict: dict[str, Any]) -> None:
    """Instead of ``_recache_after_switch``: the cross-attention starts anew, the cached frames follow the preset."""
    pipeline = handle.pipeline
    for cache in pipeline.crossattn_cache:
        cache["is_init"] = False
    count = handle.switch()
    if not count:
        return
    device = handle.window.cache.keys.device
    clean = output[:, current_start_frame - count : current_start_frame].to(device)
    with torch.no_grad():
        pipeline.generator(
            noisy_image_or_video=clean,
            conditional_dict=new_conditional_dict,
            timestep=torch.full(clean.shape[:2], pipeline.args.context_noise, dtype=torch.int64, device=device),
            kv_cache=pipeline.kv_cache1,
            crossattn_cache=pipeline.crossattn_cache,
            current_start=(current_start_frame - count) * pipeline.frame_seq_length,
        )
