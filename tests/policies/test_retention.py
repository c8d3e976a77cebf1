import pytest

from flexkern.policies import Blend, RetentionPolicy, SinkWindow


def roll(policy: SinkWindow, chunk: int, chunks: int) -> list[list[int]]:
    """Absolute frames visible to each chunk, as a cache that drops what is not kept would list them."""
    cached, seen = [], []
    for n in range(chunks):
        new = list(range(n * chunk, (n + 1) * chunk))
        cached = [cached[i] for i in policy.keep(cached, chunk).indices] + new
        seen.append(list(cached))
    return seen


def kept(policy: SinkWindow, count: int) -> list[int]:
    return list(policy.keep(range(count), 3).indices)


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
    assert kept(SinkWindow(sink=0, window=6), 10) == [7, 8, 9]
    assert kept(SinkWindow(sink=0, window=3), 10) == []


def test_keeps_everything_until_the_window_fills():
    policy = SinkWindow(sink=3, window=12)
    assert kept(policy, 0) == []
    assert kept(policy, 2) == [0, 1]
    assert kept(policy, 9) == list(range(9))
    assert kept(policy, 10) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


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
    "frames, incoming, message",
    [
        (range(9), 4, r"window must hold the sink \(3\) and the incoming frames \(4\), got 6"),
        ([0, -1], 3, r"frames must be indices >= 0 of cached frames, got \[0, -1\]"),
        (range(9), 0, "incoming must be an int >= 1 frames, got 0"),
    ],
)
def test_rejects_arguments(frames, incoming, message):
    with pytest.raises(ValueError, match=message):
        SinkWindow(sink=3, window=6).keep(frames, incoming)


def test_says_what_a_cache_asks():
    policy = SinkWindow(sink=3, window=12)
    assert isinstance(policy, RetentionPolicy)
    assert (policy.capacity, policy.pinned, policy.keep([], 3).blends) == (12, 3, ())


def test_a_blend_needs_a_weight_for_each_index():
    assert Blend(indices=(0, 1), weights=(0.5, 0.5)).weights == (0.5, 0.5)
    with pytest.raises(ValueError, match="a weight for each index, got 1 for 2"):
        Blend(indices=(0, 1), weights=(1.0,))
