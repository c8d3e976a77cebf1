"""The door to diffusers: its transformer with our attention, against its own processor and against our transformer."""

import contextlib
import io
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flexkern.engine import Engine
from flexkern.model.weights import load_transformer
from flexkern.policies import get_preset
from flexkern.testing import assert_as_accurate

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from flexkern.integrations.diffusers import causal, patch, unpatch

SIZE = (6, 8)
TINY = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
    ffn_dim=96, num_layers=2,
)  # fmt: skip


def make(**changes):
    """A transformer with random weights whose self-attention matters and looks far into the bands."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(**{**TINY, **changes}).eval()
    for block in model.blocks:
        block.attn1.norm_q.weight.data.uniform_(1, 4)
        block.attn1.norm_k.weight.data.uniform_(1, 2)
        block.attn1.to_v.weight.data.mul_(2)
    return model


@pytest.fixture(scope="module")
def shared():
    return make()


@pytest.fixture
def model(shared):
    yield shared
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in shared.blocks)
    assert type(shared.rope).__name__ == "WanRotaryPosEmbed"


def inputs(batch=2, frames=5, size=SIZE, channels=4):
    return torch.randn(batch, channels, frames, *size), torch.rand(batch) * 1000, torch.randn(batch, 7, 16)


def run(model, latents, timestep, text):
    with torch.no_grad():
        return model(latents, timestep, text, return_dict=False)[0]


def furthest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=pytest.mark.triton(3, 4))])
def test_the_base_preset_is_the_transformer_as_it_was(backend, device):
    model, given = make().to(device), [x.to(device) for x in inputs(2, 3, (2, 4))]
    own = run(model, *given)
    with patch(model, "self-forcing", backend=backend):
        ours = run(model, *given)
    assert own.abs().max() > 1
    assert furthest(ours, own) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, (2, 2)), (1, 23, (2, 4)), (3, 4, (10, 2))], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_parity_at_other_shapes(shape, head_dim):
    model, given = make(attention_head_dim=head_dim, num_layers=1), inputs(*shape)
    own = run(model, *given)
    with patch(model, "self-forcing"):
        assert furthest(run(model, *given), own) < 1e-5


def test_parity_with_a_timestep_for_every_token(model):
    latents, _, text = inputs()
    given = latents, torch.rand(2, 5 * 12) * 1000, text
    own = run(model, *given)
    with patch(model, "self-forcing"):
        assert furthest(run(model, *given), own) < 1e-5


def test_in_bfloat16_it_is_as_accurate_as_its_own_processor():
    model, given = make(), [x.bfloat16() for x in inputs()]
    exact = run(make().double(), *(x.double() for x in given))
    model = model.bfloat16()
    own = run(model, *given)
    with patch(model, "self-forcing"):
        assert_as_accurate(run(model, *given), exact, own, mean=1.2)


def retimed(name, bands, frames, train_len):
    """Temporal frequencies of the published methods, written out."""
    dim, s = 2 * bands, frames / train_len
    theta = [10000.0 ** (-2 * j / dim) for j in range(bands)]
    if name == "pi":
        return [t / s for t in theta]
    if name == "ntk":
        return [(10000.0 * s ** (dim / (dim - 2))) ** (-2 * j / dim) for j in range(bands)]
    nearest = min(range(bands), key=lambda j: abs(2 * math.pi / theta[j] - train_len))
    return [0.9 * 2 * math.pi / frames if j == nearest else t for j, t in enumerate(theta)]


@pytest.mark.parametrize("name", ["riflex", "pi", "ntk"])
def test_presets_are_their_papers_in_its_own_processor(name):
    """diffusers' processor with the temporal columns of its table made anew gives what the preset gives."""
    model, frames, train_len = make(), 12, 5
    given = inputs(1, frames)
    own = run(model, *given)
    chosen = get_preset(name, {"position.train_len": train_len})
    with patch(model, chosen):
        ours = run(model, *given)
    bands = model.rope.t_dim // 2
    theta = torch.tensor(retimed(name, bands, frames, train_len), dtype=torch.float64)
    angle = torch.arange(frames)[:, None] * theta.repeat_interleave(2)
    model.rope.freqs_cos[:frames, : 2 * bands] = angle.cos()
    model.rope.freqs_sin[:frames, : 2 * bands] = angle.sin()
    assert furthest(ours, run(model, *given)) < 1e-5
    assert furthest(ours, own) > 1e-3


@pytest.mark.parametrize("name", ["riflex", "pi", "ntk", "yarn", "flex"])
def test_presets_act_beyond_the_training_length_only(model, name):
    short, long = inputs(1, 21, (2, 2)), inputs(1, 42, (2, 2))
    own_short, own_long = run(model, *short), run(model, *long)
    with patch(model, name):
        assert furthest(run(model, *short), own_short) < 1e-5
        assert furthest(run(model, *long), own_long) > 1e-3


def test_a_static_scale_follows_the_length_of_the_clip(model):
    given, outputs = inputs(1, 12), []
    for schedule in ("static", "per_chunk"):
        with patch(model, get_preset("pi", {"position.train_len": 5, "position.scale_schedule": schedule})):
            outputs.append(run(model, *given))
    assert torch.equal(*outputs)


def test_fused_projections():
    model, given = make(), inputs()
    own = run(model, *given)
    model.fuse_qkv_projections()
    with patch(model, "self-forcing"):
        assert furthest(run(model, *given), own) < 1e-5


def test_a_pipeline_runs_with_it(model):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
                           latents_std=[1.0] * 4)  # fmt: skip
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 1, 7, 16)

    def make_clip():
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], height=48, width=64, num_frames=97,
            num_inference_steps=2, guidance_scale=4.0, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    own = make_clip()
    with patch(pipe.transformer, "self-forcing"):
        assert furthest(make_clip(), own) < 1e-4
    with patch(pipe.transformer, "riflex"):
        assert furthest(make_clip(), own) > 1e-4
    assert torch.equal(make_clip(), own)


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    shared.save_pretrained(folder)
    return load_transformer(folder, dtype=torch.float32)


def both_sessions(model, converted, prompt, **options):
    return causal(model, size=SIZE).session(prompt, **options), Engine(converted, size=SIZE).session(prompt, **options)


def assert_same_steps(sessions, chunks):
    for _ in range(chunks):
        theirs, ours = (session.step() for session in sessions)
        assert theirs.frames == ours.frames
        assert ours.latents.abs().max() > 1
        assert furthest(theirs.latents, ours.latents) < 1e-4


@pytest.mark.parametrize("name", ["flex", "self-forcing", "longlive", "lol", "yarn", "memrope", "deep-forcing"])
def test_the_causal_loop_equals_our_transformer(model, converted, name):
    sessions = both_sessions(model, converted, torch.randn(1, 7, 16), preset=name)
    assert_same_steps(sessions, 9)
    assert sessions[0].next_frame > get_preset(name).retention.window


def test_the_causal_loop_prefills_switches_cuts_and_batches(model, converted):
    text, given = torch.randn(2, 2, 7, 16), torch.randn(2, 6, 4, *SIZE)
    for name, change in (
        ("longlive", lambda session: session.switch(text[1])),
        ("infinity-rope", lambda session: (session.switch(text[1]), session.cut())),
    ):
        sessions = both_sessions(model, converted, text[0], preset=name, seed=3)
        for session in sessions:
            session.prefill(given)
        assert_same_steps(sessions, 3)
        for session in sessions:
            change(session)
        assert_same_steps(sessions, 2)


def test_every_frame_has_its_own_timestep(model, converted):
    text, latents, timesteps = torch.randn(2, 7, 16), torch.randn(2, 3, 4, *SIZE), torch.rand(2, 3) * 1000
    outputs = []
    for session in both_sessions(model, converted, text):
        forward, memory = session.engine.model, session._prepare([0, 1, 2])
        with torch.inference_mode():
            outputs.append(forward(latents, timesteps, session.text, memory))
            assert forward(latents, timesteps, session.text, memory, keys_only=True) is None
    assert furthest(*outputs) < 1e-4
    assert furthest(outputs[0], latents) > 1e-1


def test_one_chunk_of_everything_is_the_bidirectional_forward(model):
    latents, timestep, text = inputs(2, 6)
    session = causal(model, size=SIZE, chunk=6).session(text, preset="self-forcing")
    with torch.inference_mode():
        memory = session._prepare(list(range(6)))
        out = session.engine.model(latents.transpose(1, 2), timestep[:, None].expand(2, 6), session.text, memory)
    assert furthest(out.transpose(1, 2), run(model, latents, timestep, text)) < 1e-5


def test_undo_is_exact_and_ordered(model):
    given = inputs()
    own, names = run(model, *given), list(model.state_dict())
    rope, processors = model.rope, model.attn_processors
    outer = patch(model, "riflex")
    assert list(model.state_dict()) == names
    outer.undo()
    outer.undo()
    assert model.rope is rope and model.attn_processors == processors
    assert torch.equal(run(model, *given), own)
    engine = causal(model, size=SIZE)
    with patch(model, "riflex") as inner:
        patched = run(model, *given)
        within = engine.session(given[2]).step()
        assert torch.equal(run(model, *given), patched)
        with pytest.raises(ValueError, match="patched already"):
            patch(model, "pi")
    assert inner.transformer.rope is rope
    assert torch.equal(engine.session(given[2]).step().latents, within.latents)


def test_unpatch_takes_the_last_patch_back(model):
    given, clip = inputs(), get_preset("flex", {"position.train_len": 2})
    own = run(model, *given)
    patch(model, clip)
    assert furthest(run(model, *given), own) > 1e-3
    unpatch(model)
    assert torch.equal(run(model, *given), own)
    with pytest.raises(ValueError, match="that patch was called with, got an unpatched WanTransformer3DModel$"):
        unpatch(model)
    handle = patch(model, clip)
    unpatch(model)
    handle.undo()  # has nothing left to do
    with patch(model, clip):
        unpatch(model)
    with pytest.raises(ValueError, match="got an unpatched SimpleNamespace; pass its .transformer"):
        unpatch(SimpleNamespace(transformer=model))


def test_an_error_in_a_causal_step_leaves_the_transformer_as_it_was(model, monkeypatch):
    rope, processors = model.rope, model.attn_processors
    session = causal(model, size=SIZE).session(torch.randn(1, 7, 16))
    monkeypatch.setattr(model.proj_out, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step()
    assert model.rope is rope and model.attn_processors == processors


def other_rope(model):
    model.rope = type(model.rope)(32, (1, 2, 2), 1024, theta=500.0)


def custom_processor(model):
    model.blocks[1].attn1.set_processor(type("Mine", (WanAttnProcessor,), {})())


def spread(model):
    model.hf_device_map = {"blocks.0": 0, "blocks.1": 1}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (other_rope, NotImplementedError, "rope is not Wan's"),
        (lambda model: setattr(model, "rope", nn.Identity()), NotImplementedError, "rope is not Wan's: Identity"),
        (custom_processor, TypeError, r"blocks\.1\.attn1: expected .*, got WanAttention with Mine"),
        (lambda model: setattr(model.blocks[0], "attn1", nn.Identity()), TypeError, "got Identity with NoneType"),
        (spread, NotImplementedError, "spread over devices"),
        (lambda model: setattr(model, "_parallel_config", object()), NotImplementedError, "spread over devices"),
    ],
)
def test_a_changed_transformer_is_refused(change, error, words):
    model = make()
    change(model)
    for door in (patch, causal):
        with pytest.raises(error, match=words):
            door(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_dim=8, added_kv_proj_dim=64), "takes images"),
        (dict(in_channels=9), "takes images"),
        (dict(patch_size=(2, 2, 2)), "patch_size must be"),
        (dict(cross_attn_norm=False), "cross_attn_norm=True"),
    ],
)
def test_other_wans_are_refused(changes, words):
    with pytest.raises((NotImplementedError, ValueError), match=words):
        patch(make(**changes))


def test_other_objects_are_refused(model):
    from diffusers import WanVACETransformer3DModel

    vace = WanVACETransformer3DModel(**{**TINY, "vace_layers": [0], "vace_in_channels": 4})
    for wrong in (nn.Linear(2, 2), vace, torch.compile(model)):
        with pytest.raises(TypeError, match="WanTransformer3DModel itself"):
            patch(wrong)
    pipe = type("Pipe", (), {"transformer": model})()
    with pytest.raises(TypeError, match="got Pipe; pass its .transformer"):
        causal(pipe)


def test_without_diffusers_the_error_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    with pytest.raises(ImportError, match=r'pip install "flexkern\[model\]"'):
        patch(model)


def test_wrong_use_is_refused(model):
    latents, timestep, text = inputs()
    with pytest.raises(ValueError, match="no preset 'reflex'.*'riflex'"):
        patch(model, "reflex")
    with pytest.raises(ValueError, match="no backend has that name"):
        patch(model, backend="fast")
    with patch(model), pytest.raises(RuntimeError, match="no_grad"):
        model(latents, timestep, text)
    with patch(model):
        processor = model.blocks[0].attn1.processor
    with pytest.raises(TypeError, match="patched WanTransformer3DModel"):
        processor(model.blocks[0].attn1, text)
    with pytest.raises(ValueError, match=r"text must be \[B, L, 16\], got \[2, 7, 5\]"):
        causal(model, size=SIZE).session(text[..., :5])


def test_what_the_causal_loop_cannot_see_through_is_refused():
    from diffusers import FirstBlockCacheConfig

    model = make()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(NotImplementedError, match="disable_cache"):
        causal(model)
    model = make()
    model._hf_hook = object()
    with pytest.raises(NotImplementedError, match="offloaded by accelerate"):
        causal(model)


def test_the_page_for_users_of_diffusers_prints_what_it_says():
    page = Path(__file__).parent.parent.parent / "flexkern" / "docs" / "diffusers.md"
    names = {}
    for code, expected in re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(), re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == expected
