"""What a file is by its first bytes, whatever its name: weights, and whole, or something else in their place.

A clone without Git LFS leaves pointers, a link to a page instead of the file leaves HTML, a broken download an end that
is missing. Each is told by that name, with how to get the file.
"""

import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

Form = Literal["safetensors", "zip", "pickle"]
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PARTIAL = (".incomplete", ".part", ".crdownload", ".aria2", ".download")  # of downloads that are not finished
LFS = b"version https://git-lfs.github.com/spec/"
AGAIN = "download it again (hf download goes on where it stopped)"
STORED = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
}  # bytes by torch's storages
MOST_HEADER = 10**8  # bytes, the limit of safetensors


def validate_form(file: Path) -> Form:
    """The container of a weight file, which is whole as far as its size shows.

    Raises:
        ValueError: Says what the file is instead, or how much of it is missing, and how to get it.
        NotImplementedError: Names a format of weights that is not read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        if file.suffix.lower() in PARTIAL:
            raise ValueError(f"{file} is a download that has not finished; {AGAIN}")
        if _begins_safetensors(start):  # first, for the number that it begins with may look like anything else
            _validate_safetensors(file, stream, size)
            return "safetensors"
        if start.startswith(b"PK"):
            _validate_zip(file, stream, size)
            return "zip"
        if start.startswith(b"\x80"):
            return "pickle"
        _raise_other(file, start, size)


def looks_like_weights(file: Path) -> bool:
    """Whether a file in a folder is named as weights are."""
    return file.suffix.lower() in SUFFIXES


def validate_folder(path: Path) -> None:
    """Raises ValueError for what is there and no folder, where a file would have been taken: a device, or a pipe."""
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")


def require_there(path: str | Path, what: str) -> None:
    """Raises FileNotFoundError where nothing is at a path, with what it may have been meant to be.

    Args:
        path: As the user gave it.
        what: Was looked for there.
    """
    path = Path(path)
    if path.exists():
        return
    if path.is_symlink():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is not there; {AGAIN}")
    raise FileNotFoundError(f"no {what} at {path}{_download(str(path))}")


def _download(name: str) -> str:
    """The end of a sentence on a path that is not there: the command that downloads what it names on the Hub."""
    word = r"[A-Za-z0-9][\w.-]*"
    url = re.match(
        rf"(?:https?:/+)?(?:www\.)?huggingface\.co/({word}/{word})(?:/(?:resolve|blob|tree)/[^/]+/?(.*))?", name
    )
    if url:
        return f"; that is on the Hugging Face Hub: {_command(url[1], (url[2] or '').partition('?')[0])}"
    if Path(name).suffix.lower() in SUFFIXES or not re.fullmatch(rf"{word}/{word}", name):
        expanded = os.path.expanduser(name)
        return f"; did you mean {expanded}?" if expanded != name and os.path.exists(expanded) else ""
    if Path(name).parent.exists():
        return ""
    return f"; if that is a name on the Hugging Face Hub, get it with: {_command(name)}"


def _command(repository: str, file: str = "") -> str:
    only = f" {file}" if file else ""
    return f"hf download {repository}{only} --local-dir {repository.partition('/')[2]}"


def validate_no_pointer(file: Path, start: bytes, what: str) -> None:
    """Raises ValueError for a Git LFS pointer. start: of the file. what: should be in it, for the message."""
    if start.startswith(LFS):
        told = re.search(rb"^size (\d+)", start, re.MULTILINE)
        of = f" for a file of {int(told[1]):,} bytes" if told else ""
        how = "get the file with `git lfs pull` in its repository, or with hf download"
        raise ValueError(f"{file} is a Git LFS pointer{of}, not {what}; {how}")


def _raise_other(file: Path, start: bytes, size: int) -> NoReturn:
    """Raises for what is no container of torch or safetensors."""
    if not start:
        raise ValueError(f"{file} is empty; {AGAIN}")
    validate_no_pointer(file, start, "the weights")
    if start.startswith(b"GGUF"):
        raise NotImplementedError(f"{file} is quantised as GGUF; supported: safetensors and torch's files")
    if start.startswith((b"\x89HDF", b"\x08\x01\x12")):
        raise NotImplementedError(f"{file} is a file of another framework; supported: safetensors and torch's files")
    if file.name.endswith(".index.json"):
        raise ValueError(f"{file} lists the shards of a model: give their folder, {file.parent}")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        how = "a link to a page was downloaded: take the one with /resolve/ in place of /blob/, log in, or hf download"
        raise ValueError(f"{file} is a web page (HTML), not weights; {how}")
    if not any(byte < 9 or 13 < byte < 32 or byte == 127 for byte in start):
        words = start[:60].decode("utf-8", "replace").strip()
        raise ValueError(f"{file} is a text of {size} bytes that begins {words!r}, not weights")
    begins = start[:8].hex(" ")
    raise ValueError(f"{file} is neither a safetensors file nor torch's: it begins with the bytes {begins}")


def _begins_safetensors(start: bytes) -> bool:
    """Whether a file begins with the length of a header, and the header with a brace."""
    return start[8:9] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] <= MOST_HEADER


def _validate_safetensors(file: Path, stream: BinaryIO, size: int) -> None:
    """Raises ValueError where the file is shorter than its header says."""
    stream.seek(0)
    length = struct.unpack("<Q", stream.read(8))[0]
    if size < 8 + length:
        missing = f"at least {8 + length - size:,} bytes are missing"
        raise ValueError(f"{file} is cut off within its header: {missing}; {AGAIN}")
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: its header is damaged ({error})") from None
    if missing := max(0, 8 + length + max(ends, default=0) - size):
        raise ValueError(f"{file} is cut off: {missing:,} of {size + missing:,} bytes are missing; {AGAIN}")


def _validate_zip(file: Path, stream: BinaryIO, size: int) -> None:
    """Raises ValueError where the end of a zip file is missing, which lists what is in it."""
    stream.seek(max(0, size - 66_000))
    if b"PK\x05\x06" in stream.read():
        return
    needed = _bytes_of_storages(stream)
    missing = f"at least {needed - size:,} bytes are missing" if needed > size else "its end is missing"
    raise ValueError(f"{file} is cut off: {missing}; {AGAIN}")


def _bytes_of_storages(stream: BinaryIO) -> int:
    """The bytes of all tensors that the first record of torch's zip file speaks of; 0 where it cannot be read."""
    stream.seek(26)
    try:
        name, extra = struct.unpack("<HH", stream.read(4))
        if not stream.read(name).endswith(b"data.pkl"):
            return 0
        stream.seek(extra, os.SEEK_CUR)
        counter = _Counter(stream)
        counter.load()
        return sum(counter.bytes.values())
    except Exception:  # a damaged pickle raises anything; then the size stays unknown
        return 0


class Nothing:
    """Stands for whatever a pickle makes; runs nothing of it."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "Nothing":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Counter(pickle.Unpickler):
    """Adds up the storages of a pickle of torch without making any object of it."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Nothing,), {})

    def persistent_load(self, pid: Any) -> None:
        _, kind, key, _, count = pid
        self.bytes[key] = count * STORED.get(kind.__name__.removesuffix("Storage"), 1)
