"""``flexkern doctor``: what this machine can do, and why not more."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from flexkern import __version__

Found = dict[str, Any]


@dataclass(kw_only=True)
class Doctor:
    """Print what this machine can do: GPU, torch, triton, backends and which is taken, packages, demo weights."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead: a key for each finding, its "broken" where looking failed"""

    def run(self) -> int:
        findings: dict[str, Any] = {"flexkern": examine_flexkern()}
        for name, (examine, _) in EXAMINATIONS.items():
            try:
                findings[name] = examine()
            except Exception as error:  # a broken package is a finding, not an end
                findings[name] = {"broken": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(findings, indent=1) if self.json else "\n".join(as_text(findings)))
        return 0


def as_text(findings: dict[str, Found]) -> Iterator[str]:
    """The findings, a line or more each, the name on the first."""
    yield f"{'flexkern':12} {tell_flexkern(findings['flexkern'])}"
    for name, (_, tell) in EXAMINATIONS.items():
        found = findings[name]
        for line in [f"broken: {found['broken']}"] if "broken" in found else tell(found):
            yield f"{name:12} {line}"
            name = ""


def examine_flexkern() -> Found:
    """Which flexkern runs: in the root of a clone it is the clone's, whatever pip has installed."""
    from flexkern.cli.requirements import installed_version

    folder = str(Path(__file__).parent.parent)
    return {"version": __version__, "folder": folder, "installed": installed_version("flexkern")}


def tell_flexkern(found: Found) -> str:
    here = f"{found['version']}, {found['folder']}"
    if found["installed"] in (None, found["version"]):
        return here
    return f"{here}; what is said below of packages is what the installed flexkern {found['installed']} needs"


def examine_python() -> Found:
    import platform

    return {"version": platform.python_version(), "platform": platform.platform()}


def examine_torch() -> Found:
    import torch

    built = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "hip": torch.version.hip}
    return {"version": str(torch.__version__), **built}


def tell_torch(found: Found) -> Iterator[str]:
    cuda = f"CUDA {found['cuda']}, cuDNN {found['cudnn']}" if found["cuda"] else None
    hip = f"HIP {found['hip']}" if found["hip"] else "CPU only"
    yield f"{found['version']}, built for {cuda or hip}"


def examine_gpus() -> Found:
    import torch

    devices = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(number)
        about = {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
        devices.append({"device": f"cuda:{number}", **about})
    return {"devices": devices, "driver": nvidia_driver()}


def tell_gpus(found: Found) -> Iterator[str]:
    driver = found["driver"]
    if not found["devices"]:
        yield "no CUDA GPU" + (f"; but NVIDIA's driver {driver} is there: is torch built for CUDA?" if driver else "")
    for gpu in found["devices"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        capability = "compute capability {}.{}".format(*gpu["capability"])
        yield f"{gpu['device']} {gpu['name']}, {memory}, {capability}, driver {driver or 'unknown'}"


def nvidia_driver() -> str | None:
    import shutil
    import subprocess

    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def examine_triton() -> Found:
    import torch

    try:
        import triton
    except ImportError as error:
        return {"version": None, "why_not": str(error)}
    why_not = None if torch.cuda.is_available() else "without a GPU only its interpreter runs"
    return {"version": triton.__version__, "why_not": why_not}


def tell_triton(found: Found) -> Iterator[str]:
    yield (
        ", ".join(filter(None, (found["version"], found["why_not"])))
        if found["version"]
        else (f"not there: {found['why_not']}")
    )


def examine_cpu() -> Found:
    import os
    import platform

    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": platform.machine(), "cores": usable, "threads": torch.get_num_threads()}


def tell_cpu(found: Found) -> Iterator[str]:
    yield f"{found['machine']}, {found['cores']} usable cores, torch uses {found['threads']} threads"


def examine_backends() -> Found:
    from flexkern import backends

    found = {}
    for name, about in backends.BACKENDS.items():
        why = backends.why_not(name)
        about = backends.describe(name) if why is None else about
        found[name] = {"available": why is None, "about": about, "why_not": why}
    return found


def tell_backends(found: Found) -> Iterator[str]:
    for name, backend in found.items():
        yield f"{name}: {backend['about']}" if backend["available"] else f"{name} not available: {backend['why_not']}"


def examine_auto() -> Found:
    """What ``auto`` takes on each device, for the heads and dtype of Wan 2.1; and the file of kept tiles."""
    import torch

    from flexkern.backends import unfit_triton
    from flexkern.backends.choice import choose_backend

    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    taken = []
    for device in devices or ["cpu"]:
        choice = choose_backend(device=device, head_dim=128, dtype=torch.bfloat16)
        taken.append({"device": device, "backend": choice.name, "why": choice.why})
    found: Found = {"devices": taken, "tiles": None}
    if unfit_triton() is None:
        from flexkern.kernels.attention.kept import kept_file

        found["tiles"] = str(kept_file()) if kept_file().is_file() else None
    return found


def tell_auto(found: Found) -> Iterator[str]:
    for one in found["devices"]:
        yield f"{one['device']}, heads of 128 in bfloat16: {one['backend']} ({one['why']})"
    if found["tiles"]:
        yield f"tiles kept by flexkern warmup --tune: {found['tiles']}"


def examine_packages() -> Found:
    """What flexkern and its extras need, and what of it is installed."""
    from flexkern.cli.requirements import needs

    found: Found = {}
    for need in needs():
        about = {"needs": need.bounds, "installed": need.installed, "fits": need.fits}
        found.setdefault(need.extra or "flexkern", {})[need.package] = about
    return found


def tell_packages(found: Found) -> Iterator[str]:
    if not found:
        yield "flexkern is not installed: a copy of its tree is on the path, and says nothing of what it needs"
    for extra, packages in found.items():
        yield f"{extra}: {'; '.join(told(extra, packages))}"


def told(extra: str, packages: dict[str, Found]) -> Iterator[str]:
    """What is there, what does not fit, and what is not there, each where there is any."""
    there = [f"{package} {about['installed']}" for package, about in packages.items() if about["installed"]]
    unfit = [
        f"{package}{about['needs']}" for package, about in packages.items() if about["installed"] and not about["fits"]
    ]
    lacking = [package for package, about in packages.items() if not about["installed"]]
    advice = "" if extra == "flexkern" else f' (pip install "flexkern[{extra}]")'
    if there:
        yield ", ".join(there)
    if unfit:
        yield f"outside of what it needs: {', '.join(unfit)}"
    if lacking:
        yield f"not installed: {', '.join(lacking)}{advice}"


def examine_versions() -> Found:
    from flexkern.cli.requirements import unfit

    return {"unfit": [need.sentence for need in unfit()]}


def tell_versions(found: Found) -> Iterator[str]:
    yield from found["unfit"] or ["what is installed is new enough"]


def examine_demo() -> Found:
    from flexkern.demo import WEIGHTS

    return {"weights": str(WEIGHTS), "bytes": WEIGHTS.stat().st_size if WEIGHTS.is_file() else None}


def tell_demo(found: Found) -> Iterator[str]:
    size = found["bytes"]
    yield f"no weights at {found['weights']}" if size is None else f"{found['weights']}, {size / 1e6:.1f} MB"


EXAMINATIONS: dict[str, tuple[Callable[[], Found], Callable[[Found], Iterator[str]]]] = {
    "python": (examine_python, lambda found: iter([f"{found['version']}, {found['platform']}"])),
    "torch": (examine_torch, tell_torch),
    "gpu": (examine_gpus, tell_gpus),
    "triton": (examine_triton, tell_triton),
    "cpu": (examine_cpu, tell_cpu),
    "backends": (examine_backends, tell_backends),
    "auto": (examine_auto, tell_auto),
    "packages": (examine_packages, tell_packages),
    "versions": (examine_versions, tell_versions),
    "demo": (examine_demo, tell_demo),
}
