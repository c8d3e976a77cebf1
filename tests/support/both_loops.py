"""A session of the engine and the published cache semantics (upstream.py), on the same model, noise and prompts."""

import torch
import upstream

from flexkern.engine import Engine
from flexkern.model.schedule import SCHEDULES
from flexkern.policies import get_preset

SIZE, GRID = (4, 6), (2, 3)


def prompt_of(seed, batch=1):
    return torch.randn(batch, 32, 48, generator=torch.Generator().manual_seed(seed))


class Recorded:
    """Noise drawn in advance, in the research code's order."""

    def __init__(self, chunks, steps, batch=1, skip=0):
        self.video = torch.randn(batch, 3 * chunks, 16, *SIZE)
        self.fresh = [torch.randn(batch, 3, 16, *SIZE) for _ in range(chunks * (steps - 1))]
        self.left, self.skip = list(self.fresh), skip

    def initial(self, frames):
        return self.video[:, [f - self.skip for f in frames]]

    def renoise(self, frames, step):
        return self.left.pop(0)


def drive(session, chunks, switches=None, cuts=()):
    made = []
    for index in range(chunks):
        if switches and index in switches:
            session.switch(switches[index])
        if index in cuts:
            session.cut()
        made.append(session.step().latents)
    return torch.cat(made, dim=1)


def both(model, name, overrides, memory_options, *, chunks=7, schedule=None, switches=None, cuts=(), prefill=None):
    """Latents of the engine and of the published semantics, on the same noise."""
    schedule = schedule or SCHEDULES["self-forcing"]
    timesteps = schedule.timesteps()
    skip = 0 if prefill is None else prefill.shape[1]
    noise = Recorded(chunks, len(timesteps), skip=skip)
    chosen = get_preset(name, overrides)
    session = Engine(model, schedule=schedule, size=SIZE).session(prompt_of(1), preset=chosen, noise=noise)
    if prefill is not None:
        session.prefill(prefill)
    ours = drive(session, chunks, {c: prompt for c, (prompt, _) in (switches or {}).items()}, cuts)
    config = model.config
    memory = upstream.RollingMemory(config.num_layers, 1, config.num_heads, config.head_dim, *GRID, **memory_options)
    theirs = upstream.run(
        model, memory, prompt_of(1), noise.video, noise.fresh, timesteps, schedule.sigma,
        switches=switches, cuts=cuts, prefill=prefill,
    )  # fmt: skip
    return ours, theirs


def assert_equal_to(pair):
    ours, theirs = pair
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < 1e-4
