"""Each extra brings all that its commands need, and nothing that no module asks for."""

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flexkern import __version__

ROOT = Path(__file__).parent.parent.parent
MODULES = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "flash-attn-4": "flash_attn"}
BROUGHT = {"starlette": "fastapi", "tokenizers": "transformers"}  # imported, and asked for by another requirement
PEERS = ("flash_attn_interface", "flashinfer", "sageattention")  # that attention is timed beside, where they are
UNSEEN = {  # asked for, and imported by no module of ours
    "accelerate": "diffusers loads with a dtype only where it is",
    "pytest-benchmark": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
}
RUN = """
import sys
from importlib.machinery import PathFinder

sys.path.insert(0, sys.argv.pop(1))
barred, find = set(sys.argv.pop(1).split(",")), PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if path is None and name in barred else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
from flexkern.__main__ import main

sys.exit(main())
"""


def module_of(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def declared() -> dict[str, list[str]]:
    """Packages by extra; those of flexkern itself under ""."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"]} | project["optional-dependencies"]
    return {extra: [Requirement(one).name for one in listed] for extra, listed in extras.items()}


def closure(packages: list[str]) -> set[str]:
    """These packages and all that they need, as pip would install them."""
    found, left = set[str](), list(packages)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        left += [r.name for r in map(Requirement, needed) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def without(extra: str) -> str:
    """The modules of every other extra that this one does not bring."""
    brought = closure([*declared()[""], *declared().get(extra, [])])
    every = {package for name, listed in declared().items() if name not in ("test", "docs") for package in listed}
    assert (missing := every - brought), "nothing would be barred"
    return ",".join(sorted(map(module_of, missing)))


def describe(folder: Path) -> Path:
    """What pip writes of pyproject.toml as it is now; the environment of the tests may have that of another day."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["Metadata-Version: 2.1", "Name: flexkern", f"Version: {__version__}"]
    lines += [f"Requires-Dist: {one}" for one in project["dependencies"]]
    for extra, listed in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for one in map(Requirement, listed):
            also = f"({one.marker}) and " if one.marker else ""
            lines.append(f'Requires-Dist: {one.name}{one.specifier}; {also}extra == "{extra}"')
    about = folder / f"flexkern-{__version__}.dist-info/METADATA"
    about.parent.mkdir(parents=True, exist_ok=True)
    about.write_text("\n".join(lines) + "\n")
    return folder


def start(extra: str, *words: str, cwd: Path) -> subprocess.Popen:
    """The command in an environment in which that extra alone is installed; "" for a bare one."""
    command = [sys.executable, "-c", RUN, str(describe(cwd / "site")), without(extra), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True)


def run(extra: str, *words: str, cwd: Path) -> tuple[int, str, str]:
    process = start(extra, *words, cwd=cwd)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.mark.parametrize("command", ["render", "fleet", "serve", "metrics", "decode", "warmup", "eval"])
def test_help_needs_no_extra(command, tmp_path):
    status, out, error = run("", command, "--help", cwd=tmp_path)
    assert (status, error) == (0, "") and out.startswith(f"usage: flexkern {command}")


@pytest.mark.parametrize("words", ["schema", "presets flex"])
def test_what_needs_no_video_runs_without_an_extra(words, tmp_path):
    status, out, error = run("", *words.split(), cwd=tmp_path)
    assert (status, error) == (0, "") and out


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("render --frames 3", "video"), ("fleet jobs.jsonl --out films --shard 0/1", "cluster"),
        ("serve --dir videos", "serve"), ("metrics a.mp4", "metrics"),
    ],
)  # fmt: skip
def test_the_extra_that_is_named_is_that_of_the_command(words, extra, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"frames": 3, "out": "a.mp4"}\n')
    status, out, error = run("", *words.split(), cwd=tmp_path)
    assert (status, out) == (2, "") and error.count("\n") == 1 and f'pip install "flexkern[{extra}]"' in error


def test_each_extra_brings_what_its_command_needs(tmp_path):
    """One after the other, since the later ones want the film of the first."""
    at = {"cwd": tmp_path}
    beside = ("--preview", "now.png", "--log", "log.jsonl")
    status, _, error = run("video", "render", "--frames", "24", "--out", "a.mp4", *beside, **at)
    assert status == 0 and (tmp_path / "now.png").is_file(), error
    for words in (
        ("sheet", "a.mp4", "--out", "s.png"),
        ("metrics", "a.mp4", "--out", "m"),
        ("eval", "vbench", "a.mp4"),
    ):
        status, _, error = run("metrics", *words, **at)
        assert status == 0, error
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"frames": 3, "out": "b.mp4"}) + "\n")
    status, _, error = run("cluster", "fleet", "jobs.jsonl", "--out", "films", "--shard", "0/1", **at)
    assert status == 0 and (tmp_path / "films/b.mp4").is_file(), error


def test_the_extra_of_the_server_starts_one(tmp_path):
    process = start("serve", "serve", "--dir", "videos", "--port", "0", cwd=tmp_path)
    assert process.stdout is not None
    said = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert said.startswith("flexkern: demo at http://127.0.0.1:"), error


def imported(path: Path) -> Iterator[str]:
    """Packages that a file imports at any depth, or asks for by name: ``need("ftfy")``, ``import_module("av")``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("need", "import_module"):
            yield from (arg.value.partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    ours = {"flexkern", "", "vbench", "vbench2_beta_long", "torchvision", *PEERS}
    ours |= {path.stem for path in ROOT.glob("bench/*.py")} | sys.stdlib_module_names
    files = [*ROOT.glob("flexkern/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("bench/*.py")]
    files = [path for path in files if "docs" not in path.parts and path.stem != "full_size"]  # a checkout's alone
    found = {name for path in files for name in imported(path)} - ours
    packages = {package for extra, listed in declared().items() if extra not in ("test", "docs") for package in listed}
    known = {module_of(package) for package in packages} | BROUGHT.keys()
    assert not found - known, f"imported, not declared: {sorted(found - known)}"
    unused = {package for package in packages if module_of(package) not in found} - UNSEEN.keys()
    assert not unused, f"declared, not imported: {sorted(unused)}"
    assert set(BROUGHT.values()) <= packages and UNSEEN.keys() <= packages
