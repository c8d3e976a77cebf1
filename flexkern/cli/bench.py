"""``flexkern bench``: the benches of the kernels, each a program of its own."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flexkern.checks import did_you_mean
from flexkern.cli.errors import refusing

FOLDER = Path(__file__).resolve().parents[1] / "bench"  # a link to bench/ in a checkout, that folder in a wheel
# beside bench_NAME.py
PROGRAMS = {
    "suite": "gpu_suite", "correctness": "correctness", "default-path": "default_path", "tables": "tables",
    "evidence": "evidence", "long-film": "long_film", "soak": "soak", "fleet-simulation": "fleet_simulation",
}  # fmt: skip
NEEDED = ("pytest", "triton")


@dataclass(kw_only=True)
class Bench:
    """Measure the kernels on this machine: lists the benches, or runs the one that is named."""

    words: tuple[str, ...]
    """the name of a bench, and its own options"""

    def run(self) -> int:
        """The exit status of the bench."""
        benches = find_benches()
        with refusing(ValueError, OSError):
            if not self.words or self.words[0] in ("-h", "--help"):
                print("\n".join(as_text(benches)))
                return 0
            name = self.words[0].replace("_", "-")
            if name not in benches:
                known = f"there is {', '.join(benches)}" if benches else "this copy of flexkern has none"
                raise ValueError(f"there is no bench {self.words[0]!r}{did_you_mean(name, list(benches))}: {known}")
            missing = [package for package in NEEDED if find_spec(package) is None]
            if missing:
                raise ValueError(f'flexkern bench needs {" and ".join(missing)}: pip install "flexkern[bench]"')
        return subprocess.call([sys.executable, str(benches[name]), *self.words[1:]])


def find_benches() -> dict[str, Path]:
    """The program of each bench by its name: the suite, what judges, the tables, then each that times one thing."""
    found = {name: FOLDER / f"{module}.py" for name, module in PROGRAMS.items()}
    found |= {p.stem.removeprefix("bench_").replace("_", "-"): p for p in sorted(FOLDER.glob("bench_*.py"))}
    return {name: path for name, path in found.items() if path.is_file()}


def as_text(benches: dict[str, Path]) -> list[str]:
    """Usage, then a line for each bench with the first sentence of its docstring."""
    width = max(map(len, benches), default=0) + 2
    lines = [
        "usage: flexkern bench NAME [OPTIONS]      each bench explains its options: flexkern bench NAME --help",
        "",
    ]
    for name, path in benches.items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary, *_ = doc.split("\n\n")
        lines.append(f"  {name:{width}}{' '.join(summary.split())}")
    return lines
