"""The GPU that a kernel is to run on: its architecture, its multiprocessors, and whether Hopper's kernels run there."""

from functools import cache

import torch

from . import CONVOLUTION_LAST, HOPPER, HOPPER_LAST, triton_version


def arch_of(device: torch.device) -> int:
    """The table's architecture for a device: 80, 89, 90, 100 or 120; 0 for the interpreter on a CPU."""
    return 0 if device.type != "cuda" else _arch_of(device.index or 0)


@cache
def _arch_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 0):
        raise NotImplementedError(f"the kernels need compute capability 8.0 or newer, got {major}.{minor}")
    # 8.6 and 8.7 have the shared memory of 8.9; 11.0 is a 10.x under another number
    return {8: 80 if minor == 0 else 89, 9: 90, 10: 100, 11: 100}.get(major, 120)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; four in the interpreter, so that tests cut tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dtype_name(dtype: torch.dtype) -> str:
    """Without the "torch.": "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def unfit_for_hopper(
    *, arch: int, triton: tuple[int, int], dtype: torch.dtype, last: tuple[int, int] = HOPPER_LAST
) -> str | None:
    """Why a kernel written for Hopper does not take a call; None where it does.

    Args:
        arch: As ``arch_of`` says it.
        triton: Major and minor version.
        dtype: Of the operands.
        last: The newest Triton that compiles it to code that can be fast.
    """
    if arch == 0:
        return "Triton interprets its kernels here, or nothing is on a GPU"
    if arch != 90:
        return f"the Hopper kernel needs compute capability 9.0, this GPU is of the class sm_{arch}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper kernel takes bfloat16 and float16, got {dtype_name(dtype)}"
    said = "Triton {}.{}".format
    if triton < HOPPER:
        return f"the Hopper kernel needs {said(*HOPPER)}, {said(*triton)} is installed"
    if triton > last:
        return f"the Hopper kernel was tried to {said(*last)}, {said(*triton)} is installed"
    return None


def why_not_convolve(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``causal_conv_hopper`` does not run on a device, with operands of that dtype; None where it does."""
    return unfit_for_hopper(arch=arch_of(device), triton=triton_version(), dtype=dtype, last=CONVOLUTION_LAST)
