"""How far a work is: a bar belongs to a terminal, a file gets lines."""

import io

import pytest

from flexkern.render.meter import Meter, as_time


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, steps, total=120, **options):
    """What is said of steps of 3 that take 4 seconds each."""
    told = lambda: told.now
    told.now = 100.0
    with Meter("jobs", stream=stream, clock=told, **options) as meter:
        meter.begin(total)
        for step in range(steps):
            told.now += 4
            meter.advance(3, f"step {step}")
        meter.advance(0)
        meter.say("a word")
    return stream.getvalue()


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end():
    said = shown(io.StringIO(), 40, program="p").splitlines()
    assert len(said) == 15 and said[-1] == "p: a word"
    assert said[0] == "p: step 2, 9 of 120 jobs (8 %), 0.75 jobs/s, 2:28 left"
    assert said[-2] == "p: step 39, 120 of 120 jobs (100 %), 0.75 jobs/s, done"


def test_a_terminal_gets_a_bar_with_words_above_it():
    said = shown(Terminal(), 4, total=12)
    assert "\rstep 3 |" in said and "| 12/12 jobs [" in said and "flexkern: a word\n" in said and "/s, " not in said


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_where_nothing_is_shown_words_are_said(stream):
    assert shown(stream, 40, shown=False) == "flexkern: a word\n"


def test_nothing_to_do_is_all_of_it():
    assert shown(io.StringIO(), 0, total=0) == "flexkern: a word\n"


@pytest.mark.parametrize(("seconds", "words"), [(7.4, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_a_time_is_in_hours_minutes_and_seconds(seconds, words):
    assert as_time(seconds) == words
