"""``flexkern doctor``: what this machine can do, and why not more."""

import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from flexkern import __version__


@dataclass(kw_only=True)
class Doctor:
    """Print what this machine can do: GPU, torch, triton, backends and why not, optional packages, demo weights."""

    def run(self) -> int:
        print(f"{'flexkern':12} {__version__}")
        for name, examine in EXAMINATIONS.items():
            try:
                lines = list(examine())
            except Exception as error:  # a broken package is a finding, not an end
                lines = [f"broken: {type(error).__name__}: {' '.join(str(error).split())}"]
            for line in lines:
                print(f"{name:12} {line}")
                name = ""
        return 0


def examine_torch() -> Iterator[str]:
    import torch

    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    built = f"CUDA {cuda}, cuDNN {cudnn}" if cuda else f"HIP {torch.version.hip}" if torch.version.hip else "CPU only"
    yield f"{torch.__version__}, built for {built}"


def examine_gpus() -> Iterator[str]:
    import torch

    driver = nvidia_driver()
    if not torch.cuda.is_available():
        yield "no CUDA GPU" + (f"; but NVIDIA's driver {driver} is there: is torch built for CUDA?" if driver else "")
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory, capability = f"{gpu.total_memory / 2**30:.0f} GiB", f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{number} {gpu.name}, {memory}, {capability}, driver {driver or 'unknown'}"


def nvidia_driver() -> str | None:
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def examine_triton() -> Iterator[str]:
    import torch

    try:
        import triton
    except ImportError as error:
        yield f"not there: {error}"
        return
    yield triton.__version__ + ("" if torch.cuda.is_available() else ", without a GPU only its interpreter runs")


def examine_cpu() -> Iterator[str]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"{platform.machine()}, {usable} usable cores, torch uses {torch.get_num_threads()} threads"


def examine_backends() -> Iterator[str]:
    from flexkern import backends

    for name in backends.BACKENDS:
        if why := backends.why_not(name):
            yield f"{name} not available: {why}"
        else:
            backends.get_backend(name)
            yield f"{name}: {backends.BACKENDS[name]}"


def examine_extras() -> Iterator[str]:
    """One line for each extra of flexkern: what is installed of it, and what is not."""
    extras = defaultdict(list)
    for requirement in metadata.requires("flexkern") or ():
        if match := re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement):
            extras[match[2]].append(match[1])
    for extra, packages in sorted(extras.items()):
        versions = {package: installed_version(package) for package in packages}
        there = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        lacking = ", ".join(package for package, version in versions.items() if not version)
        advice = f'not installed: {lacking} (pip install "flexkern[{extra}]")' if lacking else ""
        yield f"{extra}: {'; '.join(filter(None, (there, advice)))}"


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine_demo() -> Iterator[str]:
    from flexkern.demo import WEIGHTS

    yield f"{WEIGHTS}, {WEIGHTS.stat().st_size / 1e6:.1f} MB" if WEIGHTS.is_file() else f"no weights at {WEIGHTS}"


EXAMINATIONS: dict[str, Callable[[], Iterator[str]]] = {
    "python": lambda: iter([f"{platform.python_version()}, {platform.platform()}"]),
    "torch": examine_torch,
    "gpu": examine_gpus,
    "triton": examine_triton,
    "cpu": examine_cpu,
    "backends": examine_backends,
    "extras": examine_extras,
    "demo": examine_demo,
}
