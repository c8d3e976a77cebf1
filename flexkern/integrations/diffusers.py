"""diffusers' ``WanTransformer3DModel`` with our self-attention: longer clips with a preset, or video without end.

    patch(pipe.transformer, preset="riflex")      # whole clips, as diffusers makes them
    unpatch(pipe.transformer)

    for chunk in causal(pipe.transformer).session(prompt_embeds, preset="flex"):   # chunk by chunk, over a paged cache
        ...

Only self-attention is replaced: weights, LoRAs, text and time stay with the diffusers model. Its ``rope`` is called
once in each forward, and what it returns reaches every self-attention as ``rotary_emb``; it is replaced by a module
that returns a ``PagedMemory``. Source: diffusers 0.42.1, models/transformers/transformer_wan.py.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flexkern.backends import Pointwise
from flexkern.backends.choice import AUTO, open_backend, validate_backend
from flexkern.cache import FrameCache
from flexkern.engine import Engine
from flexkern.memory import Memory, PagedMemory
from flexkern.model.protocols import Decoder, Encoder, TextEncoder
from flexkern.model.schedule import Schedule
from flexkern.model.wan import TextKV, WanConfig, token_grid
from flexkern.plan import BASE, ChunkPlan, PlanBuffers, band_split, make_plan, place_turns
from flexkern.policies import Preset, get_preset

TRIED = "0.42.1"
_IN_USE: "WeakKeyDictionary[nn.Module, Lock]" = WeakKeyDictionary()  # transformers that sessions of any engine share


class PagedProcessor:
    """An attention processor for a self-attention of Wan: keys and values go through the ``PagedMemory`` it is handed.

    Args:
        layer: Index of the cache's layer that is its own.
    """

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: Memory | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states [N, L, C] with N * L = B * F * S, by video, frame, then place; returns the same shape."""
        if not isinstance(rotary_emb, PagedMemory) or encoder_hidden_states is not None or attention_mask is not None:
            raise TypeError("PagedProcessor serves the self-attention of a patched WanTransformer3DModel, without mask")
        if attn.fused_projections:
            projected = [x.contiguous() for x in attn.to_qkv(hidden_states).chunk(3, dim=-1)]
        else:
            projected = [project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)]
        cache = rotary_emb.cache.keys
        shape = cache.shape[1], len(rotary_emb.plan.write_slots), cache.shape[3], attn.heads, -1
        query, key, value = (x.view(shape) for x in projected)
        out = rotary_emb.attend(self.layer, query, key, value, (attn.norm_q.weight, attn.norm_k.weight))
        assert out is not None, "attention has a query here"
        project, dropout = attn.to_out
        return dropout(project(out.reshape(*hidden_states.shape[:2], -1)))


class MemoryRope(nn.Module):
    """Replaces the transformer's ``rope``: gives each forward its memory instead of cosines and sines."""

    def __init__(self, own: nn.Module, memory: Callable[[Tensor], Memory], handle: "Patch"):
        super().__init__()
        self.own = own  # moves with the model, for when it is put back
        self.memory, self.handle = memory, handle

    def forward(self, latents: Tensor) -> Memory:
        return self.memory(latents)


class Patch:
    """Our processors in a transformer, until ``undo``; in a ``with`` statement, until its end."""

    def __init__(self, transformer: Any, memory: Callable[[Tensor], Memory], layers: Sequence[int]):
        self.transformer, self.rope = transformer, transformer.rope
        self.attentions = [block.attn1 for block in transformer.blocks]
        self.processors = [attn.processor for attn in self.attentions]
        transformer.rope = MemoryRope(self.rope, memory, self)
        for attn, layer in zip(self.attentions, layers, strict=True):
            attn.set_processor(PagedProcessor(layer))

    def __repr__(self) -> str:
        state = "undone" if self.transformer.rope is self.rope else "in place"
        return f"Patch({type(self.transformer).__name__} of {len(self.attentions)} layers, {state})"

    def undo(self) -> None:
        """Give the transformer its own rope and processors back. A second call does nothing.

        Raises:
            RuntimeError: Something else has replaced ours since.
        """
        if self.transformer.rope is self.rope:
            return
        if getattr(self.transformer.rope, "own", None) is not self.rope:
            raise RuntimeError("the transformer was patched again since: undo the last patch first")
        self.transformer.rope = self.rope
        for attn, processor in zip(self.attentions, self.processors, strict=True):
            attn.set_processor(processor)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class ClipMemory:
    """The memory of a bidirectional forward: every frame of the clip meets every other, at the preset's positions.

    One layer of keys and values serves all layers in turn. Of the preset only ``position`` acts.
    """

    def __init__(self, config: WanConfig, preset: Preset, backend: str):
        self.config, self.position, self.backend = config, preset.position, backend
        self.plans: dict[tuple[int, int, int, torch.device], ChunkPlan] = {}

    def __call__(self, latents: Tensor) -> PagedMemory:
        if torch.compiler.is_compiling():
            from flexkern.untraced import call

            return call(self._begin, latents)
        return self._begin(latents)

    def _begin(self, latents: Tensor) -> PagedMemory:
        """Empty pages for a forward of latents [B, C, F, h, w], and its plan."""
        if torch.is_grad_enabled():
            raise RuntimeError("a patched transformer is for inference: call it under torch.no_grad()")
        batch, _, frames, height, width = latents.shape
        config = self.config
        backend, _ = open_backend(self.backend, latents.device, head_dim=config.head_dim, dtype=latents.dtype)
        _, ph, pw = config.patch_size
        rows, columns = height // ph, width // pw
        cache = FrameCache(
            layers=1, batch=batch, pages=frames, tokens=rows * columns, heads=config.num_heads,
            head_dim=config.head_dim, dtype=latents.dtype, device=latents.device,
        )  # fmt: skip
        cache.allocate(range(frames))
        key = frames, rows, columns, latents.device
        if key not in self.plans:
            self.plans[key] = self._plan(*key)
        return PagedMemory(cache, self.plans[key], backend, config.eps)

    def _plan(self, frames: int, rows: int, columns: int, device: torch.device) -> ChunkPlan:
        config, order = self.config, range(frames)
        bands = band_split(config.head_dim)[0]
        phases = self.position.phases(query=order, visible=order, bands=bands, heads=config.num_heads, target=frames)
        place_turn = place_turns(rows, columns, config.head_dim).to(device)
        return PlanBuffers(device).hold(make_plan(phases, write_slots=order, read_slots=order, place_turn=place_turn))


class CausalTransformer:
    """A ``VideoModel`` made of diffusers' transformer, which is as it was after each call.

    Frames go through it as a batch of single pictures, so that each has its own timestep; only self-attention, in the
    session's memory, joins them. Threads take turns.
    """

    def __init__(self, transformer: Any):
        self.transformer, self.config = transformer, _config(transformer)
        self._turn = _IN_USE.setdefault(transformer, Lock())

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the transformer's weights."""
        return self.transformer.patch_embedding.weight.device

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a latent frame; as ``CausalWan.grid``."""
        return token_grid(self.config.patch_size, height, width)

    def text_keys(self, text: Tensor, ops: Pointwise) -> TextKV:
        """The prompt [B, L, text_dim] itself: diffusers makes keys and values of it in every forward."""
        if text.dim() != 3 or text.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, {self.config.text_dim}], got {list(text.shape)}")
        return [(text.to(self.dtype),)]

    def __call__(
        self, latents: Tensor, timesteps: Tensor, text: TextKV, memory: Memory, *, keys_only: bool = False
    ) -> Tensor | None:
        """As ``CausalWan.forward``. keys_only saves nothing here: the forward runs to its end."""
        batch, frames = latents.shape[:2]
        pictures = latents.to(self.dtype).flatten(0, 1).unsqueeze(2)
        prompt = text[0][0].repeat_interleave(frames, dim=0)
        with self._turn, Patch(self.transformer, lambda _: memory, range(self.config.num_layers)):
            (out,) = self.transformer(pictures, timesteps.flatten(), prompt, return_dict=False)
        return None if keys_only else out.squeeze(2).unflatten(0, (batch, frames))


def patch(transformer: nn.Module, preset: str | Preset = "riflex", *, backend: str = AUTO) -> Patch:
    """Run every forward of a ``WanTransformer3DModel`` with the preset's temporal positions, until ``unpatch``.

    Whole clips, every frame attending to every other, at any length: the horizon extension of the preset follows the
    number of latent frames. Under torch.no_grad() only.

    Args:
        transformer: The ``transformer`` of a Wan pipeline.
        preset: Only its ``position`` acts; "self-forcing" is the transformer as it was.
        backend: Name of the attention backend, "auto" or a key of ``flexkern.backends.BACKENDS``.

    Returns:
        A handle with ``undo``, which may be used as a context manager.

    Raises:
        TypeError: The transformer, or one of its self-attentions, is of another class. Nothing has changed.
        ValueError: It is patched already, or preset or backend are not known. Nothing has changed.
        NotImplementedError: It takes images, is spread over devices, or turns its heads otherwise. Nothing has changed.
    """
    chosen = get_preset(preset)
    config = _config(transformer)
    validate_backend(backend)
    return Patch(transformer, ClipMemory(config, chosen, backend), [0] * config.num_layers)


def unpatch(transformer: nn.Module) -> None:
    """Give the transformer back what ``patch`` replaced.

    Args:
        transformer: The one that ``patch`` was called with.

    Raises:
        ValueError: It is not patched.
    """
    handle = getattr(getattr(transformer, "rope", None), "handle", None)
    if not isinstance(handle, Patch):
        hint = "; pass its .transformer" if hasattr(transformer, "transformer") else ""
        got = f"an unpatched {type(transformer).__name__}{hint}"
        raise ValueError(f"transformer must be one that patch was called with, got {got}")
    handle.undo()


def causal(
    transformer: nn.Module, *, schedule: Schedule | None = None, backend: str = AUTO, chunk: int = 3,
    text_encoder: TextEncoder | None = None, encoder: Encoder | None = None,
    decoder: Callable[[], Decoder] | None = None, size: tuple[int, int] = (60, 104),
) -> Engine:  # fmt: skip
    """An ``Engine`` whose model is the given ``WanTransformer3DModel``.

    Between two steps the transformer is as it was, so that there is nothing to undo.

    Args:
        transformer: With the weights of a causal model.
        schedule: As ``Engine``'s; so are the arguments after it.
        backend: "auto" or a key of ``flexkern.backends.BACKENDS``.
        chunk: Latent frames denoised together.
        text_encoder: Needed for prompts that are text.
        encoder: Needed for videos that begin with pictures.
        decoder: Called once per session; what it returns decodes that session's latents.
        size: Height and width of a latent frame, for sessions that do not name one.

    Raises:
        TypeError: As ``patch``.
        ValueError: As ``patch``.
        NotImplementedError: As ``patch``, or the transformer skips attention or is offloaded.
    """
    model = CausalTransformer(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise NotImplementedError("the transformer skips attention (enable_cache): call disable_cache() first")
    if hasattr(transformer, "_hf_hook"):
        raise NotImplementedError("the transformer is offloaded by accelerate: keep it on one device, as the cache is")
    return Engine(
        model, schedule=schedule, backend=backend, chunk=chunk, text_encoder=text_encoder, encoder=encoder,
        decoder=decoder, size=size,
    )  # fmt: skip


def _config(transformer: Any) -> WanConfig:
    """The sizes of a transformer that ``patch`` and ``causal`` can serve. Raises for any other."""
    try:
        from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel
    except ImportError as error:
        needed = f'needs diffusers with WanAttention (tried: {TRIED}): pip install "flexkern[model]"'
        raise ImportError(f"flexkern.integrations.diffusers {needed}") from error
    if type(transformer) is not WanTransformer3DModel:
        hint = "; pass its .transformer" if hasattr(transformer, "transformer") else ""
        raise TypeError(f"expected diffusers' WanTransformer3DModel itself, got {type(transformer).__name__}{hint}")
    config = transformer.config
    out_dim = config.out_channels or config.in_channels
    if config.image_dim or config.added_kv_proj_dim or config.in_channels != out_dim:
        raise NotImplementedError("the transformer takes images; supported: text-to-video Wan")
    if isinstance(transformer.rope, MemoryRope):
        raise ValueError("the transformer is patched already: undo that patch first")
    spread = set(getattr(transformer, "hf_device_map", {}).values())
    if len(spread) > 1 or getattr(transformer, "_parallel_config", None) is not None:
        raise NotImplementedError("the transformer is spread over devices; supported: one device")
    for index, block in enumerate(transformer.blocks):
        attn, processor = type(block.attn1), type(getattr(block.attn1, "processor", None))
        if attn is not WanAttention or processor is not WanAttnProcessor:
            expected = "expected a WanAttention with a WanAttnProcessor"
            raise TypeError(f"blocks.{index}.attn1: {expected}, got {attn.__name__} with {processor.__name__}")
    dim = config.num_attention_heads * config.attention_head_dim
    _validate_rope(transformer.rope, config.attention_head_dim)
    return WanConfig(
        dim=dim, ffn_dim=config.ffn_dim, num_heads=config.num_attention_heads, num_layers=config.num_layers,
        in_dim=config.in_channels, out_dim=out_dim, patch_size=config.patch_size,
        text_dim=config.text_dim, freq_dim=config.freq_dim, eps=config.eps, cross_attn_norm=config.cross_attn_norm,
    )  # fmt: skip


def _validate_rope(rope: nn.Module, head_dim: int) -> None:
    """Raise unless the transformer turns its heads as Wan does, in every band of time, row and column."""
    counts = (torch.arange(n, dtype=torch.float64, device="cpu") / n for n in band_split(head_dim))
    expected = torch.cat([torch.pow(BASE, -count) for count in counts])
    table: Tensor = getattr(rope, "freqs_cos", torch.empty(0, 0))
    rows = min(64, len(table))
    angles = torch.arange(rows, device="cpu")[:, None] * expected
    # the table may have been cast to bfloat16 along with the model
    if not rows or table.shape[1] != head_dim or (table[:rows, ::2].cpu() - angles.cos()).abs().max() > 0.01:
        raise NotImplementedError(f"the transformer's rope is not Wan's: {type(rope).__name__}; supported: base {BASE}")
