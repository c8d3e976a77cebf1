"""A model of four heads that ranks can share, and what its sessions are begun with."""

import torch

from flexkern.model.schedule import Schedule
from flexkern.model.wan import CausalWan, WanConfig

CONFIG = WanConfig(
    dim=128, ffn_dim=128, num_heads=4, num_layers=2, in_dim=4, out_dim=4, freq_dim=32, text_len=8, text_dim=16
)
SIZE = (8, 12)
USUAL = {"schedule": Schedule(steps=(1000, 500)), "size": SIZE}


def make_model(config=CONFIG):
    torch.manual_seed(0)
    return CausalWan(config).eval().requires_grad_(False)


def prompt_of(seed, batch=1, rows=8):
    return torch.randn(batch, rows, 16, generator=torch.Generator().manual_seed(seed))


def given(frames, batch=1, size=SIZE):
    """Latents to begin with."""
    return torch.randn(batch, frames, 4, *size, generator=torch.Generator().manual_seed(5))


def video(session, chunks):
    return torch.cat([session.step().latents for _ in range(chunks)], dim=1)
