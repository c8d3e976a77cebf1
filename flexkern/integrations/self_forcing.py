"""Self-Forcing's own pipeline, on the cache, attention and noise of this package.

    from flexkern.integrations import self_forcing
    self_forcing.patch(pipeline, preset="flex")     # a loaded CausalInferencePipeline; its script goes on as before
    self_forcing.unpatch(pipeline)

Replaced are the forward of every self-attention, the allocation of its cache and, where the preset's noise is not
i.i.d., the noise. Weights, cross-attention, loop, scheduler and decoder stay upstream's; of its table of 1024 positions
nothing is read. Source: Self-Forcing, pipeline/causal_inference.py and wan/modules/causal_model.py.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.backends import get_backend
from flexkern.noise import PolicyNoise
from flexkern.policies import Preset, get_preset
from flexkern.window import CacheWindow

HANDLE = "flexkern_patch"  # the pipeline's attribute that holds its patch
ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """What a research repository is recognised by: names of its pipelines, arguments of the methods that are replaced.

    returns_update: whether its self-attention returns a second value, of cache updates that its model would apply.
    """

    name: str
    pipelines: tuple[str, ...]
    attention: tuple[str, ...]
    initialize: tuple[str, ...]
    returns_update: bool = False


ATTENTION = ("x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "cache_start")
SELF_FORCING = Upstream(
    name="Self-Forcing",
    pipelines=("CausalInferencePipeline",),
    attention=ATTENTION,
    initialize=("batch_size", "dtype", "device"),
)


def patch(
    pipeline: nn.Module, preset: str | Preset = "flex", *, seed: int | None = None, backend: str = "sdpa"
) -> "Patch":
    """The pipeline now runs with the preset, for any number of frames, until ``unpatch`` or the handle's ``undo``.

    pipeline: a ``CausalInferencePipeline`` with its weights loaded, already in its dtype and on its device.
    seed: of the preset's noise, as ``Session``'s; None draws one for each video from torch's generator, so that the
        script's own seed decides. Not used by presets whose noise is i.i.d.: they leave upstream's as it is.
    backend: see ``flexkern.backends``.
    The handle that is returned may be used as a context manager.
    Raises ValueError, with nothing changed, for a pipeline that is not the one described above, saying what was found.
    """
    return Patch(pipeline, SELF_FORCING, preset, seed, backend)


def unpatch(pipeline: nn.Module) -> None:
    """The pipeline is upstream's again, with its caches empty. Raises ValueError where it was not patched."""
    handle = getattr(pipeline, HANDLE, None)
    if handle is None:
        raise ValueError(f"pipeline must be one that patch was called with, got an unpatched {type(pipeline).__name__}")
    handle.undo()


def recognise(pipeline: nn.Module, upstream: Upstream) -> nn.Module:
    """The transformer inside the pipeline. Raises ValueError unless everything the patch relies on is as expected."""

    def expect(what: str, found: Any, *wanted: Any) -> None:
        if found not in wanted:
            names = " or ".join(map(str, wanted))
            raise ValueError(f"{upstream.name}: {what} must be {names}, got {found}; this upstream is not known")

    kind = type(pipeline)
    expect("the pipeline's class", kind.__name__, *upstream.pipelines)
    if getattr(pipeline, HANDLE, None) is not None:
        raise ValueError("the pipeline is patched already: call unpatch first")
    names = ("generator", "scheduler", "kv_cache1", "num_frame_per_block", "frame_seq_length", "num_transformer_blocks")
    missing = [name for name in names if not hasattr(pipeline, name)]
    expect("the list of attributes missing in the pipeline", missing, [])
    expect("the first argument of inference", arguments(kind.inference)[0], "noise")
    expect("the arguments of _initialize_kv_cache", arguments(kind._initialize_kv_cache), upstream.initialize)
    models = [module for module in pipeline.generator.modules() if type(module).__name__ == "CausalWanModel"]
    expect("the number of CausalWanModel in the generator", len(models), 1)
    model = models[0]
    expect("model_type", model.model_type, "t2v")
    expect("patch_size", tuple(model.patch_size), (1, 2, 2))
    expect("the number of blocks", len(model.blocks), pipeline.num_transformer_blocks)
    for block in model.blocks:
        attn = block.self_attn
        expect("the class of self_attn", type(attn).__name__, "CausalWanSelfAttention")
        expect("the arguments of CausalWanSelfAttention.forward", arguments(type(attn).forward), upstream.attention)
        expect("the width of self_attn", (attn.dim, attn.num_heads * attn.head_dim), (model.dim, model.dim))
        for norm in (attn.norm_q, attn.norm_k):
            expect("the class of norm_q and norm_k", type(norm).__name__, "WanRMSNorm")
            expect("the shape of their weights", tuple(norm.weight.shape), (model.dim,))
            expect("their eps", norm.eps, model.eps)
    return model


def arguments(method: Callable) -> tuple[str, ...]:
    """Names of what a method takes, without self."""
    return tuple(inspect.signature(method).parameters)[1:]


class Patch:
    """What was replaced in a pipeline, and how to undo it. Leaving it as a context manager undoes it."""

    def __init__(self, pipeline: nn.Module, upstream: Upstream, preset: str | Preset, seed: int | None, backend: str):
        self.pipeline, self.upstream, self.preset, self.seed = pipeline, upstream, get_preset(preset), seed
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise ValueError(f"seed must be a whole number >= 0, or None, got {seed!r}")
        model = recognise(pipeline, upstream)
        self.preset.retention.keep(0, pipeline.num_frame_per_block)  # refuses a window that is too small
        weight, attn = model.patch_embedding.weight, model.blocks[0].self_attn
        self.made_for = weight.dtype, weight.device
        self.window = CacheWindow(
            self.preset, get_backend(backend, weight.device), layers=len(model.blocks), heads=attn.num_heads,
            head_dim=attn.head_dim, eps=model.eps, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.noise: PolicyNoise | None = None
        self.renoised: tuple[Any, int] = None, 0  # a chunk, and how often it was given fresh noise
        self._undo = ExitStack()
        self._replace_all(model)

    def undo(self) -> None:
        """Everything is as it was; upstream's caches are empty. The second call does nothing."""
        self._undo.close()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def _replace_all(self, model: nn.Module) -> None:
        pipeline, noise = self.pipeline, self.preset.noise
        self.layers = len(model.blocks)
        hook = model.register_forward_pre_hook(self._open, with_kwargs=True)
        self._undo.callback(hook.remove)
        for layer, block in enumerate(model.blocks):
            attn = block.self_attn
            self.replace(attn, "forward", partial(self._attend, layer, attn, attn.forward))
        self.replace(pipeline, "_initialize_kv_cache", self._initialize)
        self.replace(pipeline, "inference", partial(self._inference, pipeline.inference))
        if noise.kind != "iid" and noise.apply == "initial+renoise":
            scheduler = pipeline.scheduler
            self.replace(scheduler, "add_noise", partial(self._add_noise, scheduler.add_noise))
        self.replace(pipeline, HANDLE, self)
        pipeline.kv_cache1 = None  # has both caches allocated anew
        self._undo.callback(setattr, pipeline, "kv_cache1", None)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """The instance's attribute is ``value`` until ``undo``."""
        own = vars(owner).get(name, ABSENT)
        setattr(owner, name, value)
        self._undo.callback(*((delattr, owner, name) if own is ABSENT else (setattr, owner, name, own)))

    def _initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device, *_, **__) -> None:
        """Instead of upstream's cache: its dictionaries without room, since pages hold the keys and values."""
        self.window.begin(self.window.target)
        empty = lambda: torch.empty(batch_size, 0, 1, 1, dtype=dtype, device=device)
        index = lambda: torch.zeros(1, dtype=torch.long, device=device)
        self.pipeline.kv_cache1 = [
            {"k": empty(), "v": empty(), "global_end_index": index(), "local_end_index": index()}
            for _ in range(self.layers)
        ]

    def _open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the transformer runs: find out which frames these are."""
        if kwargs.get("kv_cache") is None:
            return
        if torch.is_grad_enabled() and model.patch_embedding.weight.requires_grad:
            raise ValueError("a patched pipeline is for inference: run it under torch.no_grad()")
        weight, at = model.patch_embedding.weight, kwargs.get("current_start", 0)
        if (weight.dtype, weight.device) != self.made_for:
            raise ValueError(f"the model must stay {self.made_for}, got {weight.dtype, weight.device}: patch it last")
        batch, _, count, height, width = args[0].shape
        _, ph, pw = model.patch_size
        rows, columns = height // ph, width // pw
        tokens = rows * columns
        if not isinstance(at, int) or at % tokens or self.pipeline.frame_seq_length != tokens:
            raise ValueError(
                f"a latent frame of {height}x{width} has {tokens} tokens, the pipeline's frame_seq_length is "
                f"{self.pipeline.frame_seq_length} and current_start {at!r}: set frame_seq_length"
            )
        self.window.open(at // tokens, count, (batch, rows, columns))

    def _attend(
        self, layer: int, attn: nn.Module, original: Callable, x: Tensor, seq_lens, grid_sizes, freqs, block_mask,
        kv_cache=None, current_start=0, cache_start=None, *rest,
    ):  # fmt: skip
        """Instead of a self-attention's forward: x [B, F * S, C], modulated -> the same, through ``o``."""
        if kv_cache is None:  # a forward without cache has nothing to do with us
            return original(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start, *rest)
        shape = (x.shape[0], len(self.window.frames), -1, attn.num_heads, attn.head_dim)
        query, key, value = (project(x).view(shape) for project in (attn.q, attn.k, attn.v))
        norms = attn.norm_q.weight, attn.norm_k.weight
        y = attn.o(self.window.memory.attend(layer, query, key, value, norms).reshape(x.shape))
        return (y, None) if self.upstream.returns_update else y

    def _inference(self, original: Callable, *args, **kwargs):
        """A video begins: its length is known now, and its noise becomes the preset's."""
        call = inspect.signature(original).bind(*args, **kwargs)
        noise, given = call.arguments["noise"], call.arguments.get("initial_latent")
        done = 0 if given is None else given.shape[1]
        self.window.begin(done + noise.shape[1])
        self.renoised = None, 0
        if self.preset.noise.kind != "iid":
            call.arguments["noise"] = self._initial(noise, done)
        try:
            return original(*call.args, **call.kwargs)
        finally:
            self.window.target = self.noise = None

    def _initial(self, noise: Tensor, done: int) -> Tensor:
        """The preset's noise in the place of upstream's [B, F, C, h, w]. done: frames that were given."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        batch, count, *shape = noise.shape
        self.noise = PolicyNoise(self.preset.noise, seed, batch, tuple(shape), self.window.target)
        out, chunk = torch.empty_like(noise), self.pipeline.num_frame_per_block
        alone = getattr(self.pipeline, "independent_first_frame", False) and not done
        ends = [*range(1 if alone else chunk, count, chunk), count]
        for first, end in zip([0, *ends], ends, strict=False):
            out[:, first:end] = self.noise.initial(range(done + first, done + end)).to(noise)
        return out

    def _add_noise(self, original: Callable, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Instead of the scheduler's: clean [B * F, C, h, w] meets the preset's fresh noise."""
        if self.noise is None:  # not a call of inference
            return original(clean, noise, timestep)
        chunk, step = self.renoised
        step = step if chunk == self.window.chunk else 0
        self.renoised = self.window.chunk, step + 1
        fresh = self.noise.renoise(self.window.frames, step)
        return original(clean, fresh.flatten(0, 1).to(noise), timestep)
