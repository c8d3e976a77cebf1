"""The world that needs memory: what a prompt says, what it leaves to the context, and what the dark hides."""

import dataclasses

import pytest
import torch

from flexkern.demo import rooms
from flexkern.demo.rooms import Rooms, Scene

SCENES = [Scene(shapes=("disc", "square"), speed="fast"), Scene(shapes=("triangle", "disc"), speed="slow")]


def made(seed):
    return Rooms.random(len(SCENES), torch.Generator().manual_seed(seed))


def test_a_prompt_and_its_scene_are_inverses():
    scenes = [scene.lit(on) for scene in rooms.all_scenes() for on in (True, False)]
    assert len({str(scene) for scene in scenes}) == 24
    assert [Scene.parse(str(scene)) for scene in scenes] == scenes
    assert Scene.parse("A disc and a square, fast.") == SCENES[0]


@pytest.mark.parametrize("prompt", ["a red disc and a square, fast", "a disc and a disc, fast", "a disc, fast", ""])
def test_other_prompts_are_refused_with_the_grammar(prompt):
    with pytest.raises(ValueError, match=r"knows prompts like .*disc/square/triangle, speeds slow/fast, lights off/on"):
        Scene.parse(prompt)


def test_lights_are_told_in_their_own_phrase_alone():
    on, off = (rooms.embed(SCENES[0].lit(lights)) for lights in (True, False))
    assert on.shape == (rooms.TEXT_LEN, rooms.TEXT_DIM)
    assert [row for row in range(rooms.TEXT_LEN) if not torch.equal(on[row], off[row])] == [6, 7]
    texts = {tuple(rooms.embed(scene).flatten().tolist()) for scene in rooms.all_scenes()}
    assert len(texts) == len(rooms.all_scenes())


def test_the_dark_hides_everything_that_no_prompt_says():
    """Rooms of the same motion differ when lit and are one and the same picture in the dark."""
    one, other = made(0), made(1)
    other = dataclasses.replace(other, position=one.position, heading=one.heading)
    lights = torch.tensor([True, False, True, False]).repeat_interleave(3)
    first, second = (rooms.clip(SCENES, room, lights.expand(2, -1)) for room in (one, other))
    assert first.shape == (2, 12, 3, rooms.SIZE, rooms.SIZE) and first.abs().max() <= 1
    assert torch.equal(first[:, ~lights], second[:, ~lights])
    assert (first[:, lights] - second[:, lights]).abs().mean((1, 2, 3, 4)).min() > 0.1


@pytest.mark.parametrize("name", ["ground", "wave", "phase", "hue", "core", "radius", "share"])
def test_every_look_shows_in_the_light(name):
    one = made(0)
    other = dataclasses.replace(one, **{name: getattr(made(1), name)})
    lights = torch.ones(2, 1, dtype=torch.bool)
    assert (rooms.clip(SCENES, one, lights) - rooms.clip(SCENES, other, lights)).abs().amax((1, 2, 3, 4)).min() > 0.2


def test_shapes_are_brighter_than_any_ground():
    room = Rooms.random(64, torch.Generator().manual_seed(2))
    assert rooms.ground(room).max() <= rooms.GROUND + 1e-6
    hues = torch.linspace(0, 1, 101)
    assert rooms.colour(hues).amax(-1).min() >= 0.75 - 1e-6
    assert torch.allclose(rooms.colour(hues), rooms.colour(hues + 3), atol=1e-5)


def test_shapes_keep_their_speed_and_stay_inside():
    centres = made(3).centres(SCENES, torch.arange(200))
    assert centres.min() >= rooms.MARGIN and centres.max() <= rooms.SIZE - rooms.MARGIN
    steps = (centres[:, 1:] - centres[:, :-1]).norm(dim=-1)
    for row, scene in zip(steps, SCENES, strict=True):
        assert row.median().item() == pytest.approx(rooms.SPEEDS[scene.speed], rel=1e-4)
        assert row.max() <= rooms.SPEEDS[scene.speed] + 1e-4


def test_the_first_named_is_in_front():
    room = made(4)
    centres = torch.full((2, 1, 2, 2), 32.0)
    picture = (rooms.render(SCENES, room, centres, torch.ones(2, 1, dtype=torch.bool)) + 1) / 2
    torch.testing.assert_close(picture[:, 0, :, 32, 32], rooms.colour(room.core[:, 0]), atol=1e-5, rtol=0)


def test_the_script_is_dark_for_longer_than_the_window():
    lights = rooms.script(252)
    assert lights[: rooms.TRAIN_FRAMES].all()
    changes = rooms.switches(lights)
    assert changes[:4] == [(0, True), (21, False), (45, True), (57, False)]
    assert all(frame % rooms.CHUNK == 0 for frame, _ in changes)
    lengths = [after - frame for (frame, on), (after, _) in zip(changes, changes[1:], strict=False) if not on]
    assert min(lengths) > 21
    with pytest.raises(ValueError, match="whole chunks of 3 frames, got 21, 20 and 12"):
        rooms.script(252, dark=20)
