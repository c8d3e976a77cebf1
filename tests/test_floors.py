"""The shape of the repository, enforced: imports point down, files stay short, the top level stays bare."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # lowest first; a file may import from its own floor or below
    ["flexkern.kernels", "flexkern.testing", "flexkern.checks", "flexkern.__version__"],
    ["flexkern.policies"],
    [
        "flexkern.cache",
        "flexkern.capture",
        "flexkern.tokens",
        "flexkern.plan",
        "flexkern.modes",
        "flexkern.untraced",
        "flexkern.ahead",
        "flexkern.noise",
        "flexkern.state",
        "flexkern.hostcopy",
        "flexkern.finite",
        "flexkern.stopwatch",
    ],
    ["flexkern.memory", "flexkern.backends", "flexkern.functional", "flexkern.window"],
    ["flexkern.model"],
    ["flexkern.session", "flexkern.graphs", "flexkern.parallel"],
    ["flexkern.engine"],
    ["flexkern.pipeline", "flexkern.warmup"],
    ["flexkern.render", "flexkern.metrics", "flexkern.integrations", "flexkern.demo"],
    ["flexkern.serve"],
    ["flexkern.cli", "flexkern"],
]
HEIGHT = {prefix: height for height, floor in enumerate(FLOORS) for prefix in floor}
ROOF = len(FLOORS) - 1
TOP_LEVEL = {".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "bench", "flexkern", "kernels"}
TOP_LEVEL |= {"pyproject.toml", "setup.py", "tests"}
SOURCES = sorted([*ROOT.glob("flexkern/**/*.py"), *ROOT.glob("kernels/**/*.py")])
SOURCES = [path for path in SOURCES if "docs" not in path.parts[len(ROOT.parts) :]]  # examples are scripts of users


def height(name: str) -> int:
    """Floor of a module or of a name in it; a name that only the root package can have is on the roof."""
    return next((h for p, h in HEIGHT.items() if p != "flexkern" and f"{name}.".startswith(f"{p}.")), ROOF)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("flexkern", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names imported at any depth by code that lives in `package`, so that a lazy import counts too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            names = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from (resolve_name(name, package) for name in names)


def imports_of(path: Path) -> Iterator[str]:
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    return imports(path.read_text(), package)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "flexkern"


def upward(module: str, names: Iterator[str]) -> list[str]:
    return [f"{module} imports {name}" for name in names if is_ours(name) and height(name) > height(module)]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One circle of modules that import each other, for every module that closes one."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def outside(names: Iterator[str], allowed: set[str]) -> list[str]:
    """Names that belong neither to the standard library nor to a package of `allowed`."""
    fits = lambda name: any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed | sys.stdlib_module_names)
    return [name for name in names if not fits(name)]


def too_long(source: str) -> bool:
    reason = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return len(source.splitlines()) >= 400 and "over 400 lines because" not in reason


def test_every_module_has_a_floor():
    homeless = [name for name in map(module_name, SOURCES) if height(name) == ROOF]
    roof = ("flexkern", "flexkern.__main__")
    homeless = [name for name in homeless if name not in roof and not f"{name}.".startswith("flexkern.cli.")]
    assert not homeless, f"not in FLOORS: {', '.join(homeless)}"


def test_imports_point_down():
    wrong = [line for path in SOURCES for line in upward(module_name(path), imports_of(path))]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    """Lazy imports and those for type checkers alone count as well."""
    modules = {module_name(path): path for path in SOURCES}
    home = lambda name: max((m for m in modules if f"{name}.".startswith(f"{m}.")), key=len)
    graph = {module: {home(name) for name in imports_of(path) if is_ours(name)} for module, path in modules.items()}
    assert not circles({module: names - {module} for module, names in graph.items()})


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("kernels/**/*.py", {"flexkern.kernels", "torch", "triton"}),
        ("kernels/reference.py", {"flexkern.kernels.reference", "torch"}),
        ("flexkern/policies/**/*.py", {"flexkern.policies", "flexkern.checks", "numpy"}),
    ],
)
def test_lower_floors_need_little(pattern, allowed):
    paths = sorted(ROOT.glob(pattern))
    wrong = [f"{module_name(path)} imports {name}" for path in paths for name in outside(imports_of(path), allowed)]
    assert paths and not wrong, "\n".join(wrong)


def test_kernels_name_each_other_relatively():
    """The folder is published under another name, so `flexkern.kernels` may not be spelled out in it."""
    absolute = lambda path: imports(path.read_text(), "published.kernels")
    wrong = [
        f"{path.name}: {name}" for path in ROOT.glob("kernels/**/*.py") for name in absolute(path) if is_ours(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_policies_load_without_torch():
    code = "import sys, flexkern.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def of_the_locale(source: str) -> list[int]:
    """Lines in which a text file is opened in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name, modes = (
            ast.unparse(node.func).rpartition(".")[2],
            [word.value for word in node.keywords if word.arg == "mode"],
        )
        is_method = isinstance(node.func, ast.Attribute)
        if name in ("read_text", "write_text") and is_method:
            found.append(node.lineno)
        if name == "open":
            modes += node.args[0 if is_method else 1 :][:1]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r" if not is_method else "b"
            if isinstance(mode, str) and set(mode) <= set("rwaxt+"):
                found.append(node.lineno)
    return found


def test_text_files_are_utf8_whatever_the_locale():
    paths = (*SOURCES, *ROOT.glob("bench/**/*.py"))
    wrong = [f"{path}:{line}" for path in paths for line in of_the_locale(path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", ["open(path", "open(path, 'w'", "path.open('a'", "path.read_text(*no"])
def test_a_text_file_of_the_locale_is_caught(source):
    assert of_the_locale(f"{source})") == [1]
    assert not of_the_locale(f"{source}, encoding='utf-8')") and not of_the_locale("open(path, 'rb')")


def test_files_are_short():
    paths = [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py")]
    wrong = [str(path.relative_to(ROOT)) for path in paths if too_long(path.read_text())]
    assert not wrong, f"400 lines or more, and no docstring that says why: {', '.join(wrong)}"


def test_top_level_is_bare():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.split("/")[0] for line in tracked.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("flexkern.plan", "flexkern", "from flexkern.session import Session"),
        ("flexkern.plan", "flexkern", "from .memory import PagedMemory"),
        ("flexkern.plan", "flexkern", "import flexkern"),
        ("flexkern.policies.noise", "flexkern.policies", "from .. import cache"),
        ("flexkern.model.wan", "flexkern.model", "def late():\n    from flexkern import Engine"),
        ("flexkern.kernels.common", "flexkern.kernels", "from ..testing import x\nfrom ..policies import x"),
        ("flexkern.backends", "flexkern.backends", "import importlib\nimportlib.import_module('flexkern.model')"),
    ],
)
def test_an_upward_import_is_caught(module, package, source):
    assert len(upward(module, imports(source, package))) == 1


@pytest.mark.parametrize("source", ["from .cache import Cache", "from flexkern import __version__", "import numpy"])
def test_a_downward_import_passes(source):
    assert not upward("flexkern.engine", imports(source, "flexkern"))


def test_a_circle_is_caught():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_a_foreign_import_is_caught():
    source = "import os\nimport torch\nfrom . import reference\nfrom ..testing import x\nimport torchvision"
    names = imports(source, "flexkern.kernels")
    assert outside(names, {"torch", "flexkern.kernels"}) == ["flexkern.testing.x", "torchvision"]


def test_a_long_file_is_caught_unless_it_says_why():
    body = "\n" * 400
    assert too_long(f'"""A file."""{body}')
    assert not too_long(f'"""A file; over 400\nlines because it is a table."""{body}')
    assert not too_long("\n" * 399)
