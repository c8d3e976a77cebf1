"""Where a bench runs and what it measures: the source tree, its commit, the GPU. Needs the standard library only.

Importing it makes this tree importable as ``flexkern``, installed or not. The benches of a wheel lie in the package,
and write their results to bench_results in the current folder.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import NoReturn

BENCH = Path(__file__).resolve().parent
CHECKOUT = (BENCH.parent / "pyproject.toml").is_file() or (BENCH.parent / "flexkern").is_dir()  # or an archive of one
ROOT = BENCH.parent if CHECKOUT else BENCH.parent.parent  # the folder that holds the package flexkern
RESULTS = BENCH / "results" if CHECKOUT else Path("bench_results").absolute()

if "flexkern" not in sys.modules:
    # this tree's, whatever is installed; not left on the path, where kernels/ would hide Hugging Face's package
    sys.path.insert(0, str(ROOT))
    import_module("flexkern")
    sys.path.remove(str(ROOT))


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a bench says that ends with an error: a line where a package is missing or Ctrl-C came,
    nothing where the reader has gone, else a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):  # the reader has seen enough; nor is what is left in the buffer wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif isinstance(error, ImportError) and not str(error.name).startswith("flexkern"):
        print(f"{program()}: error: {lacking(error)}", file=sys.stderr)
    elif trace is not None and (sentence := unloadable(error)):
        print(f"{program()}: error: {sentence}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if str(BENCH) == os.path.dirname(os.path.realpath(getattr(sys.modules["__main__"], "__file__", None) or "")):
    sys.excepthook = tell


def lacking(error: ImportError) -> str:
    """Which package is not there, and what brings it."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return str(error)
    package = error.name.partition(".")[0]
    try:
        from flexkern.cli.requirements import need_of

        need = need_of(package)
    except ImportError:  # an archive may have torch and triton only
        need = None
    return f"the package {package!r} is not installed{f': {need.advice}' if need else ''}"


def unloadable(error: BaseException) -> str:
    """Which installed package does not load, and why; "" where the error is of none, or flexkern is not installed."""
    try:
        from flexkern.cli.errors import unloadable as found

        return found(error)
    except ImportError:  # as in ``lacking``
        return ""


def refuse(why: str, status: int = 2) -> NoReturn:
    """One line on stderr, and that exit status: 2 where nothing was measured yet."""
    print(f"{program()}: error: {why}", file=sys.stderr)
    raise SystemExit(status)


def program() -> str:
    """The command that runs this bench: of a wheel ``flexkern bench NAME``, else the file."""
    file = Path(sys.argv[0])
    return file.name if CHECKOUT else command_of(file.stem)


def command_of(stem: str) -> str:
    """How a bench is called that is installed; ``stem``: of its file."""
    return f"flexkern bench {stem.removeprefix('bench_').removeprefix('gpu_').replace('_', '-')}"


def described(doc: str | None) -> str:
    """A bench's docstring, whose commands work where it is installed."""
    if CHECKOUT:
        return doc or ""
    words = re.sub(r"python bench/(\w+)\.py", lambda found: command_of(found[1]), doc or "")
    return words.replace("bench/results", RESULTS.name)


def writable(folder: Path) -> Path:
    """The folder, made if needed. Refused before anything is measured where nothing can be written there."""
    from flexkern.render.target import make_folder  # which needs the standard library alone, too

    try:
        make_folder(folder)
    except OSError as fault:
        refuse(str(fault))
    return folder


def child_environment() -> dict[str, str]:
    """The environment in which a child, and its children, import the benches, and with them this tree's flexkern.

    FLEXKERN_COMMIT tells them the commit, so that all rows of a run name the same one.
    """
    path = [str(BENCH), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "FLEXKERN_COMMIT": commit(),
    }


def answer(*command: str) -> str:
    """What a command prints, stripped; empty if it is missing, fails or hangs."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def commit() -> str:
    """The commit of this tree: FLEXKERN_COMMIT, or git's, with "+" after it if files differ, or the file COMMIT.

    Where flexkern is installed from a wheel it is the version, with the commit that it was built of, where that is
    known: two wheels may bear the same version. An archive has no git:
    `git rev-parse --short=10 HEAD > COMMIT; git archive --add-file=COMMIT HEAD` brings it along.
    """
    named, file = os.environ.get("FLEXKERN_COMMIT", ""), ROOT / "COMMIT"
    if not named and not CHECKOUT:
        built = BENCH.parent / "COMMIT"
        of = f" ({built.read_text(encoding='utf-8').strip()})" if built.is_file() else ""
        return f"flexkern {sys.modules['flexkern'].__version__}{of}"
    if not named and (ROOT / ".git").exists():
        named = answer("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
        # results change while a suite runs, and do not change what it measures
        changed = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        if named and answer("git", "-C", str(ROOT), *changed):
            named += "+"
    if not named and file.is_file():
        named = file.read_text(encoding="utf-8").strip()
    return named or "unknown"


@cache
def ask_gpu(*fields: str) -> str:
    """Answer of nvidia-smi for the first GPU, fields separated by ", "; empty if there is none."""
    lines = answer("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else ""


def clocks_during(call: Callable[[], object]) -> str:
    """The clocks of the first GPU while ``call`` runs over and over; empty where nvidia-smi does not tell."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None:
            call()
        said = process.stdout.read() if process.stdout else ""
    first = said.splitlines()[0].split(", ") if process.returncode == 0 and said else []
    return f"sm {first[0]}, memory {first[1]}" if len(first) == 2 else ""


def resident() -> int:
    """Bytes of this process that are in RAM (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most bytes of this process that were in RAM at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def folder_of(gpu: str) -> str:
    return gpu.strip().replace(" ", "-").replace("/", "-") or "unknown-gpu"
