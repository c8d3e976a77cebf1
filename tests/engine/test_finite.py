"""Values that are not finite are an error that says where they began, and cost no synchronisation."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flexkern
from flexkern.engine import Engine
from flexkern.finite import Flags, NotFiniteError, all_finite, first_not_finite, validate_finite
from flexkern.model.decoder import ChunkDecoder
from flexkern.model.wan import CONFIGS, CausalWan

DATA = Path(__file__).parent.parent / "data"
SIZE = (4, 6)


@pytest.fixture
def model():
    model = CausalWan(CONFIGS["tiny"])
    model.load_state_dict(load_file(DATA / "tiny_wan.safetensors"))
    return model.eval().requires_grad_(False)


def prompt():
    return torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(1))


def begin(model, **options):
    return Engine(model, size=SIZE, **options).session(prompt(), preset="self-forcing")


def spoil(module, value=math.inf):
    """From now on the module makes this value in one place."""

    def hook(module, args, out):
        out = out.clone()
        out.view(-1)[7] = value
        return out

    return module.register_forward_hook(hook)


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: nothing is known before somebody waits for it."""
    monkeypatch.setattr(Flags, "known", lambda flags: False)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.1.ffn.2", "in blocks.1.ffn.2"),
        ("blocks.0.self_attn.o", "in blocks.0.self_attn.o"),
        ("time_projection.1", "in time_projection.1"),
        ("head.head", "in head.head"),
    ],
)
def test_the_layer_and_the_step_are_named(model, name, told, value):
    session = begin(model)
    session.step()
    calls = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda *_: calls.append(1))
    module.register_forward_hook(lambda _, args, out: out + value if len(calls) >= 3 else None)
    with pytest.raises(NotFiniteError) as raised:
        session.step()
    error = raised.value
    # run again, the hook spoils the first step already: what was found is true of that run
    assert (error.chunk, error.step, error.layer, error.dtype) == (1, 0, name, torch.float32)
    assert f"the latents of chunk 1 are not finite in float32: they began {told} in denoising step 1 of 4" in str(error)
    assert "timestep 1000" in str(error) and "try without the LoRA, or other weights" in str(error)


def test_a_step_after_the_first_is_named(model):
    """What the model makes of small timesteps only is found where it happens."""
    embed = model.embed_time
    model.embed_time = lambda t: embed(t / 0 * 0 if 700 < float(t[0, 0]) < 900 else t)
    with pytest.raises(NotFiniteError, match=r"step 3 of 4 \(timestep 833.333\)") as raised:
        begin(model).step()
    assert raised.value.step == 2


def test_values_that_no_module_made_are_found_before_the_next_one(model):
    session = begin(model)
    session.step()
    session.cache.values[1][:, session.cache.slots] = math.inf  # of frames that are seen, by layer 1 alone
    with pytest.raises(NotFiniteError, match=r"began before blocks.1.self_attn.o in denoising step 1"):
        session.step()


def test_float16_that_overflows_says_what_to_try(model):
    with torch.no_grad():
        model.half().blocks[1].ffn[0].weight.mul_(1000), model.blocks[1].ffn[2].weight.mul_(1000)
    with pytest.raises(NotFiniteError, match="not finite in float16: .*try bfloat16 or float32") as raised:
        begin(model).step()
    assert raised.value.layer.startswith("blocks.1.ffn") and raised.value.dtype == torch.float16


def test_a_model_without_modules_tells_the_step(model):
    class Plain:
        config, dtype, device = model.config, torch.float32, torch.device("cpu")
        grid, text_keys = staticmethod(model.grid), staticmethod(model.text_keys)
        __slots__ = ()

        def __call__(self, latents, timesteps, text, memory, *, keys_only=False):
            out = model(latents, timesteps, text, memory, keys_only=keys_only)
            return out if keys_only or timesteps[0, 0] > 700 else out * math.nan

    with pytest.raises(NotFiniteError, match="began in the model in denoising step 4 of 4") as raised:
        begin(Plain()).step()
    assert (raised.value.step, raised.value.layer) == (3, None)


def test_the_model_of_diffusers_is_looked_into():
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    from flexkern.integrations.diffusers import causal

    sizes = dict(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2)
    transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, **sizes).eval()
    spoil(transformer.blocks[1].ffn.net[0])
    session = causal(transformer, size=SIZE).session(torch.randn(1, 7, 16), preset="self-forcing")
    with pytest.raises(NotFiniteError) as raised:
        session.step()
    assert raised.value.layer.startswith("blocks.1.ffn.net.0")


class Noise:
    """Noise of one's own with one bad value, in the draw of a step (0: the first)."""

    def __init__(self, bad):
        self.bad, self.drawn = bad, 0

    def initial(self, frames):
        noise = torch.randn(1, len(frames), 16, *SIZE)
        noise[0, 0, 0, 0, 0] = math.nan if self.drawn == self.bad else 0
        self.drawn += 1
        return noise

    def renoise(self, frames, step):
        return self.initial(frames)


@pytest.mark.parametrize("bad", [0, 2])
def test_noise_of_ones_own_is_named(model, bad):
    session = Engine(model, size=SIZE).session(prompt(), preset="self-forcing", noise=Noise(bad))
    with pytest.raises(NotFiniteError, match=f"in the noise before denoising step {bad + 1}") as raised:
        session.step()
    assert raised.value.step == bad


class Decoder(ChunkDecoder):
    """Pictures of the latents' first channels; not finite for the first frame of a chunk."""

    def __init__(self, bad):
        super().__init__(channels=16, spatial=1, temporal=1, dtype=torch.float16, device=torch.device("cpu"))
        self.bad = bad

    def state(self):
        return {}

    def restore(self, state):
        pass

    def _past(self):
        return None

    def _pictures(self, frames, *, first):
        for i, frame in enumerate(frames.movedim(2, -1).unbind(1)):
            yield frame[:, None, ..., :3] * (self.bad if first and i == 0 else 1)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_pictures_are_looked_at_before_rounding_hides_it(model, bad):
    assert begin(model, decoder=lambda: Decoder(0.5)).step().pixels is not None
    with pytest.raises(NotFiniteError, match="pictures of chunk 0 are not finite in float16: .*decoder") as raised:
        begin(model, decoder=lambda: Decoder(bad)).step()
    assert raised.value.layer == "decoder"


def test_where_nothing_waits_the_next_chunks_tell(model, late, monkeypatch):
    session = begin(model)
    spoil(model.blocks[0].ffn[2])
    session.step()
    session.step()  # not known yet
    with pytest.raises(NotFiniteError, match="the latents of chunk 0 are not finite in float32;"):
        session.validate_chunks()
    for later in (session.step, session.state, lambda: session.switch(prompt()), lambda: next(iter(session))):
        with pytest.raises(NotFiniteError, match="chunk 0"):  # it stays so
            later()


def test_waiting_at_once_tells_the_layer_on_a_gpu_too(model, late):
    session = begin(model)
    session.step()
    session.validate_chunks()
    spoil(model.blocks[0].ffn[2])
    session.step()
    with pytest.raises(NotFiniteError, match=r"chunk 1 .*began in blocks.0.ffn.2 in denoising step 1"):
        session.validate_chunks()


def test_iteration_ends_with_a_check(model, late):
    spoil(model.blocks[0].ffn[2])
    session = Engine(model, size=SIZE).session(prompt(), preset="self-forcing", frames=3)
    chunks = iter(session)
    assert next(chunks).index == 0
    with pytest.raises(NotFiniteError):
        next(chunks)


def test_a_good_chunk_is_run_once_and_nothing_of_it_is_kept(model):
    session = begin(model)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    session.step()
    assert len(forwards) == 5  # four steps and the clean pass
    assert not session._watch._made and not model.blocks[0].ffn[2]._forward_hooks


def test_a_restored_session_forgets_what_was_bad(model):
    session = begin(model)
    session.step()
    state = session.state()
    hook = spoil(model.head.head)
    with pytest.raises(NotFiniteError):
        session.step()
    hook.remove()
    session.restore(state)
    assert session.step().latents.isfinite().all()


def test_what_is_given_is_looked_at(model):
    engine = Engine(model, size=SIZE, encoder=lambda pixels: torch.full((1, 3, 16, *SIZE), math.nan))
    session = engine.session(prompt(), preset="self-forcing")
    given = torch.zeros(1, 3, 16, *SIZE)
    given[0, 2, 3, 1, 1] = -math.inf
    with pytest.raises(NotFiniteError, match="given latents are not finite in float32; .* look at what made it$"):
        session.prefill(given)
    with pytest.raises(
        NotFiniteError, match="the given pictures are .*; the encoder made them: its weights may be damaged"
    ):
        session.prefill(torch.zeros(1, 3, 8, 8, 3, dtype=torch.uint8))
    assert session.next_frame == 0
    embedding = prompt()
    embedding[0, 3, 3] = math.nan
    for use in (engine.session, session.switch):
        with pytest.raises(NotFiniteError, match="the embedding is not finite in float32; .* look at what made it$"):
            use(embedding)
    named = Engine(model, size=SIZE, text_encoder=lambda prompts: embedding)
    for use in (named.encode, named.session):
        with pytest.raises(
            NotFiniteError, match="the embedding of 'a cat' is not finite in float32; the text encoder's"
        ):
            use("a cat")


def test_a_prompt_that_overflows_in_the_model_names_the_layer(model):
    model.blocks[1].cross_attn.v.weight.data.fill_(math.inf)
    with pytest.raises(NotFiniteError, match="what the model reads of the prompt is not .*began in layer 1") as raised:
        begin(model)
    assert raised.value.layer == "blocks.1" and isinstance(raised.value, ValueError)


def test_the_helpers():
    assert flexkern.NotFiniteError is NotFiniteError
    assert all_finite(torch.ones(3), torch.arange(3)) and not all_finite(torch.ones(2), torch.tensor([0, math.nan]))
    assert all_finite(torch.zeros(0)) and all_finite()
    validate_finite("x", torch.tensor(65504.0).half())
    with pytest.raises(NotFiniteError, match="x is not finite in float16; float16 ends at 65504"):
        validate_finite("x", torch.tensor(65504.0).half() * 2)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    run = lambda scale: net[1](net[0](torch.ones(2)) * scale)
    assert first_not_finite(net, lambda: run(1))[1] is None
    assert str(first_not_finite(net, lambda: run(math.inf))[1]) == "before 1"
