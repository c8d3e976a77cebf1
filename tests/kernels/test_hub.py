"""kernels/ as the Hugging Face Hub hands it out: a folder at any path, loaded under a name of the loader's choice."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexkern.kernels import reference

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = [
    "add_modulate", "add_norm_silu", "frame_attention", "gate_residual", "modulate", "norm_rope_write", "rms_norm",
    "to_bytes",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A copy of the folder far from the repository, loaded as the Hub's `kernels` package loads one."""
    variant = tmp_path / "build/torch-cuda"
    shutil.copytree(ROOT / "kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    name = "_flexkern_cuda_0a1b2c3"
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for loaded in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[loaded]


@pytest.mark.triton(3, 4)
def test_the_folder_runs_under_another_name(hub, device):
    x, weight = torch.randn(2, 5, 384, device=device), torch.randn(384, device=device)
    torch.testing.assert_close(hub.rms_norm(x, weight), reference.rms_norm(x, weight))
    angle = torch.rand(2, 3, 1, 12, device=device)
    plan = (
        torch.tensor([2, 0, 1], dtype=torch.int32, device=device),
        torch.stack((angle.cos(), angle.sin()), dim=-1),
        torch.ones(2, device=device),
    )
    query, keys, values = (torch.randn(1, frames, 7, 2, 64, device=device) for frames in (2, 3, 3))
    torch.testing.assert_close(
        hub.frame_attention(query, keys, values, *plan)[0],
        hub.reference.frame_attention(query, keys, values, *plan)[0],
        atol=1e-3 if device == "cuda" else 1e-5,  # tf32
        rtol=1e-3,
    )
    home = Path(hub.__file__).parent
    ours = [module for key, module in sys.modules.items() if key.startswith(f"{hub.__name__}.")]
    assert ours and all(home in Path(module.__file__).parents for module in ours)


@pytest.mark.triton(3, 4)
def test_a_launcher_is_a_function_whoever_loads_its_file_first(hub):
    for name, module in hub.LAUNCHERS.items():
        file = importlib.import_module(f"{hub.__name__}.{module}")  # before anyone asks for the launcher
        assert getattr(hub, name) is getattr(file, name) and callable(getattr(hub, name))
    assert set(hub.__all__) == set(dir(hub)) == {*LAUNCHERS, "reference"}
    with pytest.raises(AttributeError, match="has no attribute 'attend'"):
        _ = hub.attend


def test_the_oracle_needs_no_triton():
    code = """
import sys; sys.modules["triton"] = None
from flexkern.kernels import reference
import flexkern.kernels
assert "flexkern.kernels.pointwise.rms_norm" not in sys.modules
try:
    flexkern.kernels.rms_norm
except ImportError as error:
    assert "triton" in str(error)
else:
    raise AssertionError
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_build_file_is_what_kernel_builder_reads():
    """The fields of edition 5 for a kernel that is not compiled ahead of time (huggingface/kernels, kernels-data)."""
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((ROOT / "kernels/build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"} and build["torch-noarch"] == {}
    assert set(build["general"]) == {"name", "version", "edition", "license", "backends"}
    assert build["general"]["edition"] == 5 and build["general"]["backends"] == ["cuda"]
    assert build["general"]["name"] == "flexkern" and build["general"]["license"] == "Apache-2.0"
