"""Where a preset's positions call a model back to its sink: a prediction that needs neither weights nor a video."""

import numpy as np
from numpy.typing import NDArray

from flexkern.checks import whole
from flexkern.policies import PositionPolicy, Preset, get_preset, position_of

BANDS = 22  # temporal bands of Wan
STRIDE = 4  # pictures per latent frame of Wan's VAE, after the first


def sink_alignment(
    position: PositionPolicy | Preset | str,
    frames: int,
    *,
    window: int | None = None,
    chunk: int = 3,
    bands: int = BANDS,
    heads: int = 1,
    target: int | None = None,
) -> NDArray[np.float64]:
    """Return how far the phases of all bands agree between each frame and the sink: |mean_j exp(i theta'_j t)|.

    At a maximum the rotations of most bands come back together, the first frame looks as near as it did at the
    beginning, and a model may fall back to it.

    Args:
        position: a preset, its name or its ``position``; theta' and what t is, a frame's index or its slot, are its
            own.
        frames: latent frames of the video.
        window: frames attended, a preset's own if not given; needed where positions are slots, since no distance
            exceeds it there.
        chunk: latent frames computed together, which share a scale in schedule per_chunk.
        bands: temporal bands of the model.
        heads: attention heads, over which the mean goes as well where each has positions of its own.
        target: latent frames that the policy extends the horizon to; None takes ``frames``.

    Returns:
        float64 [frames], 1 for the first frame, in 0..1.

    Raises:
        TypeError: position is something else.
        ValueError: frames or chunk is no whole number of at least 1, there is no such preset, positions are slots
            and there is no window of at least a chunk, or the sink moves along (``sink_gap``) and there is no preset.

    Source: LoL (arXiv 2601.16914), which finds collapse at maxima of the phase concentration, latents 132 and 201.
    """
    preset = get_preset(position) if isinstance(position, str | Preset) else None
    if window is None and preset is not None:
        window = preset.retention.capacity
    position, frames, chunk = position_of(position), whole("frames", frames, 1), whole("chunk", chunk, 1)
    if position.index == "slot" and (window is None or window < chunk):
        raise ValueError(f"positions are slots: window must be given and hold a chunk of {chunk}, got {window}")
    moves = position.index == "absolute" and position.sink_gap is not None
    if moves and preset is None:
        raise ValueError("the sink moves along behind the other frames of the window: give a preset, which has one")
    result, listed = np.ones(frames), list[int]()
    for start in range(0, frames, chunk):
        query = list(range(start, min(start + chunk, frames)))
        held = query if start == 0 else [0, *query]
        if position.index == "slot" and window is not None and start > 0:
            held = [0, *range(max(1, query[-1] + 2 - window), query[-1] + 1)]
        if moves and preset is not None:
            kept = preset.retention.keep(listed, len(query)).pages
            held = listed = [*(listed[page] if isinstance(page, int) else page.frame for page in kept), *query]
        phases = position.phases(query=query, visible=held, bands=bands, heads=heads, target=target or frames)
        apart = phases.query - phases.key[:, 0]  # [F or 1, G, T] radians
        result[query] = np.abs(np.exp(1j * apart).mean(axis=(1, 2)))
    return result


def per_picture(values: NDArray[np.float64], pictures: int, stride: int = STRIDE) -> NDArray[np.float64]:
    """Return values of latent frames as values of pictures: the first frame is one picture, every other ``stride``.

    Args:
        values: [frames].
        pictures: how many; those past the last frame keep its value.
        stride: pictures per latent frame.

    Returns:
        [pictures].
    """
    frame = (np.arange(pictures) + stride - 1) // stride
    return values[np.minimum(frame, len(values) - 1)]


def latent_frames(pictures: int, stride: int = STRIDE) -> int:
    """Return how many latent frames decode to that many pictures, rounded up."""
    return 1 + max(0, -(-(pictures - 1) // stride))
