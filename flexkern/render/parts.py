"""The folder in which a render keeps what it needs to go on: ``video.mp4.parts`` beside ``video.mp4``.

    job.json                            what is rendered, and with what
    000000.mp4, 000001.mp4, ...         the video so far, in segments that are final; each can be played
    000002.unfinished.mp4               the segment that is growing
    checkpoint-000000960.safetensors    the newest two states that the render can go on from, by pictures made
    lock                                held by the process that renders

The folder goes when the video is whole.
"""

import os
import re
import weakref
from io import FileIO
from pathlib import Path

from flexkern.render.target import GROWING, JOB, LOCK, claim, parts_name, sync_folder

SEGMENT = re.compile(r"\d{6,}(\.unfinished)?\.\w+")
CHECKPOINT = re.compile(r"checkpoint-(\d+)\.safetensors")
LEFT = re.compile(rf"(checkpoint-\d+\.safetensors|{JOB}){GROWING}")  # by a process that was killed
DIGITS = 6


class Parts:
    """The folder of a file's parts; nobody else's until it is released.

    Attributes:
        path: The file that is rendered.
        folder: Where its parts are; made where it is not there, and removed where nothing was put into it.

    Raises:
        BlockingIOError: Another render is writing the file.
        OSError: The folder cannot be made.
    """

    def __init__(self, path: str | Path):
        self.path, self.folder = Path(path), parts_name(path)
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                self._lock = claim(self.folder / LOCK, self.path)
                break
            except FileNotFoundError:
                continue  # another render has just ended, and taken the folder with it
        self._forget = weakref.finalize(self, _release, self._lock, self.folder)

    @property
    def job(self) -> Path:
        """The record of what is rendered."""
        return self.folder / JOB

    def segment(self, number: int, suffix: str) -> Path:
        """Where a segment of the video goes; they count from 0."""
        return self.folder / f"{number:0{DIGITS}}{suffix}"

    def checkpoint(self, pictures: int) -> Path:
        """Where the state after so many pictures goes."""
        return self.folder / f"checkpoint-{pictures:09}.safetensors"

    def drop_segments(self, first: int = 0) -> None:
        """Remove the segments from this number on, and those that are growing."""
        for path in _named(self.folder, SEGMENT):
            if int(path.name.partition(".")[0]) >= first:
                path.unlink(missing_ok=True)

    def drop_checkpoints(self, *, keep: int = 0) -> None:
        """Remove all checkpoints but the newest ones, and what was left of any."""
        for path in (*checkpoints(self.folder)[keep:], *_named(self.folder, LEFT)):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything that a render put here, and nothing else."""
        self.drop_checkpoints()
        self.drop_segments()
        self.job.unlink(missing_ok=True)  # last: it says whether the file is whole

    def release(self) -> None:
        """Let others have it. The folder goes with the lock where nothing else is in it."""
        self._forget()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of parts, the newest first."""
    return sorted(_named(folder, CHECKPOINT), key=made_at, reverse=True)


def made_at(checkpoint: Path) -> int:
    """The pictures that were made when a checkpoint was written."""
    return int(checkpoint.stem.partition("-")[2])


def _named(folder: Path, form: re.Pattern[str]) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if form.fullmatch(path.name) and path.is_file()]
    except FileNotFoundError:
        return []


def _release(lock: FileIO, folder: Path) -> None:
    with lock:
        try:
            empty = os.listdir(folder) == [LOCK]
            if empty:
                (folder / LOCK).unlink()
                folder.rmdir()
                sync_folder(folder.parent)
        except OSError:
            return  # gone already, or somebody else's by now
