"""What a session gives are ordinary tensors, which user code may change, keep and train on."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from both_loops import SIZE, prompt_of

from flexkern.engine import Engine
from flexkern.model.wan import CausalWan

DATA = Path(__file__).parent.parent / "data"


class InInferenceMode:
    """An encoder, a decoder and a text encoder of one's own, each of which runs in inference mode."""

    @torch.inference_mode()
    def __call__(self, given):
        if isinstance(given, list):
            return prompt_of(1) + 0
        return torch.randn(1, 3, 16, *SIZE) if given.dtype == torch.uint8 else (given[:, :, :3] * 9).to(torch.uint8)

    @torch.inference_mode()
    def state(self):
        return {"seen": torch.ones(3)}

    def restore(self, state):
        assert state["seen"].sum() == 3


def is_ordinary(tensor):
    """Whether code outside of inference mode may change it in place, keep it and train on it."""
    weight = torch.ones(1, requires_grad=True)
    (tensor.float() * weight).sum().backward()
    tensor.add_(1)
    return not tensor.is_inference() and not tensor.requires_grad and weight.grad is not None


@pytest.mark.parametrize("prediction", ["flow", "x0"])
@pytest.mark.parametrize("around", [nullcontext, torch.inference_mode], ids=["outside", "in inference mode"])
def test_what_a_session_gives_is_ordinary(model, around, prediction):
    other = CausalWan(replace(model.config, prediction=prediction))
    other.load_state_dict(model.state_dict())
    own = InInferenceMode()
    options = dict(size=SIZE, text_encoder=own, encoder=own, decoder=lambda: own)
    with around():
        engine = Engine(other.requires_grad_(False), **options)
        session = engine.session("a red disc", preset="longlive")
        chunks = [session.prefill(torch.zeros(1, 9, 8, 8, 3, dtype=torch.uint8)), session.step(), session.step()]
        given = session.prefill(torch.randn(1, 3, 16, *SIZE))
        embedded, state = engine.embed("a red disc"), session.state()
    assert all(is_ordinary(chunk.latents) and is_ordinary(chunk.pixels) for chunk in chunks)
    assert is_ordinary(embedded) and is_ordinary(given.latents)
    assert not any(isinstance(value, torch.Tensor) and value.is_inference() for value in state.values())


def test_a_session_goes_on_whatever_becomes_of_what_it_gave(engine):
    """Latents changed in place, steps in and outside of inference mode, a change of prompt that needs them again."""
    videos = []
    for spoil in (False, True):
        session, made = engine.session(prompt_of(1), preset="longlive"), []
        for n in range(6):
            with torch.inference_mode() if spoil and n % 2 else nullcontext():
                made.append(session.step().latents.clone())
                if n == 3:
                    session.switch(prompt_of(2))
                chunk = session.step()
            made.append(chunk.latents.clone())
            if spoil:
                chunk.latents.fill_(torch.nan)
        videos.append(torch.cat(made, dim=1))
    assert torch.equal(*videos)


def test_latents_are_not_copied_on_the_way_out(engine):
    session = engine.session(prompt_of(1), preset="self-forcing")
    given = torch.randn(1, 3, 16, *SIZE)
    assert session.prefill(given).latents is given
