"""Latents into a safetensors file, to be decoded elsewhere: ``latents`` [1, F, C, h, w], as the model made them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_latents_target(path: str | Path) -> None:
    """Raises ValueError, FileNotFoundError or PermissionError where no such file can be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"latents must be named .safetensors, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"no permission to write {path}")


class LatentsFile:
    """Takes the place of a ``VideoWriter``; the file is written when it is closed, however it is left.

    fps: pictures per second. per_frame: pictures that a latent frame gives, but for the first, which gives one.
    about: metadata of the file. Bytes: all latents are held until then, 0.2 MB each at 60x104 in bfloat16.
    """

    def __init__(self, path: str | Path, *, fps: int, per_frame: int, about: Mapping[str, str]):
        check_latents_target(path)
        self.path, self.fps, self.per_frame, self.about = Path(path), fps, per_frame, dict(about)
        self._parts: list[Tensor] = []

    @property
    def frames(self) -> int:
        return sum(len(part) for part in self._parts)

    @property
    def pictures(self) -> int:
        """That the latents so far decode to."""
        return 1 + (self.frames - 1) * self.per_frame if self.frames else 0

    def write(self, latents: "Tensor", most: int) -> None:
        """Append latents [F, C, h, w], or as many as ``most`` further pictures need."""
        first = 0 if self.frames else 1
        count = first + math.ceil((most - first) / self.per_frame)
        self._parts.append(latents[:count].cpu().clone())

    def close(self) -> None:
        import torch
        from safetensors.torch import save_file

        if self._parts:
            save_file({"latents": torch.cat(self._parts)[None].contiguous()}, self.path, metadata=self.about)

    def __enter__(self) -> "LatentsFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()
