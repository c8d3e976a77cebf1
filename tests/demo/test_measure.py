"""The demo's yardstick: full marks for the world itself, and every way to spoil a clip lowers the figure it should."""

import dataclasses
import random

import pytest
import torch

from flexkern.demo import world
from flexkern.demo.measure import FIGURES, curves, measure, summary, unmix

FRAMES = 42
SCENES = random.Random(1).sample([scene for scene in world.all_scenes() if world.held_out(scene)], 12)
OTHER = {"disc": "triangle", "square": "disc", "triangle": "square"}
FAR = -99.0  # outside the picture


def start(seed=0):
    return world.Motion.random(SCENES, torch.Generator().manual_seed(seed))


def centres():
    return start().at(torch.arange(FRAMES))


def swapped(change):
    """The same motion with other scenes than the prompts say."""
    return world.render([dataclasses.replace(scene, **change(scene)) for scene in SCENES], centres())


def figures(videos, scenes=SCENES):
    return {name: values.nanmean().item() for name, values in summary(measure(videos, scenes)).items()}


def foreign_colour(scene):
    third = next(c for c in world.COLOURS if c not in scene.colours)
    return {"colours": (third, scene.colours[1])}


@pytest.fixture(scope="module")
def truth():
    return world.render(SCENES, centres())


def test_the_world_gets_full_marks(truth):
    marks = measure(truth, SCENES)
    mean = {name: values.nanmean().item() for name, values in summary(marks).items()}
    assert min(mean["identity"], mean["colour"], mean["shape"]) >= 0.98
    assert abs(mean["speed"] - 1) < 0.02 and (summary(marks)["speed"] - 1).abs().max() < 0.05
    assert min(mean["course"], mean["bounce"]) >= 0.99
    assert mean["ground"] < 1e-4 and mean["surplus"] < 1e-4
    assert 0.2 < mean["touching"] < 0.6  # so the clips do test one shape in front of another
    judged = (~marks.identity.isnan()).float().mean((0, 1))
    assert judged[0] == 1 and judged[1] > 0.9


def test_one_frame_has_no_motion(truth):
    mean = figures(truth[:, :1])
    assert mean["identity"] >= 0.95 and mean["speed"] != mean["speed"] and mean["course"] != mean["course"]


@pytest.mark.parametrize("amount", [0.05, 0.1])
def test_a_little_noise_costs_little(truth, amount):
    mean = figures((truth + amount * torch.randn_like(truth)).clamp(-1, 1))
    assert mean["identity"] > 0.95 and abs(mean["speed"] - 1) < 0.1 and mean["course"] > 0.9


def test_a_frozen_clip_does_not_move(truth):
    mean = figures(truth[:, :1].expand_as(truth))
    assert mean["speed"] < 0.01 and mean["course"] < 0.01
    assert mean["identity"] >= 0.9  # it is still the right picture


@pytest.mark.parametrize("factor", [0.5, 1.6])
def test_another_speed_shows(factor):
    motion = start()
    slower = world.Motion(position=motion.position, velocity=factor * motion.velocity)
    mean = figures(world.render(SCENES, slower.at(torch.arange(FRAMES))))
    assert mean["speed"] == pytest.approx(factor, rel=0.1)


def test_a_random_walk_keeps_no_course():
    angle = 2 * torch.pi * torch.rand(len(SCENES), FRAMES, 2)
    speed = torch.tensor([world.SPEEDS[scene.speed] for scene in SCENES])[:, None, None, None]
    steps = speed * torch.stack((angle.cos(), angle.sin()), dim=-1)
    low = world.RIM + world.RADIUS
    walk = world.reflect(start().position[:, None] + steps.cumsum(1), low, world.SIZE - low)
    mean = figures(world.render(SCENES, walk))
    assert mean["course"] < 0.5 and mean["identity"] >= 0.98


def test_shapes_that_pass_through_the_wall_and_return_do_not_bounce():
    low, width = world.RIM + world.RADIUS, world.SIZE - 2 * (world.RIM + world.RADIUS)
    motion = start()
    straight = motion.position[:, None] + motion.velocity[:, None] * torch.arange(FRAMES)[:, None, None]
    mean = figures(world.render(SCENES, low + (straight - low).remainder(width)))
    assert mean["bounce"] < 0.2 and mean["course"] > 0.6


def test_shapes_that_stick_to_the_wall_do_not_bounce():
    low = world.RIM + world.RADIUS
    motion = start()
    straight = motion.position[:, None] + motion.velocity[:, None] * torch.arange(FRAMES)[:, None, None]
    mean = figures(world.render(SCENES, straight.clamp(low, world.SIZE - low)))
    assert mean["course"] < 0.75


def test_a_foreign_colour_is_no_identity():
    mean = figures(swapped(foreign_colour))
    assert mean["colour"] < 0.55 and mean["identity"] < 0.55 and mean["surplus"] > 0.02


def test_swapped_colours_are_no_identity():
    scenes = [dataclasses.replace(scene, shapes=("disc", "triangle")) for scene in SCENES]
    wrong = [dataclasses.replace(scene, colours=scene.colours[::-1]) for scene in scenes]
    assert figures(world.render(wrong, centres()), scenes)["identity"] < 0.1


def test_a_blend_of_both_colours_is_neither(truth):
    one, two = (torch.tensor([world.COLOURS[s.colours[i]] for s in SCENES])[:, None, :, None, None] for i in (0, 1))
    cover = ((truth + 1) / 2 - torch.tensor([world.GROUNDS[s.ground] for s in SCENES])[:, None, :, None, None]).abs()
    melted = torch.where(cover.sum(2, keepdim=True) > 0.9, one + two - 1, truth)
    assert figures(melted)["colour"] < 0.2


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_shape_shows(which):
    where = centres()
    where[:, 5:, which] = FAR
    mean = figures(world.render(SCENES, where))
    assert mean["identity"] < 0.65 and mean["colour"] < 0.65


def test_a_short_absence_behind_the_first_is_forgiven_and_a_long_one_is_not():
    scene = world.Scene(colours=("red", "blue"), shapes=("disc", "disc"), ground="black", speed="fast")
    place = torch.full((1, 60, 2, 2), 18.0)
    place[:, :5, 1, 0] = torch.tensor([28.0, 26, 24, 22, 20])
    identity = measure(world.render([scene], place), [scene]).identity[0, :, 1]
    assert (identity[:4] == 1).all() and identity[5:12].isnan().all() and (identity[14:] == 0).all()


def test_another_shape_shows():
    mean = figures(swapped(lambda scene: {"shapes": tuple(OTHER[shape] for shape in scene.shapes)}))
    assert mean["shape"] < 0.1 and mean["identity"] < 0.1


def test_a_third_shape_shows(truth):
    extra = [dataclasses.replace(scene, **foreign_colour(scene)) for scene in SCENES]
    where = start(1).at(torch.arange(FRAMES))
    where[:, :, 1] = FAR
    intruder = world.render(extra, where)
    empty = world.render(extra, torch.full_like(where, FAR))
    mean = figures(torch.where((intruder - empty).abs().sum(2, keepdim=True) > 0.05, intruder, truth))
    assert mean["surplus"] > 0.03


def test_a_duplicate_shows():
    scene = world.Scene(colours=("red", "blue"), shapes=("disc", "square"), ground="black", speed="slow")
    place = torch.tensor([[10.0, 10.0], [10.0, 26.0]]).expand(1, 4, 2, 2)
    twin = world.render([scene], place + torch.tensor([[16.0, 0.0], [0.0, 0.0]]))
    both = torch.maximum(world.render([scene], place), twin)
    assert figures(both, [scene])["surplus"] > 0.04


def test_a_shifted_ground_shows_and_is_not_held_against_the_shapes(truth):
    ground = torch.tensor([world.GROUNDS[scene.ground] for scene in SCENES])[:, None, :, None, None]
    plain = ((truth + 1) / 2 - ground).abs().amax(2, keepdim=True) < 1e-4
    mean = figures(torch.where(plain, truth + 2 * 0.1, truth))
    assert mean["ground"] == pytest.approx(0.1 * 3**0.5, rel=0.01)
    assert mean["identity"] > 0.9


def test_unmix_recovers_the_shares():
    share = torch.rand(5, 2, 1, 1) * 0.5
    colours = torch.tensor([[world.COLOURS["green"], world.COLOURS["cyan"]]]).expand(5, -1, -1)
    base = torch.tensor(world.GROUNDS["grey"]).expand(5, -1)[..., None, None]
    pixels = base + (share[:, :, None] * (colours[..., None, None] - base[:, None])).sum(1)
    found, foreign = unmix(pixels, base, colours)
    assert not foreign.any()
    assert torch.allclose(found, share * (share > 0.1), atol=1e-5)


def test_curves_are_local_and_agree_with_the_summary(truth):
    broken = truth.clone()
    broken[:, FRAMES // 2 :] = broken[:, FRAMES // 2 : FRAMES // 2 + 1]
    marks = measure(broken, SCENES)
    lines = curves(marks, 7)
    assert lines.keys() == set(FIGURES) and all(line.shape == (len(SCENES), FRAMES) for line in lines.values())
    assert lines["speed"][:, 12].nanmean() > 0.9 and lines["speed"][:, 34].nanmean() < 0.01
    whole = curves(marks, 2 * FRAMES + 1)["identity"]
    assert torch.allclose(whole, summary(marks)["identity"][:, None].expand_as(whole), atol=1e-5)


def test_videos_are_measured_one_by_one(truth):
    together, alone = measure(truth, SCENES), measure(truth[3:4], SCENES[3:4])
    for name in FIGURES:
        one, other = getattr(together, name)[3:4], getattr(alone, name)
        assert torch.allclose(one, other, atol=1e-5, equal_nan=True), name
    assert together.between(3, 9).identity.shape == (len(SCENES), 6, 2)


def test_centres_are_where_the_shapes_are(truth):
    place, found = centres(), measure(truth, SCENES).centre
    alone = (place[:, :, 0] - place[:, :, 1]).norm(dim=-1) > 14
    assert (found - place)[alone].abs().max() < 0.3


@pytest.mark.parametrize("shape", [(2, 4, 3, 36, 36), (12, 3, 36, 36), (12, 4, 3, 32, 36), (12, 0, 3, 36, 36)])
def test_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"videos must be \[B, T, C, h, w\]"):
        measure(torch.zeros(shape), SCENES)
