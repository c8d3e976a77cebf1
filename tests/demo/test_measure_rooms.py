"""Films of rooms are judged right: the truth is perfect, and each fault shows in the figure that is for it."""

import dataclasses

import pytest
import torch

from flexkern.demo import rooms
from flexkern.demo.film_rooms import Case
from flexkern.demo.measure import curves
from flexkern.demo.measure_rooms import FIGURES, measure, summary

ALL = slice(3, None)


@pytest.fixture(scope="module")
def case():
    return Case.random(scenes=3, frames=63, seed=3)


@pytest.fixture(scope="module")
def truth(case):
    return case.truth()


def judged(films, case, over=ALL):
    return {name: values.mean().item() for name, values in summary(measure(films, case), over).items()}


def test_the_world_itself_is_perfect(truth, case):
    found = judged(truth, case)
    assert found["ground"] < 1e-6 and found["palette"] > 0.8 and found["course"] > 0.97
    assert found["speed"] == pytest.approx(1, abs=0.05) and found["area"] == pytest.approx(1, abs=0.1)


def test_another_room_moves_right_and_is_the_wrong_one(truth, case):
    other = Case.random(scenes=3, frames=63, seed=4).rooms
    room = dataclasses.replace(other, position=case.rooms.position, heading=case.rooms.heading)
    films = truth.clone()
    films[:, 45:] = dataclasses.replace(case, rooms=room).truth()[:, 45:]
    inside, beyond = judged(films, case, slice(3, 21)), judged(films, case, slice(21, None))
    assert inside["ground"] < 1e-6 and inside["palette"] > 0.8
    assert beyond["ground"] > 0.12 and beyond["palette"] < 0.3
    assert beyond["course"] > 0.95 and beyond["speed"] == pytest.approx(1, abs=0.05)


def test_memory_is_not_judged_in_the_dark(truth, case):
    marks = measure(truth, case)
    for name in ("ground", "palette"):
        assert torch.equal(getattr(marks, name).isnan(), ~case.lights.expand(3, -1))


def test_a_film_that_stands_still_has_no_course(truth, case):
    found = judged(torch.where(case.lights[:, None, None, None], truth[:, :1], truth[:, 21:22]), case)
    assert found["speed"] < 0.1 and found["course"] < 0.1 and found["ground"] < 1e-6


def test_a_shape_that_is_gone_is_missed(truth, case):
    gone = case.rooms.centres(case.scenes, torch.arange(63))
    gone[:, 10:, 1] = -99
    films = rooms.render(case.scenes, case.rooms, gone, case.lights.expand(3, -1))
    found = judged(films, case, slice(41, None))
    assert found["area"] < 0.75 and found["course"] < 0.6 and found["palette"] < 0.75


def test_a_film_of_nothing_but_glare_is_wrong_in_every_figure(truth, case):
    """Nothing is excused because there is nothing left to judge."""
    torch.manual_seed(0)
    films = torch.cat((truth[:, :3], torch.rand_like(truth[:, 3:])), dim=1)
    found = judged(films, case)
    assert found["ground"] > 0.3 and found["palette"] < 0.2 and found["course"] == 0 and found["area"] > 2


def test_a_tint_is_a_wrong_ground(truth, case):
    tinted = truth.clone()
    tinted[:, :, 0] += 0.2  # a tenth of the range
    assert judged(tinted, case)["ground"] == pytest.approx(0.1, abs=0.01)


def test_curves_have_a_figure_for_every_frame(truth, case):
    lines = curves(measure(truth, case), window=21)
    assert set(lines) == set(FIGURES)
    assert all(line.shape == (3, 63) for line in lines.values())
    assert lines["course"].nan_to_num(1).min() > 0.9


@pytest.mark.parametrize("shape", [(3, 63, 3, 32, 32), (2, 63, 3, 64, 64), (3, 64, 3, 64, 64), (3, 2, 3, 64, 64)])
def test_films_of_another_shape_are_refused(shape, case):
    with pytest.raises(ValueError, match=r"films must be \[B, T, C, h, w\] with B, C, h, w = \[3, 3, 64, 64\]"):
        measure(torch.zeros(shape), case)
