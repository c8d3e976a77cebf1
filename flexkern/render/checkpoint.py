"""Checkpoints: the state of a render in one file, which can be told from a damaged one.

A safetensors file: the state's tensors, all else as JSON in its metadata, and as the last tensor, ``checksum``, the
SHA-256 of every byte before. It is written under another name, flushed to the disk, then renamed, by a thread, while
the next chunks are made: these wait for the copy that a state is, and for nothing else.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.render.parts import Parts
from flexkern.render.target import BLOCK, whole_file, write_all
from flexkern.state import State

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEPT = 2  # checkpoints of a render; while a third is written there are three
EVERY = 30.0  # seconds between two
SHARE = 0.01  # of the time that copying may take
CHECKSUM = 32  # bytes
DTYPES = {  # of torch: of safetensors
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """The file holds the state, all of it or not at all.

    Args:
        path: The file; one that bears its name is replaced.
        state: Tensors on the CPU, and values that fit JSON.

    Raises:
        OSError: The disk has no room; nothing is left of the file.
    """
    with whole_file(path) as file:
        found = hashlib.sha256()
        for block in _content(state):
            found.update(block)
            write_all(file, block)
        write_all(file, memoryview(found.digest()))


def read_checkpoint(path: Path) -> State:
    """The state that was written.

    Raises:
        Damaged: A byte of the file is not what was written, or it is of another form.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = size - CHECKSUM
        while left > 0 and (block := file.read(min(left, BLOCK))):
            found.update(block)
            left -= len(block)
        told = file.read()
    if size <= CHECKSUM or told != found.digest():
        raise Damaged(f"{path.name} is damaged: its checksum is not that of its bytes")
    try:
        with safe_open(path, framework="pt") as opened:
            content = json.loads(opened.metadata()["content"])
            if content["format"] != FORMAT:
                raise Damaged(f"{path.name} is of format {content['format']}, expected {FORMAT}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != "checksum"}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"{path.name} is no checkpoint: {error}") from None
    return tensors | content["values"]


def _content(state: Mapping[str, Any]) -> Iterator[memoryview]:
    """The bytes of the file but for the checksum: length of the header, header, tensors."""
    import torch

    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    header: dict[str, Any] = {"__metadata__": {"content": json.dumps({"format": FORMAT, "values": values})}}
    end = 0
    widest_first = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each is aligned
    for name in widest_first:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header["checksum"] = {"dtype": "U8", "shape": [CHECKSUM], "data_offsets": [end, end + CHECKSUM]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in widest_first:
        if tensors[name].numel():
            yield memoryview(_bytes(tensors[name])).cast("B")


def _bytes(tensor: "Tensor") -> Any:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the GPU or of the machine."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def memory_words(error: BaseException) -> str:
    """What is said of an error that ``is_out_of_memory``."""
    return f"out of memory: {error or 'there is no more'}"


class Checkpoints:
    """The checkpoints of a render, written while it goes on.

    Attributes:
        pictures: Of the newest that is complete; 0 before the first.
        copying: Seconds that the render waited, in all.
        writing: Seconds of a processor that writing took beside it, in all.
        kept: Called from the thread that writes with the pictures of one that is complete, and with the seconds that
            copying and writing it took.

    Args:
        parts: Where they go.
        every: Seconds between two; 0 for one after every chunk. Where a copy takes long, they are rarer: copying takes
            at most a hundredth of the time.
        tell: Hears, once, that none can be written; the render goes on.
    """

    def __init__(self, parts: Parts, *, every: float = EVERY, tell: Callable[[str], None], pictures: int = 0):
        self._parts, self._every, self._tell = parts, every, tell
        self._next = time.monotonic() + every
        self._thread: threading.Thread | None = None
        self._told = False
        self.kept: Callable[[int, float, float], None] = lambda *_: None
        self.pictures, self.copying, self.writing = pictures, 0.0, 0.0

    def is_due(self, *, now: bool = False) -> bool:
        """Whether it is time for one and the last is complete, which is waited for where somebody wants every one.

        Args:
            now: Whether it is time in any case: the render stops here.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if now or (busy and self._every == 0):
            self.wait()
            return True
        return not busy and time.monotonic() >= self._next

    def take(self, pictures: int, state: Callable[[], State], *, now: bool = False) -> None:
        """Write a checkpoint, if it is time for one and the last is complete.

        Args:
            pictures: How many are made.
            state: Gives a copy of all that the render needs to go on.
            now: Whether it is time in any case: the render stops here.
        """
        if not self.is_due(now=now):
            return
        began = time.monotonic()
        try:
            copied = state()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return self._warn(f"there is not enough memory for a copy of the state ({error})")
        taken = time.monotonic() - began
        self.copying += taken
        self._next = time.monotonic() + (max(self._every, taken / SHARE) if self._every else 0.0)
        self._thread = threading.Thread(target=self._write, args=(pictures, copied, taken), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """The last checkpoint is complete, or has failed."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, pictures: int, state: State, copying: float) -> None:
        began = time.monotonic()
        try:
            write_checkpoint(self._parts.checkpoint(pictures), state)
            self._parts.drop_checkpoints(keep=KEPT)
            self.pictures = pictures
            self.kept(pictures, copying, time.monotonic() - began)
        except OSError as error:
            self._warn(str(error))
        finally:
            self.writing += time.thread_time()  # of this thread, which does nothing else

    def _warn(self, why: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"no checkpoint could be written: {why}; the render goes on without")
