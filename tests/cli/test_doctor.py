"""flexkern doctor: what this machine has, what it lacks and why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexkern import __version__, backends, demo
from flexkern.backends.choice import Choice
from flexkern.cli import doctor, main, requirements


def test_doctor_tells_what_is_there_and_what_is_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(requirements, "installed_version", lambda package: None if package == "xformers" else "99.0")
    monkeypatch.setattr(demo, "WEIGHTS", Path(__file__))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}, built for" in out and "\nsdpa: " not in out
    assert re.search(r"^backends +triton(:| not available:) ", out, re.MULTILINE) and " sdpa: " in out
    for name in backends.BACKENDS:
        why = backends.why_not(name)
        assert (f" {name} not available: {why}" if why else f" {name}: {backends.BACKENDS[name]}") in out
    assert 'xformers: not installed: xformers (pip install "flexkern[xformers]")' in out
    assert re.search(r"^ +video: av 99.0, .*tqdm 99.0", out, re.MULTILINE)
    assert re.search(r"^versions +what is installed is new enough$", out, re.MULTILINE)
    assert f"demo         {__file__}, " in out
    assert torch.cuda.is_available() or re.search(r"^gpu +no CUDA GPU", out, re.MULTILINE)

    monkeypatch.setattr(demo, "WEIGHTS", tmp_path / "none")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 / 0)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"demo         no weights at {tmp_path}/none" in out
    assert "triton not available: the package triton is not installed" in out
    assert "flash-attn not available: the package flash-attn is not installed" in out
    assert "triton       not there: " in out and "cpu          broken: ZeroDivisionError: " in out


def test_doctor_says_which_flexkern_runs(monkeypatch):
    folder = Path(doctor.__file__).parent.parent
    monkeypatch.setattr(requirements, "installed_version", lambda package: __version__)
    assert doctor.tell_flexkern(doctor.examine_flexkern()) == f"{__version__}, {folder}"
    monkeypatch.setattr(requirements, "installed_version", lambda package: None)  # a copy of the tree
    assert doctor.tell_flexkern(doctor.examine_flexkern()) == f"{__version__}, {folder}"
    monkeypatch.setattr(requirements, "installed_version", lambda package: "0.0.9")
    found = doctor.examine_flexkern()
    assert found == {"version": __version__, "folder": str(folder), "installed": "0.0.9"}
    assert doctor.tell_flexkern(found).endswith(
        "; what is said below of packages is what the installed flexkern 0.0.9 needs"
    )


def test_doctor_tells_what_auto_takes_and_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = list(doctor.tell_auto(doctor.examine_auto()))
    assert said[0] == "cpu, heads of 128 in bfloat16: sdpa (auto, since device 'cpu' is not a CUDA GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    wanted = {"cuda:0": "the Hopper attention kernel", "cuda:1": "measured on no GPU"}
    chosen = lambda *, device, **model: Choice(name="triton", why=f"auto; {wanted[device]}")
    monkeypatch.setattr("flexkern.backends.choice.choose_backend", chosen)
    one, two = list(doctor.tell_auto(doctor.examine_auto()))[:2]
    assert one == "cuda:0, heads of 128 in bfloat16: triton (auto; the Hopper attention kernel)"
    assert two == "cuda:1, heads of 128 in bfloat16: triton (auto; measured on no GPU)"


@pytest.mark.triton(3, 4)
def test_doctor_names_the_file_of_kept_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr("flexkern.kernels.attention.kept.kept_file", lambda: tmp_path / "tiles.json")
    assert doctor.examine_auto()["tiles"] is None
    (tmp_path / "tiles.json").write_text("{}")
    *_, last = doctor.tell_auto(doctor.examine_auto())
    assert last == f"tiles kept by flexkern warmup --tune: {tmp_path}/tiles.json"


def test_doctor_describes_gpus(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H200", 140 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "580.1")
    one, two = doctor.tell_gpus(doctor.examine_gpus())
    assert one == "cuda:0 NVIDIA H200, 140 GiB, compute capability 9.0, driver 580.1" and two.startswith("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(doctor.tell_gpus(doctor.examine_gpus())) == [
        "no CUDA GPU; but NVIDIA's driver 580.1 is there: is torch built for CUDA?"
    ]


def test_the_driver_is_asked_of_nvidia_smi(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.nvidia_driver() is None
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi")
    for status, answer, told in ((0, "580.1\n580.1\n", "580.1"), (9, "no driver", None), (0, "", None)):
        done = subprocess.CompletedProcess([], status, stdout=answer)
        monkeypatch.setattr("subprocess.run", lambda *_, done=done, **__: done)
        assert doctor.nvidia_driver() == told


def test_doctor_answers_in_json(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 / 0)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["flexkern", *doctor.EXAMINATIONS]
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["cuda"] == torch.version.cuda
    assert found["cpu"] == {"broken": "ZeroDivisionError: division by zero"}
    for name, backend in found["backends"].items():
        assert backend == {
            "available": backends.why_not(name) is None,
            "about": backends.BACKENDS[name],
            "why_not": backends.why_not(name),
        }
    assert {"needs", "installed", "fits"} == set(found["packages"]["flexkern"]["torch"])
    assert len(found["gpu"]["devices"]) == torch.cuda.device_count()
    assert found["demo"] == {"weights": str(demo.WEIGHTS), "bytes": demo.WEIGHTS.stat().st_size}
