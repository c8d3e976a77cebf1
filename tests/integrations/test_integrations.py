"""Research pipelines, patched and not: stand-ins with the published signatures and cache dictionaries (stand_in.py)."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from upstream import deepened

from flexkern.engine import Engine
from flexkern.integrations import longlive, self_forcing
from flexkern.model.schedule import SCHEDULES
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.policies import get_preset

SIZE, TOKENS = (4, 6), 6
INTERACTIVE = "InteractiveCausalInferencePipeline"
CORRELATED = get_preset("flex", {"noise.apply": "initial+renoise"})  # not a draw is left to torch's generator


@pytest.fixture(scope="module")
def weights():
    return load_file(Path(__file__).parent.parent / "data/tiny_wan.safetensors")


@pytest.fixture
def forcing(weights):
    return stand_in.pipeline(stand_in.SelfForcing, weights, window=9)


@pytest.fixture
def live(weights):
    return stand_in.pipeline(stand_in.LongLive, weights, window=12, sink=3)


def noise_of(chunks, batch=1):
    return torch.randn(batch, 3 * chunks, 16, *SIZE, generator=torch.Generator().manual_seed(7))


def render(pipeline, chunks=5, batch=1, seed=3, **more):
    torch.manual_seed(seed)
    prompts = {} if "text_prompts_list" in more else {"text_prompts": [11] * batch}
    return pipeline.inference(noise=noise_of(chunks, batch), **prompts, **more)


def assert_equal(ours, theirs):
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < 1e-4


WINDOWS = {
    "self-forcing": (self_forcing, stand_in.SelfForcing, dict(window=9), {"retention.window": 9}),
    "self-forcing, pinned": (
        self_forcing, stand_in.SelfForcing, dict(window=9, sink=3), {"retention.window": 9, "retention.sink": 3},
    ),
    "longlive": (longlive, stand_in.LongLive, dict(window=12, sink=3), {}),
    "longlive-infinite": (longlive, stand_in.LongLive, dict(window=12, sink=3, infinite=True), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_base_presets_change_nothing(weights, name):
    door, upstream, options, overrides = WINDOWS[name]
    pipeline = stand_in.pipeline(upstream, weights, batch=2, **options)
    theirs = render(pipeline, chunks=6, batch=2)
    with door.patch(pipeline, get_preset(name.partition(",")[0], overrides)):
        assert_equal(render(pipeline, chunks=6, batch=2), theirs)


@pytest.mark.parametrize("at", [6, 18], ids=["before the window is full", "after"])
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("name", ["longlive", "longlive-infinite"])
def test_a_prompt_switch_recaches_as_upstream_does(weights, name, keep_sink, at):
    options = {**WINDOWS[name][2], "name": INTERACTIVE}
    pipeline = stand_in.pipeline(stand_in.LongLive, weights, **options)
    pipeline.global_sink = keep_sink
    prompts = dict(text_prompts_list=[[1], [2]], switch_frame_indices=[at])
    theirs = render(pipeline, chunks=8, **prompts)
    longlive.patch(pipeline, get_preset(name, {"switch.keep_sink": keep_sink}))
    assert_equal(render(pipeline, chunks=8, **prompts), theirs)


@pytest.mark.parametrize("at", [6, 21], ids=["before the window is full", "after"])
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("window, sink", [(9, 0), (9, 3), (18, 0), (18, 3)])
def test_a_recache_follows_the_window(weights, window, sink, keep_sink, at):
    """In four layers: two hide a re-cache of too few frames."""
    pipeline = stand_in.pipeline(stand_in.LongLive, deepened(weights), name=INTERACTIVE, window=window, sink=sink)
    pipeline.global_sink = keep_sink
    prompts = dict(text_prompts_list=[[1], [2]], switch_frame_indices=[at])
    theirs = render(pipeline, chunks=9, **prompts)
    changes = {"retention.window": window, "retention.sink": sink, "switch.keep_sink": keep_sink}
    longlive.patch(pipeline, get_preset("longlive", changes))
    assert_equal(render(pipeline, chunks=9, **prompts), theirs)


def test_the_horizon_is_that_of_the_model(weights, forcing):
    live = stand_in.pipeline(stand_in.LongLive, weights, window=12, sink=3)
    assert longlive.patch(live, "flex").preset.position.train_len == 240
    assert self_forcing.patch(forcing, "flex").preset.position.train_len == 21
    longlive.unpatch(live)
    assert longlive.patch(live, get_preset("flex", {"position.train_len": 21})).preset.position.train_len == 21


SWITCHES = {
    "keep": ("flex", {}),
    "flush": ("infinity-rope", {}),
    "recache of less than the window": ("longlive", {"switch.recent": 6}),
    "and without the old sink": ("longlive", {"switch.recent": 6, "switch.keep_sink": False}),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_other_switches_follow_the_preset(weights, case):
    """Against our own engine, with the same weights, noise and prompts."""
    name, overrides = SWITCHES[case]
    chosen = get_preset(name, {"noise.kind": "ar1", "noise.apply": "initial+renoise", **overrides})
    pipeline = stand_in.pipeline(stand_in.LongLive, weights, name=INTERACTIVE, window=12, sink=3)
    pipeline.denoising_step_list = SCHEDULES["self-forcing"].timesteps()
    longlive.patch(pipeline, chosen, seed=5)
    ours = render(pipeline, chunks=6, text_prompts_list=[[1], [2]], switch_frame_indices=[9])
    session = engine_of(weights).session(prompt_of(pipeline, 1), preset=chosen, seed=5, size=SIZE)
    theirs = [session.step().latents for _ in range(3)]
    session.switch(prompt_of(pipeline, 2))
    assert_equal(ours, torch.cat(theirs + [session.step().latents for _ in range(3)], dim=1))


def engine_of(weights):
    model = CausalWan(CONFIGS["tiny"])
    model.load_state_dict(weights)
    return Engine(model.eval().requires_grad_(False), schedule=SCHEDULES["self-forcing"])


def prompt_of(pipeline, seed):
    return pipeline.text_encoder([seed])["prompt_embeds"]


@pytest.mark.parametrize("given", [0, 6], ids=["from noise", "from given latents"])
@pytest.mark.parametrize("schedule", ["static", "per_chunk"])
def test_flex_is_the_flex_of_the_engine(weights, forcing, schedule, given):
    """Past the window and past the training horizon, with antiphase noise everywhere and the length of the video."""
    chosen = get_preset(CORRELATED, {"position.scale_schedule": schedule})
    initial = torch.randn(1, given, 16, *SIZE) if given else None
    forcing.denoising_step_list = SCHEDULES["self-forcing"].timesteps()
    with self_forcing.patch(forcing, chosen, seed=5):
        ours = render(forcing, chunks=8, initial_latent=initial)
    session = engine_of(weights).session(
        prompt_of(forcing, 11), preset=chosen, seed=5, frames=24 + given, size=SIZE
    )  # fmt: skip
    if given:
        session.prefill(initial)
    assert_equal(ours[:, given:], torch.cat([chunk.latents for chunk in session], dim=1))


def test_more_frames_than_upstream_has_room_for(weights):
    pipeline = stand_in.pipeline(stand_in.SelfForcing, weights)  # local_attn_size -1: room for 21
    assert torch.isfinite(render(pipeline, chunks=7)).all()
    with pytest.raises(RuntimeError):
        render(pipeline, chunks=8)
    self_forcing.patch(pipeline)
    assert torch.isfinite(render(pipeline, chunks=8)).all()


def passes(pipeline, first, chunks=5):
    """Latents that the model makes of chunks from frame ``first`` on, called as upstream's demo calls it."""
    pipeline._initialize_kv_cache(1, torch.float32, torch.device("cpu"))
    pipeline._initialize_crossattn_cache(1, torch.float32, torch.device("cpu"))
    condition = pipeline.text_encoder([11])
    made = []
    for chunk, x in enumerate(noise_of(chunks).split(3, dim=1)):
        made += [pipeline.run(x, timestep, condition, first + 3 * chunk) for timestep in (1000, 0)]
    return torch.cat(made, dim=1)


def test_past_frame_1024(forcing):
    near = passes(forcing, 0)
    with pytest.raises(IndexError):
        passes(forcing, 1017)
    self_forcing.patch(forcing, get_preset("self-forcing", {"retention.window": 9}))
    forcing.generator.model.freqs.fill_(torch.nan)  # upstream's table
    for first in (1017, 10**9):
        assert_equal(passes(forcing, first), near)


class Counted(TorchDispatchMode):
    """Counts what upstream does to its cache: reads of single numbers, and copies of several chunks at once."""

    reads = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.reads += name == "_local_scalar_dense"
        self.copies += name in ("clone", "copy_", "cat", "index", "add", "mul") and out.numel() >= 6 * TOKENS * 256
        return out


def counts(pipeline):
    """Reads and copies in all self-attentions of one video."""
    counted = Counted()

    def watched(*args, inner):
        with counted:
            return inner(*args)

    attentions = [block.self_attn for block in pipeline.generator.model.blocks]
    before = [dict(vars(attn)) for attn in attentions]
    for attn in attentions:
        attn.forward = partial(watched, inner=attn.forward)
    render(pipeline, chunks=5)
    for attn, own in zip(attentions, before, strict=True):
        vars(attn).pop("forward")
        vars(attn).update(own)
    return counted.reads, counted.copies


@pytest.mark.parametrize(("door", "name"), [(self_forcing, "forcing"), (longlive, "live")])
def test_no_reads_from_the_device_and_no_copies_of_the_cache(request, door, name):
    pipeline = request.getfixturevalue(name)
    assert min(counts(pipeline)) > 0
    handle = door.patch(pipeline, get_preset("self-forcing", {"retention.window": 9}), backend="reference")
    in_place = (
        SimpleNamespace(  # the kernels read the pages where they are; on a CPU, each backend makes its own copies
            norm_rope_write=handle.backend.norm_rope_write, frame_attention=lambda query, *_: query
        )
    )
    handle.backend = in_place
    assert counts(pipeline) == (0, 0)


def test_upstreams_cache_takes_no_memory(forcing):
    self_forcing.patch(forcing)
    render(forcing, chunks=1)
    assert len(forcing.kv_cache1) == 2
    assert all(cache["k"].numel() == cache["v"].numel() == 0 for cache in forcing.kv_cache1)


@pytest.mark.parametrize("leave", ["unpatch", "handle", "with"])
def test_undone(forcing, leave):
    theirs = render(forcing)
    handle = self_forcing.patch(forcing, CORRELATED)
    assert (render(forcing) - theirs).abs().max() > 0.1
    if leave == "unpatch":
        self_forcing.unpatch(forcing)
    elif leave == "handle":
        handle.undo(), handle.undo()
    else:
        with handle:
            pass
    assert torch.equal(render(forcing), theirs)
    replaced = {"forward", "inference", "_initialize_kv_cache", "add_noise", self_forcing.HANDLE}
    assert not any(replaced & set(vars(module)) for module in (forcing, *forcing.modules(), forcing.scheduler))
    assert not forcing.generator.model._forward_pre_hooks
    self_forcing.patch(forcing)


def test_seeds(forcing):
    self_forcing.patch(forcing, CORRELATED, seed=1)
    assert torch.equal(render(forcing, seed=3), render(forcing, seed=4))
    assert torch.equal(render(forcing, chunks=1), render(forcing, chunks=1))
    self_forcing.unpatch(forcing)
    self_forcing.patch(forcing, CORRELATED)  # the script's seed decides
    first = render(forcing, seed=3)
    assert torch.equal(first, render(forcing, seed=3))
    assert not torch.equal(first, render(forcing, seed=4))


@pytest.mark.parametrize("alone", [False, True])
def test_noise_is_drawn_by_the_pipelines_chunks(forcing, alone):
    chosen = get_preset("self-forcing", {"noise.kind": "zero_sum", "retention.window": 9})
    handle = self_forcing.patch(forcing, chosen, seed=0)
    forcing.independent_first_frame = alone
    handle.begin(9)
    if alone:
        with pytest.raises(ValueError, match="at least 2 frames"):
            handle._initial(noise_of(3), 0)
    else:
        assert handle._initial(noise_of(3), 0).unflatten(1, (3, 3)).mean(2).abs().max() < 1e-6


def test_videos_follow_each_other(forcing):
    """A second one, of another batch, and one that the loop begins by itself at frame 0."""
    handle = self_forcing.patch(forcing, get_preset("self-forcing", {"retention.window": 9}))
    with pytest.raises(RuntimeError, match="has not computed any frame yet"):
        handle.window  # noqa: B018
    patched = "CausalInferencePipeline of Self-Forcing: preset 'self-forcing', backend 'sdpa'"
    assert repr(handle) == f"Patch({patched})"
    with torch.inference_mode():
        first = render(forcing)
    render(forcing, chunks=2, batch=2)
    assert torch.equal(render(forcing), first)
    handle.window.prepare(0, 1)
    assert handle.window.frames == range(1) and handle.window.cache.frames == [0]


def change(owner, name, value):
    def apply(pipeline):
        setattr(owner(pipeline), name, value)

    return apply


def rename(owner, name):
    def apply(pipeline):
        part = owner(pipeline)
        part.__class__ = type(name, (type(part),), {})

    return apply


def lengthen(pipeline):
    for block in pipeline.generator.model.blocks:
        longer = lambda self, x, seq_lens, updating_cache=False: x
        block.self_attn.__class__ = type("CausalWanSelfAttention", (nn.Module,), {"forward": longer})


WHOLE, MODEL = lambda p: p, lambda p: p.generator.model
ATTN = lambda p: p.generator.model.blocks[1].self_attn
UNKNOWN = {
    "another pipeline": (rename(WHOLE, "CausalDiffusionInferencePipeline"), "class must be CausalInferencePipeline"),
    "another model": (rename(MODEL, "WanModel"), "number of CausalWanModel in the generator must be 1, got 0"),
    "another attention": (rename(ATTN, "SageAttention"), "self_attn must be CausalWanSelfAttention, got SageAtt"),
    "another signature": (lengthen, r"got \('x', 'seq_lens', 'updating_cache'\); this upstream is not known"),
    "no norm": (change(ATTN, "norm_q", nn.Identity()), "must be WanRMSNorm, got Identity"),
    "another norm": (change(lambda p: ATTN(p).norm_k, "weight", nn.Parameter(torch.ones(128))), r"got \(128,\)"),
    "another eps": (change(lambda p: ATTN(p).norm_k, "eps", 1e-5), "eps must be 1e-06, got 1e-05"),
    "another width": (change(ATTN, "num_heads", 3), r"width of self_attn must be \(256, 256\), got \(256, 384\)"),
    "more blocks": (change(WHOLE, "num_transformer_blocks", 30), "number of blocks must be 30, got 2"),
    "pictures": (change(MODEL, "model_type", "i2v"), "model_type must be t2v, got i2v"),
    "no cache": (lambda p: delattr(p, "kv_cache1"), r"missing in the pipeline must be \[\], got \['kv_cache1'\]"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_upstream_is_refused(forcing, case):
    spoil, message = UNKNOWN[case]
    spoil(forcing)
    before = {name: dict(vars(module)) for name, module in forcing.named_modules()}
    with pytest.raises(ValueError, match=message):
        self_forcing.patch(forcing)
    assert before == {name: dict(vars(module)) for name, module in forcing.named_modules()}


def test_one_is_not_taken_for_the_other(forcing, live):
    with pytest.raises(ValueError, match="LongLive: the arguments of _initialize_kv_cache must be"):
        longlive.patch(forcing)
    with pytest.raises(ValueError, match="Self-Forcing: the arguments of _initialize_kv_cache must be"):
        self_forcing.patch(live)


def test_what_is_asked_for_is_checked_first(forcing):
    for options, message in [
        (dict(preset="flux"), "no preset 'flux'"),
        (dict(seed=-1), "seed must be a whole number"),
        (dict(backend="flush-attn"), "backend 'flush-attn' is not there"),
        (dict(preset=get_preset("self-forcing", {"retention.window": 2})), "window must hold"),
        (dict(preset=get_preset("flex", {"position.table": (1.0,)})), "table must hold 22 multipliers"),
    ]:
        with pytest.raises(ValueError, match=message):
            self_forcing.patch(forcing, **options)
    self_forcing.patch(forcing)
    with pytest.raises(ValueError, match="patched already"):
        self_forcing.patch(forcing)
    self_forcing.unpatch(forcing)
    with pytest.raises(ValueError, match="an unpatched CausalInferencePipeline"):
        self_forcing.unpatch(forcing)


def test_a_loop_that_skips_frames_is_refused(forcing):
    self_forcing.patch(forcing, get_preset("self-forcing", {"retention.window": 9}))
    passes(forcing, 0, chunks=2)
    x, condition = noise_of(1), forcing.text_encoder([11])
    with pytest.raises(ValueError, match=r"frames must be \[3, 4, 5\] again, or follow them from 6 on, got \[9"):
        forcing.run(x, 0, condition, 9)
    with pytest.raises(ValueError, match="must stay"):
        forcing.run(torch.cat([x, x]), 0, {"prompt_embeds": condition["prompt_embeds"].repeat(2, 1, 1)}, 6)
    forcing.frame_seq_length = 1560
    with pytest.raises(ValueError, match="4x6 has 6 tokens, the pipeline's frame_seq_length is 1560"):
        forcing.run(x, 0, condition, 6)
    forcing.frame_seq_length = 6
    forcing.generator.requires_grad_(True)
    with pytest.raises(ValueError, match="run it under torch.no_grad"):
        forcing.run(x, 0, condition, 6)
    forcing.requires_grad_(False).to(torch.bfloat16)
    with pytest.raises(ValueError, match="the model must stay .*float32.*: patch it last"):
        forcing.run(x, 0, condition, 6)


def test_iid_noise_is_left_to_upstream(forcing):
    self_forcing.patch(forcing, get_preset("self-forcing", {"retention.window": 9}))
    state = torch.get_rng_state()
    forcing.denoising_step_list = [1000.0]
    forcing.inference(noise=noise_of(1), text_prompts=[11])
    assert torch.equal(torch.get_rng_state(), state)
