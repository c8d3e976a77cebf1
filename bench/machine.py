"""Where a bench runs and what it measures: the source tree, its commit, the GPU. Needs the standard library only.

Importing it makes this tree importable as ``flexkern``, installed or not. The benches of a wheel lie in the package,
and write their results to bench_results in the current folder.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

BENCH = Path(__file__).resolve().parent
CHECKOUT = (BENCH.parent / "pyproject.toml").is_file() or (BENCH.parent / "flexkern").is_dir()  # or an archive of one
ROOT = BENCH.parent if CHECKOUT else BENCH.parent.parent  # the folder that holds the package flexkern
RESULTS = BENCH / "results" if CHECKOUT else Path("bench_results").absolute()

if "flexkern" not in sys.modules:
    # this tree's, whatever is installed; not left on the path, where kernels/ would hide Hugging Face's package
    sys.path.insert(0, str(ROOT))
    import_module("flexkern")
    sys.path.remove(str(ROOT))


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

    Where flexkern is installed from a wheel it is the version. An archive has no git:
    `git rev-parse --short=10 HEAD > COMMIT; git archive --add-file=COMMIT HEAD` brings it along.
    """
    named, file = os.environ.get("FLEXKERN_COMMIT", ""), ROOT / "COMMIT"
    if not named and not CHECKOUT:
        return f"flexkern {sys.modules['flexkern'].__version__}"
    if not named and (ROOT / ".git").exists():
        named = answer("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
        # results change while a suite runs, and do not change what it measures
        changed = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        if named and answer("git", "-C", str(ROOT), *changed):
            named += "+"
    if not named and file.is_file():
        named = file.read_text().strip()
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
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most bytes of this process that were in RAM at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def folder_of(gpu: str) -> str:
    return gpu.strip().replace(" ", "-").replace("/", "-") or "unknown-gpu"
