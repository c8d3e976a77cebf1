"""diffusers' transformer with what else may be done to it: torch.compile, and sessions in several threads."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from flexkern.integrations.diffusers import causal, patch
from flexkern.policies import get_preset

SIZE = (6, 8)


@pytest.fixture
def transformer():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=96, num_layers=1,
    ).eval()  # fmt: skip


def test_a_compiled_forward_has_the_positions_of_the_host(transformer):
    """Long clips, at a preset that slows all bands: what torch would make of NumPy's angles is another number."""
    torch._dynamo.reset()
    given = torch.randn(1, 4, 40, 2, 2), torch.tensor([500.0]), torch.randn(1, 7, 16)
    seen = []
    real = type(get_preset("pi").position).phases

    def phases(self, **where):
        seen.append(torch.compiler.is_compiling())
        return real(self, **where)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patching, patch(transformer, "pi"):
        patching.setattr(type(get_preset("pi").position), "phases", phases)
        made = torch.compile(transformer, backend="eager")(*given, return_dict=False)[0]
        transformer.rope.memory.plans.clear()
        assert made.equal(transformer(*given, return_dict=False)[0])
    assert seen == [False, False]


def test_threads_take_turns_with_one_transformer(transformer):
    """Each forward puts its own memory into the transformer; two at once would leave it patched for good."""
    rope, prompts = type(transformer.rope).__name__, torch.randn(2, 1, 7, 16)
    engines = [causal(transformer, size=SIZE) for _ in prompts]  # an engine each, of one transformer

    def film(b):
        return [chunk.latents for chunk in engines[b].session(prompts[b], preset="pi", seed=b, frames=6)]

    alone, both_inside = [film(b) for b in range(2)], Barrier(2)

    def meet(*_):
        with suppress(BrokenBarrierError):  # broken once nobody else came in
            both_inside.wait(0.3)

    handle = transformer.patch_embedding.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        films = list(threads.map(film, range(2)))
    handle.remove()
    assert both_inside.broken
    for made, expected in zip(films, alone, strict=True):
        assert all(a.equal(b) for a, b in zip(made, expected, strict=True))
    assert type(transformer.rope).__name__ == rope
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in transformer.blocks)
