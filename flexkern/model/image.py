"""The picture that a video begins with, as the VAE's encoder takes it."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexkern.model.intact import require_there

if TYPE_CHECKING:
    from PIL.Image import Image


DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16 bits
WIDE = ("PNG", "PPM")  # whose 16 bits Pillow may open as 32


def validate_image(path: str | Path) -> None:
    """Raises FileNotFoundError or ValueError where there is no image that can be read to its end."""
    from PIL import Image, UnidentifiedImageError

    require_there(path, "image")
    try:
        with Image.open(path) as image:
            image.load()
            _eight_bits(image, image.format, path)
            _validate_opaque(image, path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from None


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """An image at the size of a video.

    Args:
        path: Of a file that Pillow reads.
        height: Of the video's pictures, in pixels.
        width: Of the video's pictures, in pixels.

    Returns:
        uint8 [1, 1, height, width, 3], scaled to cover the size and cut to it around the centre. 16 bits a channel
        are scaled to 8.

    Raises:
        ValueError: Its values are floats, or integers of more than 16 bits, whose white nobody can know; or it has
            transparent pixels, whose colour nobody sees.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        _validate_opaque(image, path)
        upright = _eight_bits(ImageOps.exif_transpose(image), image.format, path).convert("RGB")
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted))[None, None]


def _validate_opaque(image: "Image", path: str | Path) -> None:
    """Raises ValueError where a pixel is transparent; the colour behind it in the file is often arbitrary."""
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return
    import numpy as np

    if np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise ValueError(f"{path} has transparent pixels, and a video has none: flatten it onto a background first")


def _eight_bits(image: "Image", form: str | None, path: str | Path) -> "Image":
    """The image with 8 bits a channel; Pillow's own conversion would cut every value above 255 to white."""
    import numpy as np
    from PIL import Image as images

    if image.mode not in (*DEEP, "I", "F"):
        return image
    if image.mode == "F" or (image.mode == "I" and form not in WIDE):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(f"{path} is an image of {kind}; expected 8 or 16 bits a channel")
    return images.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8))
