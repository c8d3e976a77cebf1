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
from packaging.requirements import Requirement
from packaging.version import Version

import flexkern

ROOT = Path(__file__).parent.parent
DATA = {".csv", ".json", ".safetensors", ".typed"}
EXTRAS = {"bench", "cluster", "docs", "flash-attn", "metrics", "model", "serve", "test", "video", "xformers"}
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
    (source / "COMMIT").write_text("0123456789+\n")  # as of an archive
    sdist = build("sdist", source, tmp / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked")
    (unpacked,) = (tmp / "unpacked").iterdir()
    return SimpleNamespace(tmp=tmp, source=source, sdist=sdist, wheel=build("wheel", unpacked, tmp / "wheel"))


def shipped(source: Path) -> set[str]:
    """Files of the source tree that belong in an install, by their place there."""
    paths = [*source.glob("flexkern/**/*"), *source.glob("kernels/**/*")]
    pages = {source / "kernels/README.md", source / "kernels/build.toml", *source.glob("flexkern/docs/*.md")}
    pages |= {*source.glob("flexkern/docs/examples/*.*"), *source.glob("flexkern/serve/page/*")}
    benches = set(source.glob("bench/*.py")) - {source / "bench/conftest.py", source / "bench/full_size.py"}
    paths += benches | {source / "bench/README.md"}
    pages |= {source / "bench/README.md"}
    paths = [p for p in paths if p.suffix == ".py" or p.suffix in DATA or p in pages]
    names = [p.relative_to(source).as_posix() for p in paths]
    named = {f"flexkern/{name}" if name.startswith(("bench/", "kernels/")) else name for name in names}
    return named | {"flexkern/COMMIT"}


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
    assert "flexkern = flexkern.__main__:main" in scripts


def test_benches_run_from_the_wheel_and_name_its_version_and_commit(package):
    pytest.importorskip("triton.knobs", reason="needs Triton >= 3.4")
    python, out = install(package.wheel, package.tmp / "bench-environment"), package.tmp / "rows"
    said = run(python, "-m", "flexkern", "bench", "rms-norm", "--tiny", "--json", "--out", out, cwd=package.tmp)
    rows = [json.loads(line) for line in said.splitlines()]
    assert {row["commit"] for row in rows} == {f"flexkern {flexkern.__version__} (0123456789+)"}
    assert (out / "rms_norm.csv").is_file()
    listed = run(python, "-m", "flexkern", "bench", "suite", "--dry-run", cwd=package.tmp)
    assert "[skipped here: the tests are not installed]" in listed


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_what_is_built_in_a_clone_is_of_its_commit(tmp_path):
    for name in ("setup.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.commit())"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "\n"  # neither git nor COMMIT
    run("git", "init", "--quiet", cwd=tmp_path)
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "\n"  # nothing is committed yet
    run("git", "add", ".", cwd=tmp_path)
    me = ("-c", "user.name=a", "-c", "user.email=a@b")
    run("git", *me, "commit", "--quiet", "--message", "one", cwd=tmp_path)
    head = run("git", "rev-parse", "--short=10", "HEAD", cwd=tmp_path).strip()
    assert run(sys.executable, "-c", code, cwd=tmp_path) == f"{head}\n"
    (tmp_path / "LICENSE").write_text("another")
    assert run(sys.executable, "-c", code, cwd=tmp_path) == f"{head}+\n"


def test_sdist_holds_what_the_wheel_needs(package):
    with tarfile.open(package.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"COMMIT", "LICENSE", "README.md", "flexkern/kernels/__init__.py", "pyproject.toml", "setup.py"} <= files
    assert not {name for name in files if name.startswith(("tests/", "bench/"))}
    assert "flexkern/bench/machine.py" in files


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


def lower_bounds(*extras: str) -> dict[str, str]:
    """The oldest version that pyproject.toml allows, by package, for flexkern itself and these extras."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    found: dict[str, str] = {}
    for requirement in map(Requirement, listed):
        (bound,) = requirement.specifier  # one lower bound each, and nothing above
        assert bound.operator == ">=", f"{requirement}: expected a lower bound"
        assert found.setdefault(requirement.name, bound.version) == bound.version, f"{requirement.name} has two bounds"
    return found


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f".ci/{name}.txt").read_text().splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_the_floor_of_the_matrix_is_what_pyproject_says():
    declared = lower_bounds("video", "model", "metrics", "cluster", "serve")
    floor = pins("floor")
    assert floor.keys() == declared.keys()
    assert {name for name in floor if Version(floor[name]) != Version(declared[name])} == set()


def test_every_requirement_has_a_lower_bound_and_what_was_tried_is_above_it():
    declared = lower_bounds("video", "model", "metrics", "cluster", "serve", "bench", "flash-attn", "xformers")
    for name in ("constraints", "kernels", "newest"):
        below = [f"{p}=={v}" for p, v in pins(name).items() if p in declared and Version(v) < Version(declared[p])]
        assert not below, f".ci/{name}.txt: {', '.join(below)}"


def test_importing_it_costs_nothing_and_dir_shows_what_is_public():
    code = "import sys, flexkern; print(*dir(flexkern)); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {*flexkern.__all__, "__version__"}
    assert all(callable(getattr(flexkern, name)) for name in flexkern.__all__)
    with pytest.raises(AttributeError, match="^module 'flexkern' has no attribute 'Sesion'; did you mean 'Session'"):
        flexkern.Sesion  # noqa: B018
    assert not hasattr(flexkern, "__wrapped__") and not hasattr(flexkern, "nothing_like_it")
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        flexkern.Motor  # noqa: B018


def test_a_type_checker_knows_what_is_public():
    code = "import flexkern; reveal_type(flexkern.Engine); reveal_type(flexkern.paged_attention)"
    found = run(sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "-c", code, cwd=ROOT)
    assert "-> flexkern.engine.Engine" in found and "query: torch._tensor.Tensor" in found


def run_in_the_root(code: str, *, path: str = "") -> str:
    """What Python prints that stands in the root of the clone, where kernels/ is the first folder of that name."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_the_root_the_folder_is_not_hugging_faces_package():
    code = """
import importlib.util, kernels
print(kernels.__file__, kernels.__version__, dir(kernels), importlib.util.find_spec("kernels.attention"))
try:
    from kernels import rms_norm
except ImportError as error:
    print("refused:", error)
try:
    kernels.rms_norm
except AttributeError as error:
    print(error)
import flexkern.kernels
print(flexkern.kernels.reference.__name__)
"""
    if "packages" in (found := run_in_the_root("import kernels; print(kernels.__file__)")):
        pytest.skip(f"Hugging Face's package is installed: {found}")
    told = run_in_the_root(code).splitlines()
    assert told[0] == "None 0 [] None" and told[1].startswith("refused: cannot import name 'rms_norm'")
    assert "this folder is flexkern.kernels" in told[2] and told[3] == "flexkern.kernels.reference"


def test_in_the_root_hugging_faces_package_is_found_where_it_is_installed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("__version__ = '9.9'\ndef get_kernel(): return __file__\n")
    (tmp_path / "kernels/layer.py").write_text("name = __name__\n")
    code = "import kernels, kernels.layer; from kernels import get_kernel; print(get_kernel(), kernels.layer.name)"
    assert run_in_the_root(code, path=str(tmp_path)) == f"{tmp_path}/kernels/__init__.py kernels.layer\n"


def test_in_the_root_diffusers_and_transformers_can_be_imported():
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason='needs pip install "flexkern[model]"')
    code = """
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import UMT5EncoderModel
import flexkern.model.vae
print(flexkern.model.vae.__name__)
"""
    assert run_in_the_root(code).endswith("flexkern.model.vae\n")
