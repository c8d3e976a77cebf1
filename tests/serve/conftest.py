"""Servers to ask, see ``serving``."""

import pytest


@pytest.fixture
def server(tmp_path):
    from serving import serving

    with serving(tmp_path / "videos") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server for tests that leave it as it was."""
    from serving import Limits, serving

    with serving(tmp_path_factory.mktemp("videos"), limits=Limits(queued=1000)) as running:
        yield running
