"""What a chunk's steps take, without waiting for the device: events on a GPU, the clock on a CPU."""

import time
from dataclasses import dataclass

import torch

Mark = float | torch.cuda.Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Moments of a chunk. Reading the times waits for the device."""

    began: Mark
    denoised: Mark
    decoded: Mark

    @property
    def denoise(self) -> float:
        """Seconds from noise to clean latents, the clean pass included."""
        return seconds(self.began, self.denoised)

    @property
    def decode(self) -> float:
        """Seconds from latents to pictures."""
        return seconds(self.denoised, self.decoded)


def mark(device: torch.device) -> Mark:
    """This moment of the work on a device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(first: Mark, last: Mark) -> float:
    """Seconds between two moments of one device."""
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    assert not isinstance(first, float) and not isinstance(last, float), "both are of one device"
    last.synchronize()
    return first.elapsed_time(last) / 1000
