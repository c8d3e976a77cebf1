"""Break every kernel in many ways and see a test turn red each time: what the tests of kernels/ are worth.

    python tests/support/mutate.py [--only TEXT] [--jobs N]

Each mutant is one replacement in a copy of the repository, on which the tests of its kernel run. Exits with 1 if any
mutant survives. tests/kernels/test_mutate.py sees to it that every replacement still fits the code.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, TESTS

ROOT = Path(__file__).parent.parent.parent


def copy_repository(target: Path) -> None:
    """A copy whose ``flexkern.kernels`` is its own kernels/, whatever is installed."""
    for name in ("flexkern", "kernels", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def is_caught(kernel: str, old: str, new: str) -> bool:
    """Whether the kernel's tests fail on the mutant, as tests do: not because nothing could be collected."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy_repository(target)
        path = target / kernel
        path.write_text(path.read_text().replace(old, new))
        tests = [f"tests/{name}" for name in TESTS[kernel]]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{kernel}, {new!r}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants of files whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant[0]]
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = list(pool.map(lambda mutant: is_caught(*mutant), chosen))
    survivors = [mutant for mutant, caught in zip(chosen, verdicts, strict=True) if not caught]
    for kernel, old, new in survivors:
        print(f"SURVIVED {kernel}: {old!r} -> {new!r}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
