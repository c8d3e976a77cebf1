"""The picture that a video begins with, as the VAE's encoder takes it."""

from pathlib import Path

import torch
from torch import Tensor


def validate_image(path: str | Path) -> None:
    """Raises FileNotFoundError or ValueError where there is no image that can be read."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """An image at the size of a video.

    Args:
        path: Of a file that Pillow reads.
        height: Of the video's pictures, in pixels.
        width: Of the video's pictures, in pixels.

    Returns:
        uint8 [1, 1, height, width, 3], scaled to cover the size and cut to it around the centre.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted))[None, None]
