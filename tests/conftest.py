import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any `import triton`
torch.set_num_threads(min(4, torch.get_num_threads()))  # the shapes are small; more threads only contend


def pytest_collection_modifyitems(items):
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> str:
    return "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """What a launcher allocates like an input is NaN until its kernel writes it."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))


@pytest.fixture
def poisoned_memory():
    """Every torch.empty is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
