"""What one picture shows, and what changed since another: the figures that every curve is made of.

Pictures are uint8 [H, W, 3] in RGB. Luma is that of BT.601, 0..255. Nothing here needs weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import cv2
except ModuleNotFoundError as error:
    raise ImportError('OpenCV is not installed: pip install "flexkern[metrics]"') from error

Picture = NDArray[np.uint8]
Grey = NDArray[np.float32]

DIAGONAL = 512  # pixels of the picture that flow is computed on: motion is relative, and details cost time
COMPOSITION = 64  # pixels of the shorter side that structure and the distance to the sink are computed on
THUMBNAIL = 16  # pixels a side of what loops are found in
QUANTILES = 64  # of a palette, per axis of chroma
SETTLED = 1.0  # grey levels of smoothing before flow, in standard deviations of pixels: grain is no motion


def luma(picture: Picture) -> Picture:
    """Return the luma of a picture, uint8 [H, W]."""
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def shrink(image: NDArray[Any], short: int) -> Grey:
    """Return an image, float32, reduced to ``short`` pixels at its shorter side, each the mean of those it replaces."""
    ratio = short / min(image.shape[:2])
    image = image.astype(np.float32)
    if ratio >= 1:
        return image
    size = [max(1, round(side * ratio)) for side in image.shape[1::-1]]
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def thumbnail(grey: NDArray[Any]) -> Grey:
    """Return a picture's pattern without its brightness and contrast, float32 [THUMBNAIL * THUMBNAIL].

    Mean 0 and variance 1; all zeros for a picture whose thumbnail varies by less than a grey level.
    """
    small = cv2.resize(grey.astype(np.float32), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).ravel()
    small -= small.mean()
    spread = small.std()
    return small / spread if spread >= 1 else np.zeros_like(small)


def sharpness(picture: Picture) -> float:
    """Return how much of a picture's contrast is fine detail: 10 log10((var(Laplacian) + 0.001) / (var(luma) + 1)).

    The Laplacian variance, over that of luma, so that light and contrast do not count; in decibels, because what halves
    it looks alike at every level. It falls with blur, and rises with grain as with detail.

    Args:
        picture: uint8 [H, W, 3] at full size; only pictures of one size compare.

    Returns:
        Decibels; higher is sharper, a flat picture has -30.

    Source: variance of the Laplacian after Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR
        2000); the ratio and the logarithm are ours.
    """
    grey = luma(picture)
    detail, contrast = cv2.Laplacian(grey, cv2.CV_32F).var(dtype=np.float64), grey.var(dtype=np.float64)
    return float(10 * np.log10((detail + 0.001) / (contrast + 1)))


def exposure(picture: Picture) -> float:
    """Return the mean luma of a picture, from 0 (black) to 1 (white): neither end is better, a change is drift.

    Source: the usual definition; over-exposure over time is the failure that Self-Forcing++ (arXiv 2510.02283) names.
    """
    return float(luma(picture).mean() / 255)


def palette(picture: Picture) -> Grey:
    """Return how chroma is distributed in a picture: quantiles of a* and b* of CIELAB, float32 [2, QUANTILES].

    Chroma is that which each pixel would have at lightness 50, a* * 66 / (L* + 16) and b* likewise, which an exposure
    does not change; pixels are means over a composition of ``COMPOSITION`` pixels, so that grain averages out.
    """
    small = np.clip(shrink(picture, COMPOSITION) / 255, 0, 1)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    chroma = lab[:, 1:] * (66 / (lab[:, :1] + 16))
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.quantile(chroma, levels, axis=0).T.astype(np.float32)


def palette_distance(one: Grey, other: Grey) -> float:
    """Return how far colours have moved from one palette to another.

    The earth mover's distances between the histograms of a* and of b* (the mean absolute difference of their
    quantiles), joined as the sides of a right angle. A shift of all colours by d gives d.

    Args:
        one: float32 [2, QUANTILES], from ``palette`` or the mean of several.
        other: Likewise.

    Returns:
        Units of CIELAB, at least 0; lower is closer, and 2 is about what an eye just sees.

    Source: ours; earth mover's distance of histograms after Rubner et al. (IJCV 2000).
    """
    return float(np.hypot(*np.abs(one - other).mean(axis=1)))


def structure(one: Grey, other: Grey) -> float:
    """Return the mean structural similarity (SSIM) of two compositions.

    Args:
        one: float32 [h, w] luma, reduced by ``shrink`` to ``COMPOSITION`` pixels: composition counts, grain does not.
        other: Likewise.

    Returns:
        1 for equal pictures, about 0 for unrelated ones; higher is closer.

    Source: Wang et al., "Image quality assessment" (IEEE TIP 2004), with its Gaussian window of 11 x 11 pixels and
        deviation 1.5, K1 = 0.01, K2 = 0.03.
    """
    blur = lambda image: cv2.GaussianBlur(image, (11, 11), 1.5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_one, mean_other = blur(one), blur(other)
    var_one, var_other = blur(one * one) - mean_one**2, blur(other * other) - mean_other**2
    covariance = blur(one * other) - mean_one * mean_other
    top = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    return float((top / ((mean_one**2 + mean_other**2 + c1) * (var_one + var_other + c2))).mean())


def settle(picture: Picture) -> Picture:
    """Return the luma that ``motion`` compares: reduced to a diagonal of ``DIAGONAL`` and smoothed, uint8 [h, w]."""
    grey = luma(picture)
    short = round(DIAGONAL * min(grey.shape) / float(np.hypot(*grey.shape)))
    small = cv2.GaussianBlur(shrink(grey, short), (0, 0), SETTLED)
    return np.rint(small).astype(np.uint8)


def motion(before: Picture, after: Picture) -> float:
    """Return the mean length of the dense optical flow between two pictures that ``settle`` made.

    Returns:
        Per cent of the picture's diagonal per picture, at least 0: the same for every size of the same video. Higher is
        more motion, real or not.

    Source: "dynamic degree" as a curve; the flow is DIS (Kroeger et al., arXiv 1603.03590), preset medium of OpenCV.
        VBench instead counts pairs at 8 per second whose fastest 5 % exceed a threshold under RAFT: another figure.
    """
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # its stubs do not know the None below
    flow = dis.calc(before, after, None)
    return float(100 * np.hypot(flow[..., 0], flow[..., 1]).mean() / np.hypot(*before.shape))


def flicker(before: Picture, after: Picture) -> float:
    """Return how little two consecutive pictures differ: (255 - MAE) / 255 over pixels and channels.

    Returns:
        1 where nothing changes, 0 at most change; higher is steadier. Motion lowers it too: read it beside ``motion``.

    Source: "temporal flickering" of VBench (arXiv 2311.17982), which applies it to videos that should stand still.
    """
    return float(1 - cv2.absdiff(before, after).mean() / 255)


def distance(one: Grey, other: Grey) -> float:
    """Return the root mean square difference of two compositions, in grey levels."""
    return float(np.sqrt(np.square(one - other).mean()))
