"""Latents into a safetensors file, to be decoded elsewhere: ``latents`` [1, F, C, h, w], as the model made them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def validate_latents_target(path: str | Path) -> None:
    """Raises ValueError, FileNotFoundError or PermissionError where no such file can be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"latents must be named .safetensors, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"no permission to write {path}")


class LatentsFile:
    """Stands in for a ``VideoWriter``; the file is written when it is closed, however it is left.

    Bytes: all latents are held until then, 0.2 MB each at 60x104 in bfloat16.
    """

    def __init__(self, path: str | Path, *, fps: int, per_frame: int, about: Mapping[str, str]):
        """Nothing is written yet.

        Args:
            path: The file, named .safetensors.
            fps: Pictures per second.
            per_frame: Pictures that a latent frame decodes to, except the first, which gives one.
            about: Metadata of the file.

        Raises:
            ValueError: The file is named otherwise.
            FileNotFoundError: There is no folder for it.
            PermissionError: It cannot be written.
        """
        validate_latents_target(path)
        self.path, self.fps, self.per_frame, self.about = Path(path), fps, per_frame, dict(about)
        self._held: list[Tensor] = []

    @property
    def frames(self) -> int:
        """Latent frames so far."""
        return sum(map(len, self._held))

    @property
    def pictures(self) -> int:
        """Pictures that the latents so far decode to."""
        return 1 + (self.frames - 1) * self.per_frame if self.frames else 0

    def write(self, latents: "Tensor", most: int) -> None:
        """Append latents.

        Args:
            latents: [F, C, h, w].
            most: How many further pictures are wanted; frames that they do not need are left out.
        """
        first = 0 if self.frames else 1
        count = first + math.ceil((most - first) / self.per_frame)
        self._held.append(latents[:count].cpu().clone())

    def close(self) -> None:
        """Write the file; where nothing was appended there is none."""
        import torch
        from safetensors.torch import save_file

        if self._held:
            save_file({"latents": torch.cat(self._held)[None].contiguous()}, self.path, metadata=self.about)

    def __enter__(self) -> "LatentsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
