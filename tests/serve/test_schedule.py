"""Who gets which job, and what becomes of those that do not end well."""

import random
from collections import Counter

import pytest

from flexkern.serve.schedule import SET_ASIDE, Schedule


def made(jobs, *workers, **options):
    """A schedule of jobs, given as their keys, and idle workers."""
    schedule = Schedule(enumerate(jobs), **options)
    for worker in workers:
        schedule.enter(worker)
    return schedule


def test_a_worker_stays_with_its_model_as_long_as_there_are_jobs_for_it():
    schedule = made([0, 1] * 6, "a", "b")
    taken = {"a": [], "b": []}
    for worker in ("a", "b") * 6:
        number = schedule.take(worker)
        taken[worker].append(number % 2)
        schedule.end(worker, "done")
    assert set(taken["a"]) == {0} and set(taken["b"]) == {1} and not schedule.waiting


def test_a_worker_whose_model_has_no_jobs_left_helps_with_another():
    schedule = made([0] + [1] * 4, "a", "b")
    assert schedule.take("a") == 0 and schedule.take("b") == 1
    schedule.end("a", "done")
    assert schedule.take("a") == 2


@pytest.mark.parametrize(("ended", "verdict"), [("stopped", "stopped"), ("lost", "failed")])
def test_retries_are_bounded(ended, verdict):
    schedule = made([0], "a", retries=2)
    verdicts = []
    for i in range(3):
        schedule.enter(f"w{i}")
        assert schedule.take(f"w{i}") == 0
        verdicts.append(schedule.end(f"w{i}", ended))
        schedule.leave(f"w{i}")
    assert verdicts == ["again", "again", verdict] and not schedule.waiting


def test_a_job_that_fails_for_good_is_not_tried_again():
    schedule = made([0, 0], "a")
    schedule.take("a")
    assert schedule.end("a", "failed") == "failed" and schedule.waiting == 1


def test_a_try_that_got_further_uses_no_retry():
    schedule = made([0], "a", retries=0)
    for pictures in (30, 60, 90):
        assert schedule.take("a") == 0 and schedule.end("a", "lost", pictures=pictures) == "again"
    assert schedule.take("a") == 0 and schedule.end("a", "lost", pictures=90) == "failed"


def test_a_job_that_was_stopped_goes_to_another_worker():
    schedule = made([0, 0], "a", "b")
    assert schedule.take("a") == 0 and schedule.take("b") == 1
    schedule.end("a", "stopped")
    assert schedule.take("a") is None  # b will come
    schedule.end("b", "done")
    assert schedule.take("b") == 0


def test_the_only_worker_gets_its_job_again():
    schedule = made([0], "a")
    schedule.take("a")
    schedule.end("a", "stopped")
    assert schedule.take("a") == 0


def test_a_worker_that_ends_job_after_job_is_set_aside_before_it_eats_the_list():
    schedule = made([0] * 20, "full", "fine")
    for _ in range(SET_ASIDE):
        assert schedule.take("full") is not None
        assert schedule.end("full", "stopped") == "again"
    assert schedule.take("full") is None and schedule.usable == 1
    done = 0
    while schedule.take("fine") is not None:
        done += schedule.end("fine", "done") == "done"
    assert done == 20


def test_what_is_interrupted_waits_and_costs_nothing():
    schedule = made([0], "a", retries=0)
    schedule.take("a")
    assert schedule.end("a", "interrupted") == "waiting" and schedule.waiting == 1 and schedule.tries(0) == 0


def test_tries_of_an_earlier_run_count_where_they_are_remembered():
    schedule = made([0], "a", retries=1)
    schedule.remember(0, tries=1, pictures=6)
    assert schedule.take("a") == 0 and schedule.end("a", "lost", pictures=6) == "failed"


def test_negative_retries_are_refused():
    with pytest.raises(ValueError, match="retries must be at least 0, got -1"):
        made([0], retries=-1)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_job_gets_one_verdict(seed):
    """Workers come, go and fail at random; no job is lost, none is judged twice, and it ends."""
    chance = random.Random(seed)
    jobs = [chance.randrange(3) for _ in range(60)]
    schedule, idle, verdicts, count = made(jobs, retries=2), [], Counter(), 0
    while sum(verdicts.values()) < len(jobs):
        if len(idle) + len(schedule.running) < 4 or (not schedule.running and not schedule.usable):
            schedule.enter(f"w{count}")
            idle.append(f"w{count}")
            count += 1
        idle = [worker for worker in idle if schedule.take(worker) is None]
        if not schedule.running:
            continue
        assert len(set(schedule.running.values())) == len(schedule.running)
        worker = chance.choice(sorted(schedule.running))
        number = schedule.running[worker]
        ended = chance.choices(("done", "stopped", "lost", "failed", "interrupted"), (50, 20, 20, 5, 5))[0]
        if schedule.end(worker, ended, pictures=chance.randrange(0, 60, 3)) in ("done", "failed", "stopped"):
            verdicts[number] += 1
        if ended == "lost":
            schedule.leave(worker)
        else:
            idle.append(worker)
    assert set(verdicts) == set(range(60)) and set(verdicts.values()) == {1}
    assert not schedule.waiting and not schedule.running
