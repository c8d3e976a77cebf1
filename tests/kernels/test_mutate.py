"""The mutants of tests/support/mutate.py still fit the kernels, so that running them means something."""

from collections import Counter
from pathlib import Path

import mutate

ROOT = Path(__file__).parent.parent.parent


def test_every_mutant_changes_one_place():
    for kernel, old, new in mutate.MUTANTS:
        assert (ROOT / kernel).read_text().count(old) == 1, f"{kernel} must hold {old!r} once"
        assert old != new


def test_every_kernel_has_at_least_five():
    per_kernel = Counter(kernel for kernel, _, _ in mutate.MUTANTS)
    files = [p for p in (ROOT / "kernels").glob("**/*.py") if "@triton.jit" in p.read_text()]
    launchers = {p.relative_to(ROOT).as_posix() for p in files}
    assert launchers - {"kernels/common.py"} <= per_kernel.keys() and min(per_kernel.values()) >= 5
    assert per_kernel.keys() == mutate.TESTS.keys()


def test_a_copy_brings_its_own_kernels(tmp_path):
    mutate.copy_repository(tmp_path)
    assert (tmp_path / "flexkern/kernels/reference.py").resolve() == tmp_path / "kernels/reference.py"
