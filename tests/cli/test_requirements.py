"""What flexkern needs, compared with what is installed: one place, which doctor and errors ask."""

import sys
from email.message import Message

import pytest

from flexkern.cli import doctor, main, requirements
from flexkern.cli.errors import refusing

DECLARED = (
    "numpy>=1.26",
    'winonly>=3; platform_system == "Nowhere"',
    'av>=17.1; extra == "video"',
    'Py_YAML; extra == "video"',
    'av>=17.1; extra == "metrics"',
    'opencv-python-headless>=4.8; extra == "metrics"',
    'prometheus-client>=0.20; extra == "serve"',
    'pytest>=9; extra == "test"',
)


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Versions by package, of a machine where flexkern is installed that declares DECLARED."""
    about, versions = Message(), {"numpy": "2.0.1", "av": "17.1.0", "Py_YAML": "6.0.1", "pytest": "9.2"}
    versions["prometheus-client"] = "0.20"
    for extra in ("video", "metrics", "serve", "test"):
        about["Provides-Extra"] = extra
    for requirement in DECLARED:
        about["Requires-Dist"] = requirement
    monkeypatch.setattr(requirements.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(requirements, "installed_version", versions.get)
    return versions


def test_what_is_declared_is_listed_by_extra(installed):
    found = [(need.package, need.extra, need.bounds) for need in requirements.needs()]
    assert found == [
        ("numpy", "", ">=1.26"), ("av", "video", ">=17.1"), ("Py_YAML", "video", ""), ("av", "metrics", ">=17.1"),
        ("opencv-python-headless", "metrics", ">=4.8"), ("prometheus-client", "serve", ">=0.20"),
        ("pytest", "test", ">=9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("package", "version", "fits"),
    [
        ("av", "17.1.0", True), ("av", "17.0.1", False), ("av", "18.0.0", True), ("av", "9.2.0", False),
        ("numpy", "1.26.0rc1", True), ("numpy", "1.25.9", False), ("numpy", "2.14.0.dev1+cpu", True),
        ("numpy", "ours", True),
    ],
)  # fmt: skip
def test_versions_are_compared_as_versions(installed, package, version, fits):
    installed[package] = version
    assert next(need for need in requirements.needs() if need.package == package).fits is fits
    assert bool(list(requirements.unfit())) is not fits


def test_what_is_too_old_is_one_sentence_each(installed):
    assert list(requirements.unfit()) == []
    installed |= {"numpy": "1.21", "av": "13.1.0", "pytest": "3.0"}  # pytest is nothing to a user
    assert [need.sentence for need in requirements.unfit()] == [
        'numpy 1.21 is installed, flexkern needs numpy>=1.26: pip install "numpy>=1.26"',
        'av 13.1.0 is installed, flexkern[video] needs av>=17.1: pip install "av>=17.1"',
    ]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ImportError("no Colorspace", name="av.video"), "(ImportError: no Colorspace)"),
        (AttributeError("no add_stream_from_template"), "(AttributeError: no add_stream_from_template)"),
        (TypeError("got an unexpected keyword"), "(TypeError: got an unexpected keyword)"),
    ],
)
def test_a_fault_of_an_old_version_is_one_sentence(installed, capsys, fault, told):
    with pytest.raises(type(fault)), refusing(ValueError):  # all is new enough: a fault of ours, with its traceback
        raise fault
    installed["av"] = "13.1.0"
    with pytest.raises(SystemExit) as left, refusing(ValueError):
        raise fault
    assert left.value.code == 2
    said = 'av 13.1.0 is installed, flexkern[video] needs av>=17.1: pip install "av>=17.1"'
    assert capsys.readouterr().err == f"flexkern: error: {said} {told}\n"


def test_another_fault_is_one_only_of_the_package_that_it_comes_from(installed, capsys):
    installed["av"] = "13.1.0"
    theirs = type("ExitError", (Exception,), {"__module__": "av.error"})
    with pytest.raises(SystemExit), refusing(OSError, status=1):
        raise theirs("no such option")
    assert "av 13.1.0 is installed" in capsys.readouterr().err
    passing = {"__name__": "av.container", "fault": lambda: 1 / 0}
    with pytest.raises(SystemExit), refusing(OSError, status=1):
        exec("fault()", passing)
    assert "(ZeroDivisionError: division by zero)" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), refusing(OSError):
        raise ZeroDivisionError
    installed |= {"av": "17.1", "numpy": "1.0"}
    with pytest.raises(theirs), refusing(OSError):
        raise theirs("no such option")


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("av.video", "the package 'av' is not installed: pip install \"flexkern[video]\""),
        ("cv2", "the package 'opencv-python-headless' is not installed: pip install \"flexkern[metrics]\""),
        ("prometheus_client", "the package 'prometheus-client' is not installed: pip install \"flexkern[serve]\""),
        ("numpy", "the package 'numpy' is not installed: pip install \"numpy>=1.26\""),
    ],
)
def test_a_missing_package_is_named_with_its_extra(installed, capsys, module, told):
    with pytest.raises(SystemExit), refusing(ValueError):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert capsys.readouterr().err == f"flexkern: error: {told}\n"


def test_the_extra_of_the_command_is_named_first(installed, capsys):
    passing = {"__name__": "flexkern.cli.sheet", "error": ModuleNotFoundError("No module named 'av'", name="av")}
    with pytest.raises(SystemExit), refusing(ValueError):
        exec("raise error", passing)
    assert capsys.readouterr().err.endswith("'av' is not installed: pip install \"flexkern[metrics]\"\n")


@pytest.mark.parametrize("fault", [OSError("libavformat.so.60: cannot open"), ImportError("DLL"), AttributeError("x")])
def test_a_package_that_does_not_load_is_named(installed, capsys, fault, tmp_path, monkeypatch):
    """Its error may be one that a user's own mistakes have: of a file, say."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "av")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "av").mkdir()
    (tmp_path / "av/__init__.py").write_text("from av import core\n")
    (tmp_path / "av/core.py").write_text(f"raise {fault!r}\n")
    for version, told in (("18.0", "'av' is installed, 18.0, and does not load"), ("13.1", "needs av>=17.1")):
        installed["av"] = version
        with pytest.raises(SystemExit) as left, refusing(ValueError, OSError):
            import av  # noqa: F401
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and told in said and f"({type(fault).__name__}: {fault})" in said


def test_a_file_that_is_missing_is_no_fault_of_a_package(installed, capsys):
    with pytest.raises(SystemExit), refusing(OSError):
        open("/nowhere/at/all")  # noqa: SIM115
    assert "does not load" not in capsys.readouterr().err


def test_a_module_that_nobody_declares_is_named_alone(installed, capsys):
    with pytest.raises(SystemExit), refusing(ValueError):
        raise ModuleNotFoundError("No module named 'regex'", name="regex.core")
    assert capsys.readouterr().err == "flexkern: error: the package 'regex' is not installed\n"


def test_a_missing_module_of_ours_keeps_its_traceback(installed):
    with pytest.raises(ModuleNotFoundError), refusing(ValueError):
        raise ModuleNotFoundError("No module named 'flexkern.wheels'", name="flexkern.wheels")


def test_doctor_says_what_is_too_old(installed, monkeypatch, capsys):
    only = {name: doctor.EXAMINATIONS[name] for name in ("packages", "versions")}
    monkeypatch.setattr(doctor, "EXAMINATIONS", only)
    installed["av"] = "13.1.0"
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "packages     flexkern: numpy 2.0.1",
        "             video: av 13.1.0, Py_YAML 6.0.1; outside of what it needs: av>=17.1",
        "             metrics: av 13.1.0; outside of what it needs: av>=17.1; "
        'not installed: opencv-python-headless (pip install "flexkern[metrics]")',
        "             serve: prometheus-client 0.20",
        "             test: pytest 9.2",
        'versions     av 13.1.0 is installed, flexkern[video] needs av>=17.1: pip install "av>=17.1"',
    ]


def test_a_copy_of_the_tree_needs_nothing_that_is_known(monkeypatch):
    def nowhere(name):
        raise requirements.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.metadata, "metadata", nowhere)
    assert list(requirements.needs()) == [] and list(requirements.unfit()) == []
    assert next(doctor.tell_packages(doctor.examine_packages())).startswith("flexkern is not installed: ")
