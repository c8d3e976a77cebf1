"""A render's memory and its work per chunk do not grow with its length."""

import gc

import torch

from flexkern.engine import Engine
from flexkern.model.wan import CausalWan, WanConfig

SMALL = WanConfig(
    dim=32, ffn_dim=32, num_heads=1, num_layers=1, in_dim=4, out_dim=4, text_len=4, text_dim=8, freq_dim=16
)


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    return sum(t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided)  # no others have a storage


def test_twelve_hundred_frames_hold_no_more_than_sixty():
    engine = Engine(CausalWan(SMALL).eval(), size=(4, 4))
    session = engine.session(torch.randn(1, 4, 8), preset="flex")
    chunks = iter(session)
    pages = session.preset.retention.window
    for _ in range(20):
        next(chunks)
    early = live_tensor_bytes()
    for _ in range(380):
        chunk = next(chunks)
    assert chunk.frames == (1197, 1198, 1199)
    assert chunk.latents.isfinite().all()
    assert live_tensor_bytes() <= early + 2 * chunk.latents.nbytes
    assert len(session.cache.listed) == pages
    assert session.cache.keys.shape[2] == pages
