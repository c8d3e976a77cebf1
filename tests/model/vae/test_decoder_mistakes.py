"""What a tired person hands to a decoder is refused before any work, and a decoder says what it is."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from flexkern.model.vae.decoder import WanDecoder


@pytest.fixture(scope="module")
def decoder(file):
    return WanDecoder.from_pretrained(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory must be a whole number >= 1, got 0"),
        ({"memory": "6GB"}, "memory must be a whole number >= 1, got '6GB'"),
        ({"memory": 6e9}, "memory must be a whole number >= 1, got 6000000000.0"),
        ({"dtype": "bfloat16"}, "dtype must be one of torch's float64, float32, bfloat16, float16, got 'bfloat16'"),
        ({"dtype": torch.int32}, "dtype must be one of .*, got torch.int32"),
    ],
)
def test_what_is_no_memory_or_dtype_is_refused_before_weights_are_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        WanDecoder.from_pretrained(tmp_path / "not there", **options)
    with pytest.raises(ValueError, match=message):
        WanDecoder.from_module(torch.nn.Linear(1, 1), **options)


def test_only_a_vae_is_taken_from_memory():
    with pytest.raises(TypeError, match="module must be diffusers' AutoencoderKLWan or Wan's VAE, got None"):
        WanDecoder.from_module(None)
    with pytest.raises(TypeError, match="; pass its .vae"):
        WanDecoder.from_module(SimpleNamespace(vae=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("given", [torch.zeros(1, 1, 16, 2, 3).long(), numpy.zeros((1, 1, 16, 2, 3)), None])
def test_only_latents_are_decoded(given, decoder):
    stream = decoder.another()
    for call in (stream, stream.decode, stream.decode_video):
        with pytest.raises(ValueError, match="latents must be a floating-point tensor, got "):
            call(given)
    assert not stream.state()


def test_a_decoder_says_where_it_is(decoder):
    stream = decoder.another()
    assert repr(stream) == "WanDecoder(float32 on cpu, within 4.29 GB; before a video)"
    stream(torch.randn(1, 1, 16, 2, 3))
    assert repr(stream).endswith("in 1 video(s), latents of 2x3)")
