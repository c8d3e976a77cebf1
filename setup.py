"""What pyproject.toml cannot say: an sdist leaves the tests out."""

from setuptools import setup
from setuptools.command.sdist import sdist


class SdistWithoutTests(sdist):
    """setuptools adds tests/test*.py unasked, without the conftest.py that they need."""

    def make_distribution(self):
        self.filelist.exclude_pattern("*", prefix="tests")
        super().make_distribution()


setup(cmdclass={"sdist": SdistWithoutTests})
