"""pytest as a front end: `pytest bench/bench_modulate.py --benchmark-only`."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        pytest.skip("pytest-benchmark is not installed; `python bench/bench_*.py` needs nothing")
