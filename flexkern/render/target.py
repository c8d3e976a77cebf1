"""Files that a render writes: under another name until they are complete, and by one render at a time.

``video.mp4`` grows as ``video.unfinished.mp4`` beside it and is renamed when it is closed, so that a name holds either
what it held before or all of the new file. A process killed without warning leaves the unfinished file, which can be
read as far as it goes; the next render to the same name replaces it. What a render needs to go on after that lies in
``video.mp4.parts``, see ``flexkern.render.parts``.
"""

import errno
import hashlib
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from flexkern.checks import json_text, require
from flexkern.render.encoding import is_sequence, numbered

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LONGEST = 255  # bytes of a file name
BLOCK = 1 << 22  # bytes of one call that reads or writes
GROWING = ".unfinished"  # at the end of the name of a file that is not whole yet
LOCK, JOB = "lock", "job.json"  # of a folder of parts: what the render that fills it has locked, and what it is
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what some network file systems answer


def validate_file(path: str | Path, what: str, suffix: str, *, free: bool = True) -> None:
    """Raise where no such file can be written, before anything is.

    Args:
        path: The file.
        what: What goes into it, as the subject of a sentence.
        suffix: How it must be named.
        free: Whether nobody may be writing it.

    Raises:
        ValueError: It has another suffix, or is a folder or a device.
        FileNotFoundError: There is no folder for it.
        PermissionError: It may not be written.
        BlockingIOError: Another render is writing it.
    """
    path = Path(path)
    validate_name(path.name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of an {suffix} file")
    if path.suffix.lower() != suffix:
        raise ValueError(f"{what} must be named {suffix}, got {path.name!r}")
    aim = Path(os.path.realpath(path)) if path.is_symlink() else path  # what is behind a link is written
    if not aim.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {aim.parent} to write {path.name} to")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no ordinary file")
    for needed in (aim.parent, aim) if path.exists() else (aim.parent,):
        if not os.access(needed, os.W_OK):
            raise PermissionError(f"no permission to write {needed}")
    if free:
        validate_free(path)


def validate_free(path: Path) -> None:
    """Raises BlockingIOError where a render is writing the file, or the pictures that bear the name."""
    for held in (unfinished_name(path), parts_name(path) / LOCK):
        if held.is_file():
            with held.open("rb", buffering=0) as file:
                lock_file(file, path, shared=True)


def validate_name(name: str) -> None:
    """Raises ValueError for the name of a file that is longer than file systems take."""
    size = len(os.fsencode(name))
    require(size <= LONGEST, f"a file name has at most {LONGEST} bytes, got {size}: {name}")


def make_folder(folder: Path) -> None:
    """The folder is there, made if needed, and files can be made in it. Raises OSError, which says why not."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: it is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise OSError(f"cannot write to {folder}: {fault.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to {folder}")


def validate_new(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise FileExistsError where a render to the path would replace something, unless it may.

    Args:
        path: The file.
        overwrite: Whether it may.
    """
    path, parts = Path(path), parts_name(path)
    if overwrite:
        return
    begun = (parts / JOB).is_file() or any(parts.glob("checkpoint-*.safetensors"))
    if taken(path) and not (begun and is_sequence(path)):  # whose pictures are there before it is whole
        raise FileExistsError(f"{path} exists already: --overwrite replaces it")
    if begun:
        ways = f"--resume {path} goes on with it, --overwrite begins anew"
        raise FileExistsError(f"{path} was begun already, and {parts.name} holds what was made: {ways}")


def validate_targets(
    targets: Sequence[Path], inputs: Mapping[str, Path], others: Mapping[str, Path] | None = None
) -> None:
    """Raises ValueError where two files that are written are one, or one that is read would be overwritten.

    Args:
        targets: Videos and their sidecars.
        inputs: What is read, by name.
        others: What is written besides, by name: a log, a manifest, a preview.
    """
    real: Callable[[Path], str] = os.path.realpath
    read = {real(path): name for name, path in inputs.items()}
    seen: dict[str, str] = {}
    for target in targets:
        path = real(target)
        if path in seen:
            raise ValueError(f"two videos would be written to {target}")
        if path in read:
            raise ValueError(f"{target} would be overwritten: it is also {read[path]}")
        seen[path] = "the video's, or its sidecar's"
    for name, other in (others or {}).items():
        path = real(other)
        if path in read:
            raise ValueError(f"{other} would be overwritten by {name}: it is also {read[path]}")
        if path in seen:
            raise ValueError(f"{name} {other} is {seen[path]} file as well: give it another name")
        seen[path] = f"{name}'s"


def taken(path: Path) -> bool:
    """Whether something bears the name; of a sequence of pictures, whether there is one of them."""
    if is_sequence(path):
        return bool(sequence(path))
    return path.exists()


def sequence(path: Path) -> list[Path]:
    """The pictures that bear a name such as shots/%06d.png, in their order."""
    found = numbered(path.name)
    if found is None or not path.parent.is_dir():
        return []
    before, digits, after = (re.escape(one) if isinstance(one, str) else one for one in found)
    form = re.compile(rf"{before}(\d{{{max(1, int(digits))},}}){after}")
    named = ((form.fullmatch(one.name), one) for one in path.parent.iterdir())
    return [one for _, one in sorted((int(match[1]), one) for match, one in named if match)]


def unfinished_name(path: str | Path) -> Path:
    """Where a file grows until it is complete: in the same folder, of the same suffix, behind a link beside its aim."""
    path = Path(os.path.realpath(path))
    return beside(path, path.stem, f".unfinished{path.suffix}")


def parts_name(path: str | Path) -> Path:
    """The folder that holds what a render of the file needs to go on; behind a link beside its aim."""
    path = Path(os.path.realpath(path))
    return beside(path, path.name, ".parts")


def beside(path: Path, stem: str, suffix: str) -> Path:
    """A name in the path's folder, shortened, and then marked with the path's own, where it has too many bytes."""
    name = f"{stem}{suffix}"
    if len(os.fsencode(name)) > LONGEST:
        mark = f"-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{suffix}"
        name = os.fsencode(stem)[: LONGEST - len(os.fsencode(mark))].decode(errors="ignore") + mark
    return path.with_name(name)


class Target:
    """A file that this process alone is writing, under its unfinished name.

    Attributes:
        path: As it was given.
        unfinished: Where it grows.
        file: Open for reading and writing, unbuffered.

    Raises:
        BlockingIOError: Another render is writing it.
        OSError: It cannot be created.
    """

    def __init__(self, path: str | Path):
        self.path, self.unfinished = Path(path), unfinished_name(path)
        self.file = claim(self.unfinished, self.path)
        self._forget = weakref.finalize(self, _close, self.file, self.unfinished)

    def begin(self) -> None:
        """Drop what a killed process left."""
        self.file.truncate(0)

    def commit(self) -> None:
        """Give the file its name; what bore it is replaced."""
        self._forget.detach()
        with self.file:  # the lock goes last
            try:
                os.fsync(self.file.fileno())
            finally:
                os.replace(self.unfinished, os.path.realpath(self.path))
        sync_folder(self.unfinished.parent)

    def leave(self) -> None:
        """Close the file under its unfinished name."""
        self._forget.detach()
        with self.file:
            os.fsync(self.file.fileno())

    def discard(self) -> None:
        """Remove the file; what bears its name stays."""
        self._forget.detach()
        self.unfinished.unlink(missing_ok=True)
        self.file.close()

    def release(self) -> None:
        """Close a file that was not begun; what a killed process left stays."""
        self._forget()

    def named(self, error: OSError) -> OSError:
        """The error of a system call, with the name of the file."""
        return OSError(error.errno, error.strerror, str(self.path)) if error.errno else error


def claim(unfinished: Path, path: Path) -> FileIO:
    """A file that is open, and locked until it is closed.

    Args:
        unfinished: The file, created where it is not there.
        path: What is being written, for the message.

    Raises:
        BlockingIOError: Another process, or another writer of this one, has it.
    """
    while True:
        file = FileIO(os.open(unfinished, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666), "r+")
        try:
            lock_file(file, path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(unfinished)):
                return file
        except FileNotFoundError:
            pass  # renamed or removed since it was opened
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def whole_file(path: Path) -> Iterator[FileIO]:
    """A binary file, unbuffered; when the block ends, ``path`` holds all of it, also after a loss of power.

    Where the block ends with an error, the file holds what it held before, and nothing is left beside it.

    Raises:
        OSError: There is no room.
    """
    growing = beside(path, path.name, GROWING)
    try:
        with growing.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        growing.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            growing.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """The file holds the content as JSON, or what it held before. Raises OSError where there is no room."""
    text = json_text(content, indent=1) + "\n"
    with whole_file(path) as file:
        write_all(file, memoryview(text.encode()))


def write_all(file: FileIO, data: memoryview) -> None:
    """Write all of it, in blocks: the system may take a part of each, where little room is left."""
    for start in range(0, len(data), BLOCK):
        left = data[start : start + BLOCK]
        while len(left):
            left = left[file.write(left) :]


def sync_folder(folder: Path) -> None:
    """Names that were given in the folder outlast a loss of power."""
    if os.name == "nt":  # where folders cannot be opened
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def lock_file(file: FileIO, path: Path, *, shared: bool = False) -> None:
    """Lock the file until it is closed, beside others where it is shared. Raises BlockingIOError where it is held."""
    if fcntl is None:
        return
    for patience in (True, True, False):  # a check holds a lock for a moment
        try:
            return fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if not patience:
                raise BlockingIOError(f"another render is writing {path}") from None
            time.sleep(0.02)
        except OSError as error:
            if error.errno in UNLOCKABLE:
                return
            raise


def _close(file: FileIO, unfinished: Path) -> None:
    """Leave nothing where nothing was written."""
    if not file.closed:
        with file:
            if os.fstat(file.fileno()).st_size == 0:
                unfinished.unlink(missing_ok=True)
