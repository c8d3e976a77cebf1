"""Noise that a thread draws ahead has the bits and the state of noise that is drawn when it is asked for."""

import gc
import threading

import pytest
import torch
from both_loops import SIZE, prompt_of

from flexkern.ahead import THREAD
from flexkern.engine import Engine
from flexkern.model.schedule import Schedule
from flexkern.noise import PolicyNoise
from flexkern.policies import NoisePolicy, get_preset

KINDS = [NoisePolicy(kind="iid"), NoisePolicy(apply="initial+renoise"), NoisePolicy(kind="high_pass")]
DRAWS = [(frames, step) for frames in ((0, 1, 2), (3, 4, 5), (6, 7, 8)) for step in (None, 0, 1)]


def noise_of(policy=KINDS[1], seed=3):
    return PolicyNoise(policy, seed, 2, (2, 4), None)


def draw(noise, call):
    frames, step = call
    return noise.initial(frames) if step is None else noise.renoise(frames, step)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


class Spy:
    """A source that notes what is drawn, and where; ``fails`` has the calls that raise."""

    def __init__(self, source, fails=()):
        self.source, self.fails, self.calls = source, fails, []

    def initial(self, frames):
        return self.noted(frames, None)

    def renoise(self, frames, step):
        return self.noted(frames, step)

    def noted(self, frames, step):
        self.calls.append(((tuple(frames), step), threading.current_thread().name))
        if (tuple(frames), step) in self.fails:
            raise ArithmeticError(f"no noise for {frames}")
        return self.source.initial(frames) if step is None else self.source.renoise(frames, step)

    def state(self):
        return self.source.state()

    def restore(self, state):
        self.source.restore(state)


def spied(noise, fails=()):
    noise.sources = [Spy(source, fails) for source in noise.sources]
    return noise


@pytest.mark.parametrize("policy", KINDS, ids=lambda policy: policy.kind)
def test_bits_states_and_order_are_those_of_the_spot(policy):
    spot, ahead = noise_of(policy), spied(noise_of(policy))
    for i, call in enumerate(DRAWS):
        ahead.expect(DRAWS[i : i + 4])
        assert same(ahead.state(), spot.state())
        assert torch.equal(draw(ahead, call), draw(spot, call))
        assert same(ahead.state(), spot.state())
    for spy in ahead.sources:
        assert [call for call, _ in spy.calls] == DRAWS
        assert {name.startswith(THREAD) for _, name in spy.calls} == {True}


def test_what_was_not_expected_is_drawn_all_the_same():
    """Draws that nobody asks for leave no trace: antiphase noise would refuse or be another."""
    spot, ahead = noise_of(), noise_of()
    for noise in (spot, ahead):
        draw(noise, DRAWS[0])
    ahead.expect(DRAWS[1:7])
    assert torch.equal(draw(ahead, DRAWS[2]), draw(spot, DRAWS[2]))
    ahead.expect(DRAWS[6:])  # expected something else: these do not follow
    with pytest.raises(ValueError, match="expected frame 3, got 6"):
        draw(ahead, DRAWS[6])
    assert torch.equal(draw(ahead, DRAWS[3]), draw(spot, DRAWS[3])) and same(ahead.state(), spot.state())


def test_a_state_in_between_is_restored():
    spot, ahead = noise_of(), noise_of()
    draw(spot, DRAWS[0])
    state = spot.state()
    ahead.expect(DRAWS[:6])
    draw(ahead, DRAWS[0]), draw(ahead, DRAWS[1])
    with pytest.raises(ValueError, match="must be of seed 3, got 4"):
        ahead.restore(noise_of(seed=4).state())
    ahead.restore(state)
    ahead.expect(DRAWS[3:6])
    assert torch.equal(draw(ahead, DRAWS[3]), draw(spot, DRAWS[3])) and same(ahead.state(), spot.state())


def test_an_error_is_raised_by_the_call_that_wants_the_draw():
    spot, ahead = noise_of(), spied(noise_of(), fails={DRAWS[3]})
    ahead.expect(DRAWS[:6])
    for call in DRAWS[:3]:
        assert torch.equal(draw(ahead, call), draw(spot, call))
    for _ in range(2):  # from the thread, and on the spot
        with pytest.raises(ArithmeticError, match=r"no noise for \(3, 4, 5\)"):
            draw(ahead, DRAWS[3])
        assert same(ahead.state(), spot.state())
    for spy in ahead.sources:
        spy.fails = ()
    assert torch.equal(draw(ahead, DRAWS[3]), draw(spot, DRAWS[3]))


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def test_nothing_is_left_running():
    gc.collect()
    before = set(workers())
    gc.disable()  # no cycle may keep it
    try:
        noise = noise_of()
        noise.expect(DRAWS)
        (thread,) = set(workers()) - before
        del noise
        thread.join(timeout=20)
        assert not thread.is_alive()
    finally:
        gc.enable()


@pytest.fixture
def engine(model):
    return Engine(model, schedule=Schedule(steps=(1000, 750, 500), first_steps=(1000, 500)), size=SIZE)


@pytest.mark.parametrize("noise", [{}, {"noise.kind": "iid"}], ids=["antiphase", "white"])
def test_a_session_draws_as_ever(engine, noise):
    """Every draw comes from the thread, and none after the last chunk."""
    preset = get_preset("flex", {"retention.window": 6, "noise.apply": "initial+renoise", **noise})
    session = engine.session(prompt_of(1), preset=preset, frames=8, seed=5)
    spied(session.noise)
    chunks = [chunk.latents for chunk in session]
    order = [((0, 1, 2), s) for s in (None, 0)] + [(f, s) for f in ((3, 4, 5), (6, 7, 8)) for s in (None, 0, 1)]
    (spy,) = session.noise.sources
    assert [call for call, _ in spy.calls] == order and all(name.startswith(THREAD) for _, name in spy.calls)
    other = engine.session(prompt_of(1), preset=preset, frames=8, seed=5)
    other.noise.expect = lambda draws: None
    assert torch.equal(torch.cat(chunks), torch.cat([chunk.latents for chunk in other]))
    assert same(session.noise.state(), other.noise.state())


def test_noise_of_ones_own_is_drawn_when_it_is_asked_for(engine):
    shape = (16, *SIZE)
    noise = spied(PolicyNoise(NoisePolicy(), 0, 1, shape, None))
    session = engine.session(prompt_of(1), preset="self-forcing", noise=noise)
    session.step()
    assert {name for _, name in noise.sources[0].calls} == {threading.current_thread().name}
    assert len(noise.sources[0].calls) == 2
