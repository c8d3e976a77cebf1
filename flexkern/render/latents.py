"""Latents into a safetensors file as they are made, to be decoded elsewhere.

The file holds one tensor ``latents`` [1, F, C, h, w], in the model's dtype, and text about it as metadata. Its header
is padded with spaces, as the format allows, to a fixed length: each chunk is appended, then the header rewritten in
place with the new F. So the file, named ``x.unfinished.safetensors`` until it is closed, can be read after every chunk,
however the process ended; only a kill between the two writes leaves bytes past the end that the header declares.
"""

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.render.signals import uninterrupted
from flexkern.render.target import Target, validate_file, write_all
from flexkern.state import State

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}  # of torch: of safetensors
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}  # bytes
BLOCK = 1 << 20  # bytes that are read at once
DIGITS = 64  # by which the numbers of a header may grow


def validate_latents_target(path: str | Path) -> None:
    """Raise where no such file can be written.

    Raises:
        ValueError: It is not named .safetensors, or is a folder.
        FileNotFoundError: There is no folder for it.
        PermissionError: It may not be written.
        BlockingIOError: Another render is writing it.
    """
    validate_file(path, "latents", ".safetensors")


class LatentsFile:
    """Stands in for a ``VideoWriter``; a context manager that leaves a file that can be read however it is left.

    Bytes: one chunk is in memory at a time; on disk 0.2 MB for each latent frame of 60x104 in bfloat16.
    """

    def __init__(self, path: str | Path, *, fps: int, per_frame: int, about: Mapping[str, str]):
        """The file is this writer's alone; nothing is written yet.

        Args:
            path: The file, named .safetensors.
            fps: Pictures per second.
            per_frame: Pictures that a latent frame decodes to, except the first, which gives one.
            about: Metadata of the file.

        Raises:
            ValueError: The file is named otherwise.
            FileNotFoundError: There is no folder for it.
            PermissionError: It cannot be written.
            BlockingIOError: Another writer has the file.
        """
        validate_file(path, "latents", ".safetensors", free=False)  # that shows in a moment
        self.path, self.fps, self.per_frame, self.about = Path(path), fps, per_frame, dict(about)
        self.frames = 0  # latent frames so far
        self._target = Target(path)
        self._form: tuple[str, list[int]] | None = None  # dtype, and shape of a frame
        self._header = 0  # length of the header
        self._hash = hashlib.sha256()  # of the data
        self.kept = self._target.unfinished  # what holds the latents so far
        self._begun = self._closed = False

    @property
    def pictures(self) -> int:
        """Pictures that the latents so far decode to."""
        return 1 + (self.frames - 1) * self.per_frame if self.frames else 0

    def taken(self, frames: int, most: int, *, begun: bool) -> tuple[int, int]:
        """Of a chunk, how many latent frames are written, and how many wanted pictures they decode to.

        Args:
            frames: Latent frames of the chunk.
            most: How many further pictures are wanted.
            begun: Whether there are frames before it.
        """
        first = 0 if begun else 1
        count = min(frames, first + math.ceil((most - first) / self.per_frame))
        return count, min(most, first + (count - first) * self.per_frame) if count else 0

    def write(self, latents: "Tensor", most: int) -> None:
        """Append latents.

        Args:
            latents: [F, C, h, w].
            most: How many further pictures are wanted; frames that they do not need are left out.

        Raises:
            ValueError: The latents are not like those so far, or the file is closed.
            OSError: The file has no room; it holds what it held before.
        """
        import torch

        if self._closed:
            raise ValueError(f"{self.path} is closed")
        count, _ = self.taken(len(latents), most, begun=self.frames > 0)
        rows = latents[:count].detach().cpu().contiguous()
        dtype, shape = str(rows.dtype).removeprefix("torch."), list(rows.shape[1:])
        if rows.dim() != 4 or dtype not in DTYPES or (dtype, shape) != (self._form or (dtype, shape)):
            expected = "floating point [F, C, h, w]" if self._form is None else f"{self._form[0]} [F, {self._form[1]}]"
            raise ValueError(f"latents must be {expected}, got {dtype} {list(rows.shape)}")
        if not len(rows):
            return
        with uninterrupted():
            try:
                self._append((dtype, shape), len(rows), rows.view(torch.uint8).numpy().reshape(-1).data)
            except OSError as error:
                raise self._target.named(error) from None

    def _append(self, form: tuple[str, list[int]], frames: int, data: memoryview) -> None:
        if self._form is None:
            self._target.begin()
            self._begun = True
            empty = self._described(form, 0, 0)
            self._header = -(-(len(empty) + DIGITS) // 8) * 8
            self._put(0, self._framed(empty))
            self._form = form
        file = self._target.file
        if not self._target.unfinished.is_file():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))  # moved or removed, with all that was written
        end = 8 + self._header + self.frames * (len(data) // frames)
        try:
            self._put(end, data)
        except OSError:
            file.truncate(end)
            raise
        self._put(0, self._framed(self._described(form, self.frames + frames, len(data) // frames)))
        self._hash.update(data)
        self.frames += frames

    def state(self) -> State:
        """What has to be there to go on from here: so many frames, by their bytes. They are on the disk."""
        if self._begun:
            os.fsync(self._target.file.fileno())
        form = None if self._form is None else [self._form[0], *self._form[1]]
        return {"frames": self.frames, "form": form, "header": self._header, "digest": self._hash.hexdigest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``; frames that were written after it are dropped.

        Raises:
            ValueError: The unfinished file does not hold the frames of the state, bit for bit.
        """
        if not state["frames"]:
            return
        dtype, *shape = state["form"]
        frame = math.prod(shape) * WIDTHS[dtype]
        file, self._header, self._form = self._target.file, state["header"], (dtype, shape)
        end = 8 + self._header + state["frames"] * frame
        if file.seek(0, io.SEEK_END) < end:
            raise ValueError(f"{self._target.unfinished} holds less than the {state['frames']} frames written to it")
        file.seek(8 + self._header)
        found, left = hashlib.sha256(), end - 8 - self._header
        while left and (block := file.read(min(left, BLOCK))):
            found.update(block)
            left -= len(block)
        if found.hexdigest() != state["digest"]:
            raise ValueError(f"{self._target.unfinished} does not hold what was written to it")
        self._begun, self.frames, self._hash = True, state["frames"], found
        self._put(0, self._framed(self._described(self._form, self.frames, frame)))
        file.truncate(end)

    def _described(self, form: tuple[str, list[int]], frames: int, size: int) -> bytes:
        """The header for so many frames of so many bytes."""
        tensor = {"dtype": DTYPES[form[0]], "shape": [1, frames, *form[1]], "data_offsets": [0, frames * size]}
        return json.dumps({"__metadata__": self.about, "latents": tensor}).encode()

    def _framed(self, header: bytes) -> bytes:
        """The header as it stands in the file, after its length."""
        return self._header.to_bytes(8, "little") + header.ljust(self._header)

    def _put(self, at: int, data: bytes | memoryview) -> None:
        """Write all of the data."""
        self._target.file.seek(at)
        write_all(self._target.file, memoryview(data))

    def close(self) -> None:
        """Give the file its name; where nothing was appended, what was there before stays."""
        with uninterrupted():
            if self._closed:
                return
            self._closed = True
            if self.frames:
                self._target.commit()
            elif self._begun:
                self._target.discard()
            else:
                self._target.release()

    def finish(self) -> None:
        """The file has its name."""
        self.close()
        self.kept = self.path

    def stop(self) -> None:
        """What was written so far can be read, under the unfinished name; where nothing was, nothing is left."""
        with uninterrupted():
            if self._closed or not self.frames:
                self.close()
                return
            self._closed = True
            self._target.leave()
            if not self._target.unfinished.is_file():
                self.frames = 0

    def __enter__(self) -> "LatentsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:
                raise
