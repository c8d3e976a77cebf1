import pytest

from flexkern.policies import SinkWindow


def roll(policy: SinkWindow, chunk: int, chunks: int) -> list[list[int]]:
    """Absolute frames visible to each chunk, as a cache that drops what is not kept would list them."""
    cached, seen = [], []
    for n in range(chunks):
        new = list(range(n * chunk, (n + 1) * chunk))
        cached = [cached[i] for i in policy.keep(len(cached), chunk)] + new
        seen.append(list(cached))
    return seen


@pytest.mark.parametrize(
    "sink, window, chunk", [(0, 21, 3), (3, 12, 3), (1, 6, 3), (3, 21, 3), (2, 7, 1), (4, 7, 3), (0, 3, 3)]
)
def test_sees_the_sink_and_the_most_recent_frames(sink, window, chunk):
    for n, visible in enumerate(roll(SinkWindow(sink=sink, window=window), chunk, 15)):
        total = (n + 1) * chunk
        recent = range(max(0, total - (window - sink)), total)
        assert visible == sorted({*range(min(sink, total)), *recent})
        assert len(visible) == min(window, total)


def test_fifo_is_a_sliding_window():
    assert SinkWindow(sink=0, window=6).keep(10, 3) == [7, 8, 9]
    assert SinkWindow(sink=0, window=3).keep(10, 3) == []


def test_keeps_everything_until_the_window_fills():
    policy = SinkWindow(sink=3, window=12)
    assert policy.keep(0, 3) == []
    assert policy.keep(2, 3) == [0, 1]
    assert policy.keep(9, 3) == list(range(9))
    assert policy.keep(10, 3) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(sink=-1, window=6), ValueError, "sink must be >= 0 frames, got -1"),
        (dict(sink=6, window=6), ValueError, "window must exceed the sink of 6 frames, got 6"),
        (dict(sink=1.5, window=6), TypeError, "SinkWindow.sink must be an int, got 1.5"),
        (dict(sink=True, window=6), TypeError, "SinkWindow.sink must be an int, got True"),
    ],
)
def test_rejects_fields(fields, error, message):
    with pytest.raises(error, match=message):
        SinkWindow(**fields)


@pytest.mark.parametrize(
    "count, incoming, message",
    [
        (9, 4, r"window must hold the sink \(3\) and the incoming frames \(4\), got 6"),
        (-1, 3, "count must be an int >= 0 cached frames, got -1"),
        (9, 0, "incoming must be an int >= 1 frames, got 0"),
    ],
)
def test_rejects_arguments(count, incoming, message):
    with pytest.raises(ValueError, match=message):
        SinkWindow(sink=3, window=6).keep(count, incoming)
