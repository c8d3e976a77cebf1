"""What pyproject.toml cannot say: an sdist leaves the tests out, what is built knows the commit it is of, and an
editable install is found before the clone.

Standing beside a clone, or running a script that lies there, Python finds the clone's folder under the name flexkern: a
folder without ``__init__.py`` is a package without content. A package on the path wins over such a folder, but the
finder of an editable install was asked last, so that ``flexkern.attention`` did not exist there. Ours is asked first.
"""

import base64
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

LAST, FIRST = b"sys.meta_path.append(_EditableFinder)", b"sys.meta_path.insert(0, _EditableFinder)"
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


class EditableFirst(editable_wheel):
    """The editable wheel of setuptools, with its finder at the front."""

    def run(self):
        super().run()
        for wheel in Path(self.dist_dir).glob("*.editable-*.whl"):
            find_first(wheel)


def find_first(wheel: Path):
    """Rewrite a wheel so that its finder is the first to be asked; a wheel with another finder stays as it is."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    finder = next((name for name, content in files.items() if name.endswith("_finder.py") and LAST in content), None)
    if finder is None:
        return
    files[finder] = files[finder].replace(LAST, FIRST)
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(files[finder]).digest()).rstrip(b"=").decode()
    entry = f"{finder},sha256={digest},{len(files[finder])}"
    lines = files[record].decode().splitlines()
    files[record] = "".join(f"{entry if line.startswith(f'{finder},') else line}\n" for line in lines).encode()
    rewritten = wheel.with_suffix(".rewritten")
    with zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    shutil.move(rewritten, wheel)


setup(cmdclass={"build_py": BuildWithCommit, "editable_wheel": EditableFirst, "sdist": SdistWithoutTests})
