"""pytest as a front end: `pytest bench/ --benchmark-only`, or one file of it."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        pytest.skip("pytest-benchmark is not installed; `python bench/bench_*.py` does not need it")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the benches that have a test; a file named on the command line is collected by pytest itself."""
    if parent.session.isinitpath(file_path) or not file_path.match("bench_*.py"):
        return None
    has_test = "harness.speed_test(" in file_path.read_text(encoding="utf-8")
    return pytest.Module.from_parent(parent, path=file_path) if has_test else None
