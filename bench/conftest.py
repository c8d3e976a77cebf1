"""pytest as a front end: `pytest bench/bench_modulate.py --benchmark-only`."""

import importlib.util

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        pytest.skip("pytest-benchmark is not installed; `python bench/bench_*.py` needs nothing")
