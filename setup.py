"""The two things pyproject.toml cannot say: kernels/ joins the packages found, and an sdist leaves the tests out."""

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


class SdistWithoutTests(sdist):
    """setuptools adds tests/test*.py unasked, without the conftest.py that they need."""

    def make_distribution(self):
        self.filelist.exclude_pattern("*", prefix="tests")
        super().make_distribution()


setup(
    packages=[
        *find_packages(include=["flexkern", "flexkern.*"]),
        *(f"flexkern.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    cmdclass={"sdist": SdistWithoutTests},
)
