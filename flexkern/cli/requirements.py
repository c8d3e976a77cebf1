"""What flexkern declares that it needs, what is installed of it, and whether that is new enough.

Read from the metadata of the installed package, so that pyproject.toml is the only place that names versions.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

NAMES = {"PIL": "pillow", "cv2": "opencv-python-headless", "yaml": "pyyaml"}  # module: package, where they differ
OF_DEVELOPERS = {"bench", "docs", "test"}
EXTRAS = {  # what brings all that a command needs; where several extras have a package, this one is named
    "render": "video", "decode": "video", "fleet": "cluster", "serve": "serve", "bench": "bench",
    "metrics": "metrics", "sheet": "metrics", "eval": "metrics",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A package that flexkern, or one of its extras, needs on this machine."""

    package: str
    extra: str
    """the extra that asks for it; "" for flexkern itself"""
    bounds: str
    """such as >=17.1; "" where any version will do"""
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed, in a version within the bounds; a pre-release counts as its release."""
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version

        if self.installed is None:
            return False
        try:
            return SpecifierSet(self.bounds).contains(Version(self.installed).base_version)
        except InvalidVersion:  # somebody's own build
            return True

    @property
    def sentence(self) -> str:
        """What is installed and what is needed; of use where it does not fit."""
        who, wanted = f"flexkern[{self.extra}]" if self.extra else "flexkern", f"{self.package}{self.bounds}"
        return f'{self.package} {self.installed} is installed, {who} needs {wanted}: pip install "{wanted}"'

    @property
    def advice(self) -> str:
        """What installs it."""
        return f'pip install "{f"flexkern[{self.extra}]" if self.extra else f"{self.package}{self.bounds}"}"'


def needs() -> Iterator[Need]:
    """Everything declared, in the order of pyproject.toml; nothing where flexkern is not installed."""
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata("flexkern")
    except metadata.PackageNotFoundError:  # a copy of the tree on the path
        return
    extras = about.get_all("Provides-Extra") or []
    for declared in map(Requirement, about.get_all("Requires-Dist") or []):
        marker = declared.marker
        asked = [e for e in ("", *extras) if marker is None or marker.evaluate({"extra": e})]
        for extra in asked[:1] if "" in asked else asked:
            version = installed_version(declared.name)
            yield Need(package=declared.name, extra=extra, bounds=str(declared.specifier), installed=version)


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def need_of(module: str, command: str = "") -> Need | None:
    """What asks for the package of a module, the extra of that command first; None where nothing does."""
    package = NAMES.get(module.partition(".")[0], module.partition(".")[0]).replace("_", "-")
    asking = [need for need in needs() if need.package.lower().replace("_", "-") == package]
    return next((need for need in asking if need.extra == EXTRAS.get(command)), asking[0] if asking else None)


def command_of(error: BaseException) -> str:
    """The command that an error passed through, of those with an extra; "" for none."""
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (module.removeprefix("flexkern.cli.") for module in modules if module.startswith("flexkern.cli."))
    return next((name for name in names if name in EXTRAS), "")


def broken(error: BaseException) -> Need | None:
    """The package in whose own modules an import ended with that error, None where it was in none that is declared."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and not name.startswith(("flexkern", "__main__")):
            found = need_of(name) or found
    return found


def unfit() -> Iterator[Need]:
    """Each package that is installed in a version outside the bounds, once."""
    told = set()
    for need in needs():
        if need.installed is None or need.extra in OF_DEVELOPERS or need.package in told or need.fits:
            continue
        told.add(need.package)
        yield need


def comes_from(error: BaseException, need: Need) -> bool:
    """Whether an error may be due to that package: it is one of its own, passed through it, or is how calls misfit."""
    modules = [type(error).__module__]
    modules += [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = {NAMES.get(module.partition(".")[0], module.partition(".")[0]) for module in modules}
    return isinstance(error, (ImportError, AttributeError, TypeError)) or need.package in packages
