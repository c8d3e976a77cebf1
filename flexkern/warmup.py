"""Every kernel of a render is in Triton's cache before the render: the work of ``flexkern warmup``.

A stand-in of the model, two layers of random weights at the real sizes, lives through what a video may: a window that
grows until it is full, cuts, changes of prompt. So the launches are those of a render, with the same constants, and no
list of them can go stale. Two layers are enough: all layers launch the same, but for the last in the clean pass.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexkern.backends import unfit_triton
from flexkern.backends.choice import AUTO
from flexkern.engine import Engine
from flexkern.model.families import Family
from flexkern.model.vae.decoder import WanDecoder
from flexkern.model.vae.net import PUBLISHED, DecoderNet, Sizes
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.plan import band_split
from flexkern.policies import Preset, get_preset

LAYERS = 2


def stand_in(
    config: WanConfig, family: Family, *, dtype: torch.dtype, device: str | torch.device, backend: str = AUTO
) -> Engine:
    """An engine that launches what one of the real model would, with few layers, random weights and no parts.

    Args:
        config: Sizes of the model; all but the number of layers are kept.
        family: How it is run: chunk, first chunk, size, schedule and horizon.
        dtype: Of its weights.
        device: Where it runs.
        backend: Of attention.

    Raises:
        ValueError: The backend cannot run there.
    """
    with torch.device(device):
        model = CausalWan(replace(config, num_layers=min(LAYERS, config.num_layers)))
    return Engine(
        model.to(dtype).eval().requires_grad_(False),
        schedule=family.schedule,
        backend=backend,
        chunk=family.chunk,
        first_chunk=family.first_chunk,
        size=family.size,
        horizon=family.horizon,
        graphs=False,  # what is captured launches nothing that was not compiled before
    )


def live(engine: Engine, preset: str | Preset) -> None:
    """Make every kind of chunk that a video with this preset may hold, as often as it can differ.

    The window grows until it is full; then come a cut, where the preset has any, and a change of prompt. In a second
    video the prompt changes after every chunk, since a preset may run all frames of the window again then, however
    many there are.
    """
    config = engine.model.config
    text = torch.randn(1, config.text_len, config.text_dim, device="cpu")
    full = math.ceil(get_preset(preset).retention.capacity / engine.chunk) + 1
    frames = engine.first_chunk + engine.chunk * (2 * full + 2)
    session = engine.session(text, preset=preset, frames=frames)
    for _ in range(full):
        session.step()
    if session.preset.position.index == "slot":
        session.cut()
    session.step()
    session.switch(text)
    for _ in range(full):
        session.step()
    session = engine.session(text, preset=preset, frames=frames)
    for _ in range(full):
        session.step()
        session.switch(text)
    session.step()
    session.validate_chunks()


@torch.inference_mode()
def decode(family: Family, *, dtype: torch.dtype, device: str | torch.device, sizes: Sizes = PUBLISHED) -> None:
    """Make the pictures of a first chunk and of two more with random weights, as a render does that is given a VAE.

    Args:
        family: Chunk, first chunk and size.
        dtype: Of the weights.
        device: Where it runs.
        sizes: Of the decoder.
    """
    decoder = WanDecoder(DecoderNet.random(sizes, dtype=dtype, device=device))
    for count in (family.first_chunk, family.chunk, family.chunk):
        decoder(torch.randn(1, count, sizes.latent, *family.size, dtype=dtype, device=device))


def tune(
    engine: Engine, preset: str | Preset, *, tell: Callable[[str], None],
    timer: Callable[[Callable[[], object]], float] | None = None, keep_in: Path | None = None,
) -> Path | None:  # fmt: skip
    """Time the tiles of the portable attention kernel at the model's shape, and keep the fastest for this machine.

    Args:
        engine: Of the model, or a stand-in.
        preset: Its window is attended to.
        tell: Called with a line for every tile.
        timer: Milliseconds of a call; Triton's own by default, with a cold L2 cache.
        keep_in: The file; the one beside Triton's cache by default.

    Returns:
        The file, or None where there is nothing to choose; ``tell`` says why.

    Raises:
        ImportError: Triton is missing or too old.
        OSError: The file cannot be written.
    """
    if why := unfit_triton():
        raise ImportError(why)
    import triton

    from flexkern.kernels.attention.kept import KeptTile, keep_tile
    from flexkern.kernels.attention.portable import frame_attention
    from flexkern.kernels.attention.select import forget, selected
    from flexkern.kernels.attention.tiles import FLOAT32, Config
    from flexkern.kernels.attention.tune import candidates, fastest, time_tiles
    from flexkern.kernels.gpus import arch_of, dtype_name

    model = engine.model
    device, dtype, head_dim = torch.device(model.device), model.dtype, model.config.head_dim
    selection = selected(device, head_dim, dtype)
    if selection.config is None or selection.config == FLOAT32:
        tell(f"nothing to tune: {selection}")
        return None
    inputs, shape = _inputs(engine, preset)
    attend: Callable[[Config], Tensor] = lambda config: frame_attention(*inputs, config=config)[0]
    timed = []
    for one in time_tiles(candidates(arch_of(device), selection.config), attend, timer or partial(_cold, device)):
        tell(str(one))
        timed.append(one)
    best = fastest(timed)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    tile = KeptTile(
        gpu=gpu, triton=triton.__version__, head_dim=head_dim, dtype=dtype_name(dtype), config=best.config,
        ms=round(best.ms, 4), shape=shape,
    )  # fmt: skip
    path = keep_tile(tile, keep_in)
    forget()
    tell(f"{best}, the fastest of {len(timed)} for {shape} on {gpu}, is kept in {path}")
    return path


def _cold(device: torch.device, call: Callable[[], object]) -> float:
    """Milliseconds of a call on a CUDA GPU: the median, with a cold L2 cache."""
    from triton.testing import do_bench

    with torch.cuda.device(device):  # whose clock it looks at
        return float(do_bench(call, warmup=25, rep=100, return_mode="median"))


def _inputs(engine: Engine, preset: str | Preset) -> tuple[tuple[Tensor, ...], str]:
    """What attention gets in a chunk of a full window, random, and its shape in words."""
    model = engine.model
    rows, columns = model.grid(*engine.size)
    frames, read, tokens = engine.chunk, get_preset(preset).retention.capacity, rows * columns
    heads, dim, device = model.config.num_heads, model.config.head_dim, model.device
    query = torch.randn(1, frames, tokens, heads, dim, device=device).to(model.dtype)
    keys, values = (torch.randn(1, read, tokens, heads, dim, device=device).to(model.dtype) for _ in range(2))
    slots = torch.arange(read, dtype=torch.int32, device=device)
    angle = torch.randn(frames, read, 1, band_split(dim)[0], device=device)
    turn = torch.stack((angle.cos(), angle.sin()), dim=-1)
    shape = f"F={frames} R={read} S={tokens} H={heads} D={dim}"
    return (query, keys, values, slots, turn, torch.ones(frames, device=device)), shape
