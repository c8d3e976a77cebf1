"""The synthetic world keeps its own laws."""

import pytest
import torch

from flexkern.demo import PixelDecoder, encode_pixels, encode_prompts, world

PROMPT = "a red disc and a blue square on dark green, fast"


def scenes_of(count):
    generator = torch.Generator().manual_seed(0)
    everything = world.all_scenes()
    return [everything[i] for i in torch.randperm(len(everything), generator=generator)[:count]]


def test_prompts_and_scenes_are_inverse():
    assert str(world.Scene.parse(PROMPT)) == PROMPT
    assert all(world.Scene.parse(str(scene)) == scene for scene in scenes_of(50))
    assert world.Scene.parse("A red disc and a  blue square on dark green.").speed == "steady"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red disc",
        "a red disc and a red square on black, fast",
        "a pink disc and a red square on black",
        PROMPT + " x",
    ],
)
def test_other_prompts_are_refused_with_the_grammar(prompt):
    with pytest.raises(ValueError, match="knows prompts like .*magenta.*triangle.*dark blue.*steady.*; got "):
        encode_prompts([PROMPT, prompt])


def test_an_eighth_of_the_prompts_is_held_out_and_covers_every_word():
    held = [scene for scene in world.all_scenes() if world.held_out(scene)]
    assert len(world.all_scenes()) == 4050
    assert 450 < len(held) < 560
    words = " ".join(map(str, held))
    assert all(word in words for word in (*world.COLOURS, *world.SHAPES, *world.GROUNDS, *world.SPEEDS))


def test_embeddings_tell_whose_colour_is_whose():
    one, other = encode_prompts([PROMPT, "a blue disc and a red square on dark green, fast"])
    assert one.shape == (world.TEXT_LEN, world.TEXT_DIM)
    assert one[:, : len(world.WORDS)].sum(0).equal(other[:, : len(world.WORDS)].sum(0))  # the same words
    as_set = lambda rows: {tuple(row) for row in rows.tolist()}
    assert as_set(one) != as_set(other)
    assert not one[-1].any()


def test_reflect_folds_and_keeps_speed():
    straight = torch.linspace(-30, 70, 401)
    folded = world.reflect(straight, 7, 29)
    assert folded.min() >= 7
    assert folded.max() <= 29
    inside = straight.ge(7) & straight.le(29)
    torch.testing.assert_close(folded[inside], straight[inside])
    steps = folded.diff().abs()
    assert (steps - 0.25).abs().lt(1e-4).float().mean() > 0.98  # less only where it turns between two samples


def test_shapes_move_at_the_prompt_speed_and_stay_inside():
    scenes = scenes_of(40)
    centres = world.Motion.random(scenes).at(torch.arange(100))
    assert centres.min() >= world.RIM + world.RADIUS - 1e-4
    assert centres.max() <= world.SIZE - world.RIM - world.RADIUS + 1e-4
    speed = centres.diff(dim=1).norm(dim=-1).median(dim=1).values
    expected = torch.tensor([[world.SPEEDS[scene.speed]] for scene in scenes])
    torch.testing.assert_close(speed, expected.expand_as(speed), atol=1e-3, rtol=0)


def test_clips_begin_with_both_shapes_in_view():
    start = world.Motion.random(scenes_of(500)).position
    distance = (start[:, 0] - start[:, 1]).norm(dim=-1)
    assert distance.ge(2 * world.RADIUS + 2).float().mean() > 0.99
    assert distance.max() > 25


def test_pictures_show_the_scene():
    scene = world.Scene.parse("a red disc and a blue square on dark green, slow")
    centres = torch.tensor([[[[10.0, 10.0], [24.0, 24.0]], [[18.0, 18.0], [20.0, 18.0]]]])
    apart, hidden = (world.render([scene], centres)[0] + 1) / 2
    pixel = lambda picture, x, y: picture[:, y, x].tolist()
    assert pixel(apart, 10, 10) == pytest.approx(world.COLOURS["red"])
    assert pixel(apart, 24, 24) == pytest.approx(world.COLOURS["blue"])
    assert pixel(apart, 24 + 3, 24 + 3) == pytest.approx(world.COLOURS["blue"])  # a square has corners
    assert pixel(apart, 10 + 4, 10 + 4) == pytest.approx(world.GROUNDS["dark green"])  # a disc has none
    assert pixel(hidden, 19, 18) == pytest.approx(world.COLOURS["red"])  # the first named is in front
    areas = {
        shape: world.coverage(shape, torch.cartesian_prod(*[torch.arange(-9, 9) + 0.5] * 2)).sum()
        for shape in world.SHAPES
    }
    assert areas["disc"] == pytest.approx(torch.pi * world.RADIUS**2, rel=0.02)
    assert areas["triangle"] < 0.7 * areas["square"]


def test_the_decoder_makes_watchable_pictures_of_the_same_colours():
    scene = world.Scene.parse(PROMPT)
    pixels = PixelDecoder()(world.clips([scene], frames=4))
    assert pixels.shape == (1, 4, 288, 288, 3)
    assert pixels.dtype == torch.uint8
    shown = {tuple(c) for c in pixels[0, 0].flatten(0, 1).tolist()}
    assert tuple(round(255 * c) for c in world.COLOURS["red"]) in shown


def test_the_encoder_takes_back_what_the_decoder_made():
    clip = world.clips(scenes_of(2), frames=3)
    torch.testing.assert_close(encode_pixels(PixelDecoder()(clip)), clip, atol=0.25, rtol=0)
    assert (encode_pixels(PixelDecoder()(clip)) - clip).abs().mean() < 0.02
