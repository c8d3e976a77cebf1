"""What pyproject.toml cannot say: an sdist leaves the tests out, and an editable install is found before the clone.

Standing beside a clone, or running a script that lies there, Python finds the clone's folder under the name flexkern: a
folder without ``__init__.py`` is a package without content. A package on the path wins over such a folder, but the
finder of an editable install was asked last, so that ``flexkern.attention`` did not exist there. Ours is asked first.
"""

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

LAST, FIRST = b"sys.meta_path.append(_EditableFinder)", b"sys.meta_path.insert(0, _EditableFinder)"


class SdistWithoutTests(sdist):
    """setuptools adds tests/test*.py unasked, without the conftest.py that they need."""

    def make_distribution(self):
        self.filelist.exclude_pattern("*", prefix="tests")
        super().make_distribution()


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


setup(cmdclass={"editable_wheel": EditableFirst, "sdist": SdistWithoutTests})
