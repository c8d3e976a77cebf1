"""The watch over tests on a GPU: one that hangs ends its process, and the others go on."""

from pathlib import Path

from bare import run_python

HERE = Path(__file__).parent
HANGS = """
import pytest
from hanging import ends_after, uncaptured_stderr

@pytest.fixture(autouse=True)
def limited(pytestconfig):
    with ends_after(1.0, uncaptured_stderr(pytestconfig)):
        yield

def test_that_hangs():
    import threading
    threading.Event().wait()

def test_that_does_not():
    pass
"""


def test_a_test_that_hangs_ends_its_process_with_a_traceback(tmp_path):
    (tmp_path / "test_it.py").write_text(HANGS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {HERE / 'support'}\n")
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py", cwd=tmp_path)
    assert done.returncode == 1 and "Timeout (0:00:01)!" in done.stderr and "test_that_hangs" in done.stderr
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "does_not", "test_it.py", cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout
