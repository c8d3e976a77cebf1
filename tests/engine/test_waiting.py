"""No step of a session waits for the device: on the CPU by counting what would, on a GPU by torch's own word."""

from dataclasses import fields

import pytest
import recorder
import torch
from both_loops import SIZE, prompt_of
from recorder import Waits

from flexkern.engine import Engine
from flexkern.finite import Flags
from flexkern.model.wan import CONFIGS, CausalWan
from flexkern.plan import PlanBuffers
from flexkern.policies import get_preset

PRESET = get_preset("flex", {"retention.window": 6})


@pytest.fixture
def session(model, monkeypatch):
    monkeypatch.setattr(Flags, "known", lambda flags: False)  # as on a GPU: not known before somebody waits
    engine = Engine(model, size=SIZE, decoder=lambda: lambda latents: (latents[:, :, :3] * 9).to(torch.uint8))
    engine.backend = recorder
    session = engine.session(prompt_of(1), preset=PRESET)
    session.step()
    return session


def watched(session, run):
    """What waits in the call, as if weights, pages, plans and prompt lay on a GPU."""
    text = [tensor for layer in session.text for tensor in layer]
    buffers = session.window.buffers
    with Waits(*session.engine.model.parameters(), session.cache.keys, session.cache.values, *text) as waits:

        def hold(plan):
            held = PlanBuffers.hold(buffers, plan)
            waits.lie_there(*(tensor for f in fields(held) if (tensor := getattr(held, f.name)) is not None))
            return held

        buffers.hold = hold
        made = run()
    del buffers.hold
    return made, waits


def test_nothing_in_a_step_waits(session):
    for _ in range(3):  # the window grows, and is full
        chunk, waits = watched(session, session.step)
        assert waits.found == []
        assert waits.is_there(chunk.latents) and waits.is_there(chunk.pixels)
    with Waits(chunk.latents) as waits:
        chunk.latents.sum().item(), chunk.latents[chunk.latents > 0], chunk.latents.flatten().tolist()
    assert waits.found == ["item", "_local_scalar_dense", "index", "tolist"]


def test_the_oracles_question_is_counted(model, session):
    """A backend that asks which slots to write, as sdpa and the oracle do."""
    session.window.backend = Engine(model).backend
    _, waits = watched(session, session.step)
    assert set(waits.found) == {"nonzero"} and len(waits.found) == 5 * model.config.num_layers


def test_flags_are_read_where_they_are_known(session, monkeypatch):
    monkeypatch.undo()
    _, waits = watched(session, session.step)
    assert waits.found == ["tolist"]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_torch_sees_no_step_wait(graphs):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = CausalWan(CONFIGS["tiny"]).bfloat16().eval().requires_grad_(False)
    session = Engine(model, size=(24, 24), backend="triton", graphs=graphs).session(prompt_of(1), preset=PRESET)
    for _ in range(4):
        session.step()  # compiles, and captures
    assert session.passes.count == (2 if graphs else 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    session.validate_chunks()


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_same_bits():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = CausalWan(CONFIGS["tiny"]).bfloat16().eval().requires_grad_(False)
    for name in ("flex", "longlive", "infinity-rope"):
        made = []
        for graphs in (False, True):
            session = Engine(model, size=(24, 24), backend="triton", graphs=graphs).session(prompt_of(1), preset=name)
            latents = [session.step().latents for _ in range(9)]
            session.switch(prompt_of(2))
            latents += [session.step().latents for _ in range(3)]
            session.switch(prompt_of(3)[:, :20])
            state = session.state()
            latents += [session.step().latents for _ in range(3)]
            session.restore(state)
            latents += [session.step().latents for _ in range(3)]
            made.append(torch.cat(latents, dim=1))
        assert torch.equal(*made), name
        assert session.passes.why_not is None and session.passes.count >= 2 and session.passes.bytes > 0
