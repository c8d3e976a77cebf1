"""A small model on this process alone, and on ranks, which are started once a file."""

import pytest
from small_ranks import USUAL, make_model

from flexkern.engine import Engine
from flexkern.parallel import start_ranks


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    with start_ranks(request.param, "cpu") as started:
        yield started


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def one(model):
    """An engine of this process."""
    return Engine(model, **USUAL)


@pytest.fixture
def many(model, ranks):
    """An engine of the ranks."""
    return Engine(model, ranks=ranks, **USUAL)
