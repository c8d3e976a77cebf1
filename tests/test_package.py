"""What people install: an sdist, the wheel built from it, and an editable install all give the same modules."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from types import SimpleNamespace

import pytest

import flexkern

ROOT = Path(__file__).parent.parent
DATA = {".csv", ".json", ".safetensors", ".typed"}
EXTRAS = {"bench", "cluster", "docs", "flash-attn", "metrics", "model", "test", "video", "xformers"}
PROBE = """
import importlib, importlib.metadata, importlib.util, json
import flexkern, flexkern.kernels, flexkern.kernels.reference
spec = importlib.util.find_spec("kernels")
script, = importlib.metadata.entry_points(group="console_scripts", name="flexkern")
modules = flexkern, flexkern.kernels, flexkern.kernels.reference
print(json.dumps({
    "files": [module.__file__ for module in modules],
    "shadow": spec.origin if spec else None,
    "version": importlib.metadata.version("flexkern"),
    "command": callable(script.load()),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """The file that the build backend makes of `source`; kind: sdist | wheel | editable."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)
    (built,) = out.iterdir()
    return built


def install(wheel: Path, environment: Path) -> Path:
    """Python of a new environment that holds `wheel`, and sees what it needs in the environment of the tests.

    The .pth file adds the test environment as a plain folder, so hooks of an editable flexkern in it do not run.
    """
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=environment.parent,
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    folders = [path for path in sys.path if path.endswith("-packages")]
    Path(site, "needs.pth").write_text("\n".join(folders) + "\n")
    return python


@pytest.fixture(scope="session")
def package(tmp_path_factory) -> SimpleNamespace:
    """A copy of the sources, the sdist of the copy, the wheel of the unpacked sdist."""
    tmp = tmp_path_factory.mktemp("package")
    source = tmp / "source"
    for name in ("flexkern", "kernels", "tests", "bench"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, tmp / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked")
    (unpacked,) = (tmp / "unpacked").iterdir()
    return SimpleNamespace(tmp=tmp, source=source, sdist=sdist, wheel=build("wheel", unpacked, tmp / "wheel"))


def shipped(source: Path) -> set[str]:
    """Files of the source tree that belong in an install, by their place there."""
    paths = [*source.glob("flexkern/**/*"), *source.glob("kernels/**/*")]
    pages = {source / "kernels/README.md", source / "kernels/build.toml", *source.glob("flexkern/docs/*.md")}
    pages |= set(source.glob("flexkern/docs/examples/*.*"))
    paths = [p for p in paths if p.suffix == ".py" or p.suffix in DATA or p in pages]
    names = [p.relative_to(source).as_posix() for p in paths]
    return {f"flexkern/{name}" if name.startswith("kernels/") else name for name in names}


def test_wheel_holds_the_package_and_nothing_else(package):
    names = [name for name in zipfile.ZipFile(package.wheel).namelist() if ".dist-info/" not in name]
    assert "flexkern/kernels/reference.py" in names
    assert sorted(names) == sorted(shipped(package.source))


def test_wheel_says_what_it_is(package):
    with zipfile.ZipFile(package.wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("flexkern", flexkern.__version__)
    assert metadata["License-Expression"] == "Apache-2.0" and "The flexkern authors" in licence
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert "flexkern = flexkern.cli:main" in scripts


def test_sdist_holds_what_the_wheel_needs(package):
    with tarfile.open(package.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"LICENSE", "README.md", "flexkern/kernels/__init__.py", "pyproject.toml", "setup.py"} <= files
    assert not {name for name in files if name.startswith(("tests/", "bench/"))}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_gives_flexkern_and_no_kernels(package, kind):
    wheel = package.wheel if kind == "wheel" else build("editable", package.source, package.tmp / "editable")
    python = install(wheel, package.tmp / f"{kind}-environment")
    neutral = package.tmp / "neutral"
    neutral.mkdir(exist_ok=True)
    found = json.loads(run(python, "-c", PROBE, cwd=neutral))
    files = [Path(name) for name in found["files"]]
    if kind == "wheel":
        (site,) = (package.tmp / "wheel-environment/lib").glob("*/site-packages")
        assert files == [
            site / "flexkern/__init__.py",
            *(site / f"flexkern/kernels/{n}.py" for n in ("__init__", "reference")),
        ]
    else:
        names = ("flexkern/__init__.py", "flexkern/kernels/__init__.py", "flexkern/kernels/reference.py")
        assert files == [package.source / name for name in names]
    assert found["shadow"] is None or "site-packages/kernels/" in found["shadow"]
    assert found["version"] == flexkern.__version__
    assert found["command"]


def test_importing_it_costs_nothing_and_dir_shows_what_is_public():
    code = "import sys, flexkern; print(*dir(flexkern)); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {*flexkern.__all__, "__version__"}
    assert all(callable(getattr(flexkern, name)) for name in flexkern.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        flexkern.Motor  # noqa: B018


def test_a_type_checker_knows_what_is_public():
    code = "import flexkern; reveal_type(flexkern.Engine); reveal_type(flexkern.paged_attention)"
    found = run(sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "-c", code, cwd=ROOT)
    assert "-> flexkern.engine.Engine" in found and "query: torch._tensor.Tensor" in found


def test_the_folder_refuses_the_name_of_another_package():
    code = "import sys; sys.path.insert(0, '.'); import kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "`flexkern.kernels`" in done.stderr
