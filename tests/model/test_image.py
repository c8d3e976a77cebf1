"""The picture that a video begins with: depths, what is refused, and that all of it is read before any work."""

import numpy as np
import pytest
import torch
from PIL import Image

from flexkern.model.image import read_image, validate_image

RAMP = np.linspace(0, 65535, 48 * 64).reshape(48, 64)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "big-endian.tif"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, name):
    path = tmp_path / name
    if name == "big-endian.tif":
        Image.frombytes("I;16B", (64, 48), RAMP.astype(">u2").tobytes()).save(path)
    elif name == "deep.pgm":  # which old versions of Pillow read and cannot write
        path.write_bytes(b"P5 64 48 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP.astype(np.uint16)).save(path)
    validate_image(path)
    expected = torch.from_numpy(np.rint(RAMP.astype(np.uint16) / 257).astype(np.uint8))
    assert torch.equal(read_image(path, 48, 64), expected[None, None, :, :, None].expand(1, 1, 48, 64, 3))


def test_other_modes_of_eight_bits_are_read(tmp_path):
    red = Image.new("RGB", (64, 48), (200, 30, 30))
    for mode in ("RGB", "RGBA", "P", "CMYK", "L", "LA", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        red.convert(mode).save(path)
        validate_image(path)
        assert read_image(path, 32, 32).shape == (1, 1, 32, 32, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_refused(tmp_path, mode):
    """What colour stands behind them nobody sees; an alpha that is 255 everywhere says nothing."""
    image, path = Image.new("RGBA", (64, 48), (255, 0, 255, 255)), tmp_path / "hole.png"
    image.putpixel((5, 7), (255, 0, 255, 254))
    if mode == "P":
        image.convert("RGB").quantize(4).save(path, transparency=0)
    else:
        image.convert(mode).save(path)
    for read in (validate_image, lambda path: read_image(path, 48, 64)):
        with pytest.raises(ValueError, match="hole.png has transparent pixels, and a video has none: flatten it"):
            read(path)


@pytest.mark.parametrize(("kind", "words"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_values_whose_white_is_unknown_are_refused(tmp_path, kind, words):
    Image.fromarray((RAMP / 65535 * 3).astype(kind)).save(tmp_path / "x.tif")
    for read in (validate_image, lambda path: read_image(path, 48, 64)):
        with pytest.raises(ValueError, match=f"x.tif is an image of {words}; expected 8 or 16 bits a channel"):
            read(tmp_path / "x.tif")


def test_an_image_that_is_cut_short_is_refused_before_work(tmp_path):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.png is not an image that can be read: .*truncated"):
        validate_image(tmp_path / "a.png")
