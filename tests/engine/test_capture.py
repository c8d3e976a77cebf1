"""What captures on a GPU, with doubles of torch.cuda: its calls in their order, and what a failure leaves."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from flexkern.capture import CAPTURING, Captures, CudaRecorder

POOL = (0, 7)


class Stream:
    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch):
    """``said``: what was called, in order. ``current``: the stream. ``fails``: what the end of a capture raises."""
    here = SimpleNamespace(said=[], fails=None, ended=[])
    here.current = usual = Stream("usual", here.said)

    @contextmanager
    def device(which):
        here.said.append(f"on {which}")
        yield
        here.said.append("device back")

    @contextmanager
    def stream(one):
        before, here.current = here.current, one
        try:
            yield
        finally:
            here.current = before

    @contextmanager
    def graph(_, pool, one, capture_error_mode):
        before, here.current = here.current, one
        here.said.append(f"captures into {pool}, {capture_error_mode}")
        try:
            yield
        finally:
            if here.fails is not None:  # as torch: the stream stays the captured one
                raise here.fails
            here.current = before

    def end(index, pool):
        here.ended.append((index, pool))
        if here.fails is None:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    doubles = dict(
        Stream=lambda device: Stream("own", here.said), graph_pool_handle=lambda: POOL, device=device, stream=stream,
        graph=graph, CUDAGraph=lambda: SimpleNamespace(replay=lambda: here.said.append("replays")),
        current_stream=lambda: here.current, set_stream=lambda one: setattr(here, "current", one),
        current_device=lambda: 1,
    )  # fmt: skip
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    yield here
    assert here.current is usual and not CAPTURING.locked()


def run_of(cuda):
    return lambda: cuda.said.append(f"runs on {cuda.current.name}") or len(cuda.said)


def test_a_function_runs_once_and_is_captured_on_a_stream_that_both_wait_for(cuda):
    graph = CudaRecorder(torch.device("cuda:1")).capture(run_of(cuda))
    assert cuda.said == [
        "on cuda:1", "own waits for usual", "runs on own", "usual waits for own", f"captures into {POOL}, thread_local",
        "runs on own", "device back",
    ]  # fmt: skip
    assert graph.replay() == graph.out == 6 and cuda.said[-1] == "replays" and not cuda.ended


def test_a_run_that_fails_is_waited_for_and_not_captured(cuda):
    def fails():
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        CudaRecorder(torch.device("cuda")).capture(fails)
    assert cuda.said[-1] == "usual waits for own" and not cuda.ended


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(cuda, ends):
    """With torch's end of the capture, or in it: then the allocator hears of it from us."""
    cuda.fails = None if ends else RuntimeError("capture invalidated")
    runs = iter([None, ValueError("cannot be captured")])

    def fails_in_the_capture():
        if error := next(runs):
            raise error

    graphs = Captures(lambda: CudaRecorder(torch.device("cuda")), what="runs of a test", most=1)
    assert graphs.capture("key", lambda: (None, fails_in_the_capture)) is None
    assert graphs.why_not == "a capture failed with ValueError: cannot be captured"
    assert cuda.ended == [(1, POOL)]
