"""From a checkpoint on disk to an engine: what is wrong is told before anything is loaded.

    checkpoint = Checkpoint(weights="Self-Forcing", family="self-forcing")
    parts = check(checkpoint, prompts=["a cat walks on grass"], preset="flex", frames=240, pixels=True)
    engine = Engine.from_parts(parts)  # or at once: load(checkpoint, prompts=..., preset=..., frames=...)

``check`` reads headers, raises what a render of that checkpoint would, and says what it found; the command line and
``flexkern inspect`` go through it, and so should a queue or a server before it takes an order.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexkern.backends.choice import AUTO
from flexkern.engine import Engine
from flexkern.model.checkpoint import (
    Checkpoint,
    MissingPart,
    Parts,
    default_device,
    validate_channels,
    validate_checkpoint,
    validate_device,
)
from flexkern.model.families import Family
from flexkern.model.wan import WanConfig
from flexkern.parallel.split import validate_shares
from flexkern.plan import band_split
from flexkern.policies import Preset, get_preset

if TYPE_CHECKING:  # there are builds of torch without what it needs
    from flexkern.parallel import Ranks

__all__ = [
    "Checkpoint",
    "MissingPart",
    "Parts",
    "check",
    "default_device",
    "load",
    "validate_device",
    "validate_preset",
]


def check(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] = (),
    preset: str | Preset | None = None,
    frames: int | None = None,
    image: str | Path | None = None,
    pixels: bool | None = None,
    backend: str = AUTO,
    device: str = "cpu",
    ranks: int = 1,
) -> Parts:
    """The parts of a checkpoint that can be rendered in this way; nothing is loaded.

    Args:
        checkpoint: What to open.
        prompts: Those to render, if they are known: they need a text encoder or saved embeddings, and are encoded
            before the transformer is loaded, after which the encoder goes. Without any the encoder stays, if there
            is one.
        preset: The method, a name or a ``Preset``. Default: the family's.
        frames: Latent frames of the video, None for no end.
        image: The picture to begin with.
        pixels: True needs a VAE, False leaves it out, None takes one where there is one.
        backend: Of attention, "auto" or one of ``flexkern.backends.BACKENDS``.
        device: cpu, cuda or cuda:N.
        ranks: How many GPUs compute a video together.

    Raises:
        FileNotFoundError: A file is not there.
        MissingPart: A VAE or a text encoder is needed and there is none; a ValueError.
        ValueError: Anything else that does not fit.
        NotImplementedError: A kind of checkpoint that is not supported.
        ImportError: Names the extra that is not installed.
    """
    parts = validate_checkpoint(checkpoint, prompts=prompts, image=image, pixels=pixels, backend=backend, device=device)
    validate_channels(parts.transformer, parts.config)
    validate_shares(parts.config, parts.family.size, ranks)
    chosen = parts.family.preset if preset is None else preset
    validate_preset(parts.family, parts.config, chosen, frames, begins=image is not None)
    return parts


def validate_preset(
    family: Family, config: WanConfig, preset: str | Preset, frames: int | None, *, begins: bool = False
) -> None:
    """Raises ValueError for a preset that does not fit the model or the length.

    Args:
        family: How the model is run.
        config: Its sizes.
        preset: The method, a name or a ``Preset``.
        frames: Latent frames of the video, None for no end.
        begins: Whether a picture is given to begin with, so that no noise is drawn for the first chunk.
    """
    bands = band_split(config.head_dim)[0]
    most = max(family.chunk, family.first_chunk)
    least = family.chunk if begins else min(family.chunk, family.first_chunk)
    chosen = get_preset(preset).for_horizon(family.horizon)
    chosen.validate(chunk=most, least=least, bands=bands, heads=config.num_heads, target=frames)


def load(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] = (),
    preset: str | Preset | None = None,
    frames: int | None = None,
    image: str | Path | None = None,
    pixels: bool | None = None,
    backend: str = AUTO,
    device: str = "cpu",
    graphs: bool = True,
    ranks: "Ranks | None" = None,
) -> Engine:
    """The engine of a checkpoint, once all is checked. Warns of what a user would want to know.

    Args and Raises: those of ``check``; graphs and ranks: as ``Engine``'s.
    """
    parts = check(
        checkpoint,
        prompts=prompts,
        preset=preset,
        frames=frames,
        image=image,
        pixels=pixels,
        backend=backend,
        device=device,
        ranks=1 if ranks is None else ranks.count,
    )
    for note in parts.notes:
        warnings.warn(note, stacklevel=2)
    return Engine.from_parts(parts, graphs=graphs, ranks=ranks)
