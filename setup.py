"""What pyproject.toml cannot say: an sdist leaves the tests out, and what is built knows the commit it is of."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


def commit() -> str:
    """The commit of this tree, with "+" after it if files differ; of an archive or an sdist what COMMIT says."""
    file = ROOT / "COMMIT"
    if not (ROOT / ".git").exists():
        return file.read_text().strip() if file.is_file() else ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or the tree of somebody else
        return ""


class SdistWithoutTests(sdist):
    """setuptools adds tests/test*.py unasked, without the conftest.py that they need."""

    def make_distribution(self):
        self.filelist.exclude_pattern("*", prefix="tests")
        super().make_distribution()

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        if found := commit():
            Path(base_dir, "COMMIT").write_text(f"{found}\n")


class BuildWithCommit(build_py):
    """What bench/machine.py writes into every row."""

    def run(self):
        super().run()
        if not self.editable_mode and (found := commit()):
            Path(self.build_lib, "flexkern/COMMIT").write_text(f"{found}\n")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithoutTests})
