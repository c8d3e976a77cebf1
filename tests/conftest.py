import os
import signal

import hanging
import pytest
import torch

from flexkern.kernels import HOPPER, PORTABLE, lacking

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any `import triton`
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a script's background job ignores Ctrl-C, and hands that down to the renders that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(min(4, torch.get_num_threads()))  # the shapes are small; more threads only contend
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: one thread each, and for their children
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TRITON = {  # test files that import kernels, and what these need
    "bench/test_bench.py": PORTABLE,
    "bench/test_bench_engine.py": PORTABLE,
    "bench/test_bench_vae.py": PORTABLE,
    "bench/test_default_path.py": PORTABLE,
    "kernels/test_add_norm_silu.py": PORTABLE,
    "kernels/test_causal_conv.py": HOPPER,
    "kernels/test_compile.py": HOPPER,
    "kernels/test_frame_attention.py": PORTABLE,
    "kernels/test_frame_attention_hopper.py": HOPPER,
    "kernels/test_add_modulate.py": PORTABLE,
    "kernels/test_gate_residual.py": PORTABLE,
    "kernels/test_modulate.py": PORTABLE,
    "kernels/test_norm_rope_write.py": PORTABLE,
    "kernels/test_prepared.py": HOPPER,
    "kernels/test_rms_norm.py": PORTABLE,
    "kernels/test_select.py": PORTABLE,
    "kernels/test_to_bytes.py": PORTABLE,
}


def lacks_triton(needed):
    """Why tests that need this version of Triton are skipped, None where they run."""
    try:
        what = lacking(needed)
    except ImportError as error:
        return f"needs Triton >= {needed[0]}.{needed[1]}, and {error}"
    return what and f"needs {what}"


class Skipped(pytest.Module):
    """A test file that is not imported."""

    def collect(self):
        pytest.skip(lacks_triton(TRITON[self.name_in_tests]), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    name = "/".join(module_path.parts[-2:])
    if name in TRITON and lacks_triton(TRITON[name]):
        skipped = Skipped.from_parent(parent, path=module_path)
        skipped.name_in_tests = name
        return skipped
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        marker = item.get_closest_marker("triton")
        if marker and (why := lacks_triton(marker.args)):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def gpu_for_whoever_asks():
    """A GPU is for the tests that name it, by ``device`` or ``gpu``: all else, and every child, runs as without one.

    So a test expects the same on every machine, and eight processes of tests share a GPU only where it is tested.
    """
    if not CUDA:
        yield
        return
    torch.cuda.init()  # this process has seen its GPUs: what the environment says from here on is for children
    torch.cuda.device_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("flexkern.pipeline.default_device", lambda: "cpu")
        yield


@pytest.fixture(scope="session")
def uncaptured_stderr(pytestconfig):
    descriptor = hanging.uncaptured_stderr(pytestconfig)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def no_hanging_kernel(request, uncaptured_stderr):
    asks = request.node.get_closest_marker("gpu") or "device" in request.fixturenames
    if CUDA and asks and not request.config.getoption("usepdb"):
        with hanging.ends_after(hanging.SECONDS, uncaptured_stderr):
            yield
    else:
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def stop(monkeypatch):
    """Makes sessions raise an error instead of this chunk."""
    from flexkern.session import Session

    def at(chunk, error=KeyboardInterrupt):
        step = Session.step

        def stopped(session):
            if session.chunks == chunk:
                raise error
            return step(session)

        monkeypatch.setattr(Session, "step", stopped)

    yield at
    monkeypatch.undo()


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
