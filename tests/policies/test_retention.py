from collections import defaultdict

import pytest

from flexkern.policies import Blend, ChosenTokens, Kept, RetentionPolicy, SinkWindow


def roll(policy: SinkWindow, chunk: int, chunks: int) -> list[list[int]]:
    """Absolute frames visible to each chunk, as a cache that drops what is not kept would list them."""
    cached, seen = [], []
    for n in range(chunks):
        new = list(range(n * chunk, (n + 1) * chunk))
        cached = [cached[i] for i in policy.keep(cached, chunk).pages] + new
        seen.append(list(cached))
    return seen


def kept(policy: SinkWindow, count: int) -> list[int]:
    return list(policy.keep(range(count), 3).pages)


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
    assert (policy.capacity, policy.pages, policy.pinned) == (12, 12, 3)
    assert policy.keep([], 3) == Kept(pages=())


def test_a_blend_is_checked():
    assert Blend(frame=5, indices=(0, 1), weights=(0.5, 0.5)).averaged == ()
    with pytest.raises(ValueError, match="a weight for each index, got 1 for 2"):
        Blend(frame=5, indices=(0, 1), weights=(1.0,))
    with pytest.raises(ValueError, match=r"averaged must be among the indices \[0, 1\], got \[2, 3\]"):
        Blend(frame=5, indices=(0, 1), weights=(0.5, 0.5), averaged=(1, 2, 3))


class Sums:
    """A cache on paper: of each page the frame it counts as, and the share of every frame in it.

    A share of a frame's mean over its tokens is told apart from one of the frame itself.
    """

    def __init__(self, policy: SinkWindow):
        self.policy, self.frames, self.held, self.made = policy, [], [], 0

    def step(self, chunk: int) -> list[dict]:
        """What attention sees of the frames before, when the next chunk is computed."""
        kept = self.policy.keep(self.frames, chunk)
        frames, held = [], []
        for page in kept.pages:
            if isinstance(page, Blend):
                shares = defaultdict(float)
                for index, weight in zip(page.indices, page.weights, strict=True):
                    for share, part in self.held[index].items():
                        mean = (share, "mean") if index in page.averaged else share
                        shares[mean] += weight * part
                frames.append(page.frame)
                held.append(dict(shares))
            else:
                frames.append(self.frames[page])
                held.append(self.held[page])
        seen = range(len(held)) if kept.seen is None else kept.seen
        assert len(seen) + chunk <= self.policy.capacity and len(held) + chunk <= self.policy.pages
        new = range(self.made, self.made + chunk)
        self.frames, self.held, self.made = [*frames, *new], [*held, *({i: 1.0} for i in new)], self.made + chunk
        return [held[i] for i in seen]


def shares(page: dict) -> dict:
    return {share: pytest.approx(part) for share, part in page.items()}


def test_frames_that_leave_are_merged_into_the_sink_one_by_one():
    """Reward-Forcing: sink <- 0.999 sink + 0.001 evicted, the i-th into the i-th."""
    paper = Sums(SinkWindow(sink=3, window=9, evicted="sink", sink_rate=0.25))
    for _ in range(3):
        assert all(list(page.values()) == [1.0] for page in paper.step(3))
    for step in range(4):
        seen = paper.step(3)
        for i in range(3):
            merged = range(3 + i, 6 + 3 * step, 3)
            expected = {i: 0.75 ** len(merged)} | {f: 0.25 * 0.75 ** ((merged[-1] - f) // 3) for f in merged}
            assert seen[i] == shares(expected)
        assert seen[3:] == [{f: 1.0} for f in range(6 + 3 * step, 9 + 3 * step)]
    assert paper.frames[:3] == [0, 1, 2]  # where they sit does not change


def test_more_or_fewer_frames_than_the_sink_holds_are_merged_too():
    paper = Sums(SinkWindow(sink=2, window=6, evicted="sink", sink_rate=0.5))
    paper.step(3), paper.step(3)
    assert paper.step(3) == [{0: 0.25, 2: 0.25, 4: 0.5}, {1: 0.5, 3: 0.5}, {5: 1.0}]
    one = Sums(SinkWindow(sink=2, window=4, evicted="sink", sink_rate=0.5))
    for _ in range(4):
        one.step(1)
    assert one.step(1) == [{0: 0.5, 2: 0.5}, {1: 1.0}, {3: 1.0}]


def test_frames_that_leave_are_merged_into_a_slow_and_a_fast_memory():
    """MemRoPE: the two frames behind the sink make room for the memory, and are gone."""
    paper = Sums(SinkWindow(sink=3, window=12, evicted="memory", slow_rate=0.25, fast_rate=0.5))
    for _ in range(4):
        paper.step(3)
    third = 1 / 3
    first = {(f, "mean"): third for f in (5, 6, 7)}
    assert paper.step(3) == [*({i: 1.0} for i in range(3)), *[shares(first)] * 2, *({i: 1.0} for i in range(8, 12))]
    assert paper.frames == [0, 1, 2, 7, 7, 8, 9, 10, 11, 12, 13, 14]
    seen = paper.step(3)
    new = lambda rate: shares(
        {(f, "mean"): (1 - rate) * third for f in (5, 6, 7)} | {(f, "mean"): rate * third for f in (8, 9, 10)}
    )
    assert seen[3:5] == [new(0.25), new(0.5)] and seen[5] == {11: 1.0}
    assert paper.frames[3:5] == [10, 10]


def test_a_memory_of_frames_keeps_places_apart():
    paper = Sums(SinkWindow(sink=0, window=6, evicted="memory", average="frames"))
    for _ in range(2):
        paper.step(2)
    paper.step(2)
    assert paper.step(2)[:2] == [shares({2: 0.5, 3: 0.5})] * 2


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_sink_stands_for_older_frames_forwards_and_back(chunk):
    """Rolling Sink's code, block by block: it picks three frames of 18, and turns them round on the way back."""
    sink, window = 18, 21
    paper = Sums(SinkWindow(sink=sink, window=window, evicted="sweep"))
    rolled = {}  # what stands in a place of the video
    for start in range(0, 120, chunk):
        for place in range(start - 3):
            if place >= sink and place not in rolled:
                block, own = 3 * (place // 3), place % 3
                back = (block // sink) % 2 == 1
                low = sink - block % sink - 3 if back else block % sink
                rolled[place] = low + (2 - own if back else own)
        seen = [next(iter(page)) for page in paper.step(chunk)]
        assert seen == [rolled.get(place, place) for place in range(max(0, start + chunk - window), start)]
        assert len(paper.frames) <= 24


def test_a_sweep_counts_from_the_first_frame_of_the_video():
    policy = SinkWindow(sink=2, window=4, evicted="sweep")
    assert policy.pages == 6
    assert policy.keep([10, 11, 14, 15], 2) == Kept(pages=(0, 1, 2, 3), seen=(2, 3))
    assert policy.keep([10, 11, 12, 13, 14], 1) == Kept(pages=(0, 1, 3, 4), seen=(1, 2, 3))


def test_a_full_window_is_left_with_its_budget():
    """Deep Forcing: every second chunk, from the eighth on, 16 frames of 21: sink 10, tokens of two, and the last 4."""
    policy = SinkWindow(sink=10, window=21, evicted="choose")
    frames, seen = [], []
    for n in range(12):
        kept = policy.keep(frames, 3)
        chosen = [page for page in kept.pages if isinstance(page, ChosenTokens)]
        seen.append((len(kept.pages) + 3, len(chosen)))
        if chosen:
            assert len({*chosen}) == 1 and chosen[0].frame == 0
            assert chosen[0].indices == tuple(range(10, len(frames) - 1))
            assert kept.pages == (*range(10), *chosen, len(frames) - 1)
        frames = [p.frame if isinstance(p, ChosenTokens) else frames[p] for p in kept.pages] + list(
            range(3 * n, 3 * n + 3)
        )
        assert len(frames) <= policy.pages
    assert seen == [(3 * n + 3, 0) for n in range(7)] + [(16, 2), (19, 0), (16, 2), (19, 0), (16, 2)]
    assert frames == [*range(10), 0, 0, 32, 33, 34, 35]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(sink=10, budget=14),
            r"budget must exceed the sink \(10\) and the recent frames \(4\) and fit into .* got 14",
        ),
        (dict(sink=10, budget=22), "fit into the window of 21, got 22"),
        (dict(sink=1, reuse=0), "reuse must be at least 1, got 0"),
    ],
)
def test_a_budget_has_room_for_chosen_tokens(fields, message):
    with pytest.raises(ValueError, match=message):
        SinkWindow(window=21, evicted="choose", **fields)


def test_frames_that_are_computed_are_recent():
    with pytest.raises(ValueError, match=r"retention.recent must be at least the incoming frames \(5\), got 4"):
        SinkWindow(sink=10, window=21, evicted="choose").keep([], 5)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(sink=0, window=6, evicted="sink"), ValueError, "evicted 'sink' needs a sink of at least 1 frame, got 0"),
        (dict(sink=0, window=6, evicted="sweep"), ValueError, "evicted 'sweep' needs a sink of at least 1 frame"),
        (dict(sink=1, window=6, evicted="away"), ValueError, "SinkWindow.evicted must be .*'sweep'.*got 'away'"),
        (dict(sink=1, window=6, sink_rate=1.5), ValueError, r"sink_rate must be in \[0, 1\], got 1.5"),
        (dict(sink=1, window=6, fast_rate=-0.1), ValueError, r"fast_rate must be in \[0, 1\], got -0.1"),
    ],
)
def test_rejects_what_becomes_of_frames(fields, error, message):
    with pytest.raises(error, match=message):
        SinkWindow(**fields)


def test_a_memory_needs_room_in_the_window():
    policy = SinkWindow(sink=3, window=7, evicted="memory")
    with pytest.raises(ValueError, match=r"hold the sink \(3\), the memory \(2\) and the incoming frames \(3\), got 7"):
        policy.keep([], 3)
