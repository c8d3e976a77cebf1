"""Self-Forcing's own pipeline, on the cache, attention and noise of this package.

    from flexkern.integrations import self_forcing
    self_forcing.patch(pipeline, preset="flex")     # a loaded CausalInferencePipeline; its script goes on as before
    self_forcing.unpatch(pipeline)

Replaced are the forward of every self-attention, the allocation of its cache and, where the preset's noise is not
i.i.d., the noise. Weights, cross-attention, loop, scheduler and decoder stay upstream's; its table of 1024 positions is
not read. Source: Self-Forcing, pipeline/causal_inference.py and wan/modules/causal_model.py.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexkern.backends.choice import AUTO, open_backend
from flexkern.checks import whole
from flexkern.integrations.replaced import Replaced, arguments, undo_patch
from flexkern.noise import PolicyNoise
from flexkern.plan import band_split
from flexkern.policies import Preset, get_preset
from flexkern.window import CacheWindow

HANDLE = "flexkern_patch"  # the pipeline's attribute that holds its patch


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """What a research repository is recognised by."""

    name: str
    pipelines: tuple[str, ...]
    """class names of its pipelines"""
    attention: tuple[str, ...]
    """arguments of its self-attention's forward"""
    initialize: tuple[str, ...]
    """arguments of the pipeline's _initialize_kv_cache"""
    horizon: int = 21
    """latent frames that its model was trained on, for presets that do not say"""
    returns_update: bool = False
    """whether its self-attention also returns updates of the cache, which its model would apply"""


ATTENTION = ("x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "cache_start")
SELF_FORCING = Upstream(
    name="Self-Forcing",
    pipelines=("CausalInferencePipeline",),
    attention=ATTENTION,
    initialize=("batch_size", "dtype", "device"),
)


def patch(
    pipeline: nn.Module, preset: str | Preset = "flex", *, seed: int | None = None, backend: str = AUTO
) -> "Patch":
    """Run the pipeline with the preset, for any number of frames, until ``unpatch`` or the handle's ``undo``.

    Args:
        pipeline: A ``CausalInferencePipeline`` with its weights loaded, already in its dtype and on its device.
        preset: The method: a name, or a ``Preset``.
        seed: Of the preset's noise, as a session's; None draws one for each video from torch's generator, so that the
            script's own seed decides. Presets whose noise is i.i.d. leave upstream's noise as it is.
        backend: Name of the attention backend, "auto" or a key of ``flexkern.backends.BACKENDS``.

    Returns:
        A handle, which may be used as a context manager.

    Raises:
        ValueError: The pipeline is not the one described above; the message says what was found. Nothing has changed.
    """
    return Patch(pipeline, SELF_FORCING, preset, seed, backend)


def unpatch(pipeline: nn.Module) -> None:
    """Give the pipeline back what ``patch`` replaced; its caches are empty afterwards.

    Raises:
        ValueError: The pipeline was not patched.
    """
    undo_patch(pipeline, HANDLE, "pipeline")


def recognise(pipeline: Any, upstream: Upstream) -> Any:
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


class Patch(Replaced):
    """What was replaced in a pipeline, and how to undo it. Leaving it as a context manager undoes it."""

    def __init__(self, pipeline: Any, upstream: Upstream, preset: str | Preset, seed: int | None, backend: str):
        self.pipeline, self.upstream = pipeline, upstream
        self.seed = seed = None if seed is None else whole("seed", seed)
        self.preset = get_preset(preset).for_horizon(upstream.horizon).resolve()
        model = recognise(pipeline, upstream)
        weight, attn = model.patch_embedding.weight, model.blocks[0].self_attn
        self.preset.retention.keep([], pipeline.num_frame_per_block)  # refuses a window that is too small
        self.preset.position.multipliers(1.0, band_split(attn.head_dim)[0], attn.num_heads)
        self.made_for = weight.dtype, weight.device
        self.backend, choice = open_backend(backend, weight.device, head_dim=attn.head_dim, dtype=weight.dtype)
        self.backend_name = choice.name
        self.target: int | None = None  # latent frames of the video that inference was called for
        self._window: CacheWindow | None = None  # the size of a video shows in its first forward
        self.noise: PolicyNoise | None = None
        self.renoised = range(0), 0  # the frames that were last given fresh noise, and how often
        super().__init__()
        self._replace_all(model)

    def __repr__(self) -> str:
        patched = f"{type(self.pipeline).__name__} of {self.upstream.name}"
        return f"Patch({patched}: preset {self.preset.name!r}, backend {self.backend_name!r})"

    @property
    def window(self) -> CacheWindow:
        """The cached frames of the video. Raises RuntimeError before the first forward."""
        if self._window is None:
            raise RuntimeError("the patched pipeline has not computed any frame yet")
        return self._window

    def begin(self, target: int | None) -> None:
        """Begin a video of so many latent frames; None where that is not known."""
        self.target = target
        if self._window is not None:
            self._window.begin(target)

    def switch(self) -> int:
        """Do to the cache what the preset does at a change of prompt; as ``CacheWindow.switch``."""
        return 0 if self._window is None else self._window.switch()

    def undo(self) -> None:
        """Put everything back; upstream's caches are empty afterwards. The second call does nothing."""
        super().undo()

    def _replace_all(self, model: Any) -> None:
        pipeline, noise = self.pipeline, self.preset.noise
        self.layers = len(model.blocks)
        hook = model.register_forward_pre_hook(self._prepare, with_kwargs=True)
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

    def _initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> None:
        """Instead of upstream's cache: its dictionaries without room, since pages hold the keys and values."""
        self.begin(self.target)
        empty = lambda: torch.empty(batch_size, 0, 1, 1, dtype=dtype, device=device)
        index = lambda: torch.zeros(1, dtype=torch.long, device=device)
        self.pipeline.kv_cache1 = [
            {"k": empty(), "v": empty(), "global_end_index": index(), "local_end_index": index()}
            for _ in range(self.layers)
        ]

    def _prepare(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the transformer runs: find out which frames these are, and prepare the window for them."""
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
        if self._window is None or self._window.shape != (batch, rows, columns):
            self._allocate((batch, rows, columns), model, range(at // tokens, at // tokens + count))
        self.window.prepare(at // tokens, count)

    def _allocate(self, shape: tuple[int, int, int], model: Any, frames: range) -> None:
        """Give the video a window of its own. Raises ValueError where one of another shape is under way."""
        attn = model.blocks[0].self_attn
        if self._window is not None and self._window.frames and (frames.start > 0 or self._window.frames == frames):
            raise ValueError(f"batch, rows and columns must stay {self._window.shape} within a video, got {shape}")
        self._window = None  # frees the old pages before the new ones are there
        (dtype, device), (batch, rows, columns) = self.made_for, shape
        self._window = CacheWindow(
            self.preset, self.backend, layers=self.layers, heads=attn.num_heads, head_dim=attn.head_dim,
            eps=model.eps, dtype=dtype, device=device, batch=batch, rows=rows, columns=columns, target=self.target,
        )  # fmt: skip

    def _attend(
        self, layer: int, attn: Any, original: Callable[..., Any], x: Tensor, seq_lens: Any, grid_sizes: Any,
        freqs: Any, block_mask: Any, kv_cache: Any = None, current_start: Any = 0, cache_start: Any = None, *rest: Any,
    ) -> Any:  # fmt: skip
        """Instead of a self-attention's forward: x [B, F * S, C], modulated -> the same, through ``o``."""
        if kv_cache is None:  # a forward without cache has nothing to do with us
            return original(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start, *rest)
        shape = (x.shape[0], len(self.window.frames), -1, attn.num_heads, attn.head_dim)
        query, key, value = (project(x).view(shape) for project in (attn.q, attn.k, attn.v))
        norms = attn.norm_q.weight, attn.norm_k.weight
        attended = self.window.memory.attend(layer, query, key, value, norms)
        assert attended is not None, "attention has a query here"
        y = attn.o(attended.reshape(x.shape))
        return (y, None) if self.upstream.returns_update else y

    def _inference(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A video begins: its length is known now, and its noise becomes the preset's."""
        call = inspect.signature(original).bind(*args, **kwargs)
        noise, given = call.arguments["noise"], call.arguments.get("initial_latent")
        done = 0 if given is None else given.shape[1]
        self.begin(done + noise.shape[1])
        self.renoised = range(0), 0
        if self.preset.noise.kind != "iid":
            call.arguments["noise"] = self._initial(noise, done)
        try:
            return original(*call.args, **call.kwargs)
        finally:
            self.target = self.noise = None
            if self._window is not None:
                self._window.target = None

    def _initial(self, noise: Tensor, done: int) -> Tensor:
        """The preset's noise instead of upstream's [B, F, C, h, w]. done: frames that were given."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        batch, count, *shape = noise.shape
        self.noise = PolicyNoise(self.preset.noise, seed, batch, tuple(shape), self.target)
        out, chunk = torch.empty_like(noise), self.pipeline.num_frame_per_block
        alone = getattr(self.pipeline, "independent_first_frame", False) and not done
        ends = [*range(1 if alone else chunk, count, chunk), count]
        for first, end in zip([0, *ends], ends, strict=False):
            out[:, first:end] = self.noise.initial(range(done + first, done + end)).to(noise)
        return out

    def _add_noise(self, original: Callable[..., Tensor], clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Instead of the scheduler's: clean [B * F, C, h, w] meets the preset's fresh noise."""
        if self.noise is None:  # not a call of inference
            return original(clean, noise, timestep)
        frames, (last, step) = self.window.frames, self.renoised
        step = step if frames == last else 0
        self.renoised = frames, step + 1
        fresh = self.noise.renoise(frames, step)
        return original(clean, fresh.flatten(0, 1).to(noise), timestep)
