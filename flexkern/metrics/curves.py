"""From a curve over time to one number: drift, change between the ends, jumps between chunks, dips to the sink, loops.

A curve is float64 [T], one value per picture, NaN where there is none (a first picture has moved from nowhere).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

Curve = NDArray[np.float64]

ENDS = 0.15  # share of a video at either end
ENDS_SECONDS = 5.0
LEVEL_SECONDS = 8.0  # of the running median that a dip stands out from
DEPARTED = 0.5  # of the median distance, from which a video counts as having left its sink
DIP = 0.3  # depth from which a dip counts
SHORTEST_LOOP = 1.0  # seconds
STILL = 0.02  # of a picture's contrast: a thumbnail that changes less, as by the groups of a codec, stands still


def mean(values: ArrayLike) -> float:
    """Return the mean of the values that are known; NaN where none is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else float("nan")


def drift(curve: Curve) -> float:
    """Return how far a figure's mean over the last 15 % of a video lies from that over the first 15 %: |first - last|.

    Source: "start-end contrast" of FramePack (arXiv 2504.12626), taken over by Helios-Bench.
    """
    count = max(1, round(ENDS * len(curve)))
    return abs(mean(curve[:count]) - mean(curve[-count:]))


def change(curve: Curve, fps: float) -> float:
    """Return a figure's mean over the last 5 seconds less that over the first 5, or over halves of a shorter video.

    The sign tells the direction; papers print its size.

    Source: the quality drift of Rolling Forcing (arXiv 2509.25161) and TetherCache (arXiv 2606.13035).
    """
    count = max(1, min(round(ENDS_SECONDS * fps), len(curve) // 2))
    return mean(curve[-count:]) - mean(curve[:count])


def smooth(curve: Curve, window: int) -> Curve:
    """Return the mean of the ``window`` values around each, fewer at the ends; NaN where none of them is known."""
    known = np.isfinite(curve)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, curve, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    at = np.arange(len(curve))
    low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(curve))
    inside = counts[high] - counts[low]
    return np.where(inside > 0, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def chunk_discontinuity(motion: Curve, chunks: int) -> float:
    """Return the mean of the k largest motions over the mean of all, k = chunks - 1: are there jumps, one per seam?

    Args:
        motion: flow between neighbouring pictures, in any unit.
        chunks: how many the video was made of, at least 2.

    Returns:
        At least 1; lower is smoother. Real motion that quickens and stops raises it too: compare videos of one prompt.
        NaN where nothing moves.

    Raises:
        ValueError: chunks is below 2, or there are fewer motions than seams.

    Source: the flow-based discontinuity of work on chunked generation, in the form "k largest over mean".
    """
    known = np.sort(motion[np.isfinite(motion)])
    if not 2 <= chunks <= len(known) + 1:
        raise ValueError(f"chunks must be in 2..{len(known) + 1} for {len(known)} motions, got {chunks}")
    level = known.mean()
    return float(known[-(chunks - 1) :].mean() / level) if level > 0 else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """How near a video comes to its own first frames again.

    distance: [T] distance to the nearest sink picture over its median, NaN inside the sink. depth: [T] how far it falls
    below its surroundings, 0..1. collapse: the largest depth. dips: numbers of the pictures at the bottoms of dips.
    """

    distance: Curve
    depth: Curve
    collapse: float
    dips: list[int]


def sink_collapse(distance: Curve, fps: float) -> Sink:
    """Find the dips of the distance to the sink frames: moments at which a video falls back to its beginning.

    depth_t = 1 - d_t / level_t, where the level is the median of d over the 8 seconds around t, or the largest d so far
    if that is less, from the moment at which the video has left its sink (half the median distance). Neither a slow
    approach is a dip, nor a slow departure, nor stillness.

    Args:
        distance: [T] distance of each picture to the nearest sink picture, NaN inside the sink.
        fps: pictures per second.

    Returns:
        The normalised distance, the depths, the deepest (0: never; 1: the very same picture; lower is better) and the
        bottoms of all dips of at least 30 %.

    Source: the normalised L2 distance to the sink frames of LoL (arXiv 2601.16914), measured on pictures. Depth and its
        thresholds are ours: the paper's sink-collapse score is another scale.
    """
    known = np.isfinite(distance)
    typical = float(np.median(distance[known])) if known.any() else 0.0
    flat = np.zeros(len(distance))
    if typical == 0:
        return Sink(distance=np.where(known, 0.0, np.nan), depth=flat, collapse=0.0, dips=[])
    normalised = distance / typical
    gone = np.flatnonzero(np.where(known, normalised, 0) >= DEPARTED)
    start = int(gone[0]) if len(gone) else len(distance)
    inside = normalised[start:]
    if not len(inside):
        return Sink(distance=normalised, depth=flat, collapse=0.0, dips=[])
    half = max(1, round(LEVEL_SECONDS * fps / 2))
    around = sliding_window_view(np.pad(inside, half, constant_values=np.nan), 2 * half + 1)
    level = np.minimum(np.nanmedian(around, axis=1), np.maximum.accumulate(inside))
    depth = np.concatenate((flat[:start], np.clip(1 - inside / np.maximum(level, 1e-12), 0, 1)))
    return Sink(distance=normalised, depth=depth, collapse=float(depth.max()), dips=bottoms(depth, DIP))


def bottoms(depth: Curve, threshold: float) -> list[int]:
    """Return where each run of depths of at least ``threshold`` is deepest."""
    deep = np.flatnonzero(depth >= threshold)
    runs = np.split(deep, np.flatnonzero(np.diff(deep) > 1) + 1)
    return [int(run[depth[run].argmax()]) for run in runs if len(run)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Whether a video repeats itself.

    strength: 0 (never) to 1 (always the same cycle). lag: length of the cycle in pictures, 0 where there is none.
    correlation: [lags] of pictures that lie that many apart. repeats: [T] correlation of each picture with the one
    a lag before, NaN where there is none.
    """

    strength: float
    lag: int
    correlation: Curve
    repeats: Curve


def find_loop(thumbnails: NDArray[np.float32], fps: float) -> Loop:
    """Find the cycle in which a video repeats itself.

    r(l) is the correlation over all pictures that lie l apart, after the mean over time is taken off, so that what
    stands still does not count, and neither do changes of less than 2 % of a picture's contrast. The strength of a lag
    is min(r(l), r(l) - min r below l): a cycle must have left its first picture before it returns, so slow change is
    none. Lags from 1 second to half the video; of equally strong ones (within 5 %) the shortest.

    Args:
        thumbnails: float32 [T, P], from ``vision.thumbnail``.
        fps: pictures per second.

    Returns:
        Strength, lag and curves; lower strength is better.

    Source: autocorrelation; the score of repetition in work on RIFLEx (arXiv 2502.15894) is the nearest relative.
    """
    count = len(thumbnails)
    moved = (thumbnails - thumbnails.mean(axis=0, dtype=np.float64)).astype(np.float32)
    correlation = correlate(moved)
    lowest = np.minimum.accumulate(correlation)
    strength = np.clip(np.minimum(correlation, correlation - lowest), 0, 1)
    first = max(1, round(SHORTEST_LOOP * fps))
    allowed = strength[first : count // 2 + 1]
    best = float(allowed.max()) if len(allowed) else 0.0
    if best <= 0:
        return Loop(strength=0.0, lag=0, correlation=correlation, repeats=np.full(count, np.nan))
    lag = first + int(np.flatnonzero(peaks(allowed) & (allowed >= 0.95 * best))[0])
    sizes = np.linalg.norm(moved, axis=1)
    product = np.einsum("tp,tp->t", moved[lag:], moved[:-lag]) / np.maximum(sizes[lag:] * sizes[:-lag], 1e-9)
    return Loop(strength=best, lag=lag, correlation=correlation, repeats=np.r_[np.full(lag, np.nan), product])


def peaks(values: Curve) -> NDArray[np.bool_]:
    """Return where a curve is at least as high as both neighbours."""
    padded = np.pad(values, 1, constant_values=-np.inf)
    return (values >= padded[:-2]) & (values >= padded[2:])


def correlate(moved: NDArray[np.float32]) -> Curve:
    """Return the correlation of pictures that lie 0, 1, ... T - 1 apart, [T]: products over squares."""
    count, pixels = moved.shape
    size = 1 << (2 * count - 1).bit_length()
    power = np.zeros(size // 2 + 1)
    for start in range(0, pixels, 16):  # all pixels of an hour at once would not fit
        power += np.square(np.abs(np.fft.rfft(moved[:, start : start + 16], size, axis=0))).sum(axis=1)
    products = np.fft.irfft(power, size)[:count]
    energy = np.square(moved, dtype=np.float64).sum(axis=1)
    sums = np.concatenate(([0.0], np.cumsum(energy)))
    early, late = sums[count - np.arange(count)], sums[count] - sums[np.arange(count)]
    floor = STILL**2 * pixels * (count - np.arange(count))
    result: Curve = products / (np.sqrt(early * late) + floor)
    return result


def bars(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the limits of an axis on which all the curves can be read, with a twentieth to spare; (0, 1) for none."""
    known = np.concatenate([curve[np.isfinite(curve)] for curve in curves]) if curves else np.zeros(0)
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    spare = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
    return low - spare, high + spare
