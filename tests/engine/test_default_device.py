"""torch.set_default_device, as scripts call it: nothing that is the host's, or the model's, goes elsewhere.

The default is meta here, where a value that went astray cannot be read back; scripts have cuda.
"""

import pytest
import torch
from both_loops import SIZE, prompt_of

import flexkern
from flexkern.engine import Engine
from flexkern.finite import all_finite

F, S, H, D = 3, 6, 2, 64


@pytest.fixture
def elsewhere():
    """Another default device, in calls of what it gives."""

    def call(function):
        with torch.device("meta"):
            return function()

    return call


def test_attention_stays_where_its_tensors_are(elsewhere):
    query, key, value = torch.randn(3, 1, F * S, H, D).unbind()
    pages = [x.unflatten(1, (F, S)) for x in (query, key, value)]
    placed = dict(query_frames=range(F), key_frames=range(F), pairs="interleaved", is_causal=True)

    def paged():
        turn, logit_scale = flexkern.frame_turns([2], range(F), head_dim=D)
        return flexkern.paged_attention(pages[0][:, 2:], *pages[1:], [2, 0, 1], turn, logit_scale)

    calls = (
        lambda: flexkern.attention(query, key, value, **placed),
        lambda: flexkern.attention(query, key, value, tokens=S),
        lambda: flexkern.turn_place(query, 2, 3, pairs="split"),
        paged,
    )
    for call in calls:
        assert elsewhere(call).equal(call())


@pytest.mark.parametrize("preset", ["flex", "longlive", "infinity-rope"])
def test_a_session_stays_where_its_model_is(model, elsewhere, preset):
    first, second, given = prompt_of(1), prompt_of(2), torch.randn(1, 3, 16, *SIZE)

    def film():
        engine = Engine(model, size=SIZE)
        session = engine.session(first, preset=preset)
        made = [session.step().latents for _ in range(5)]
        session.switch(second)
        made.append(session.step().latents)
        session.prefill(given)
        resumed = engine.session(first, preset=preset)
        resumed.restore(session.state())
        return torch.cat([*made, resumed.step().latents], dim=1)

    assert elsewhere(film).equal(film())


def test_a_decoder_stays_where_it_is(elsewhere):
    pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
    from diffusers import AutoencoderKLWan

    vae, latents = AutoencoderKLWan(base_dim=8).eval(), torch.randn(1, 3, 16, 2, 3)
    film = lambda: flexkern.WanDecoder.from_module(vae)(latents)
    assert elsewhere(film).equal(film())


def test_diffusers_transformer_is_patched_where_it_is(elsewhere):
    pytest.importorskip("diffusers", reason='needs pip install "flexkern[model]"')
    from diffusers import WanTransformer3DModel

    from flexkern.integrations.diffusers import patch

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=96, num_layers=1,
    ).eval()  # fmt: skip
    given = torch.randn(1, 4, 3, 2, 2), torch.tensor([500.0]), torch.randn(1, 7, 16)

    def film():
        handle = patch(transformer, "pi")
        with torch.no_grad(), torch.device("cpu"):  # what diffusers makes itself follows the default
            made = transformer(*given, return_dict=False)[0]
        handle.undo()
        return made

    assert elsewhere(film).equal(film())


def test_what_holds_no_numbers_is_finite_there(elsewhere):
    integers = torch.zeros(2, dtype=torch.int64)
    assert elsewhere(lambda: all_finite(integers)).item()
