"""What a person, or a program, sees of a render: progress, a preview, and a log of JSON lines.

    watch = Watch(progress=True, preview="now.png", log="night.jsonl")
    job.run(watch=watch)

``flexkern.render.meter`` has the progress: a bar that moves, or a line now and then.

The log has a line for each event, written at once: ``time`` (UTC), ``event``, and

    started    target, pictures, made (so far), prompt_seconds, seed, preset, prompt, and what the caller adds
    chunk      chunk, made, pictures, frames, denoise_seconds, decode_seconds, encode_seconds, waited_seconds,
               peak_bytes, left_seconds
    switch     at (seconds), prompt, cut, seconds
    checkpoint pictures, copy_seconds, write_seconds
    warning    message
    finished   target, made, seconds, denoise_seconds, encode_seconds, waited_seconds, pictures_per_second,
               denoise_pictures_per_second
    failed     target, made, message (also of a render that was interrupted)

``encode_seconds`` pass beside the next chunk, on the thread that writes. ``waited_seconds`` are those in which the
render stood still for that thread before it could hand the chunk over; of ``finished``, in all.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from flexkern.checks import json_text, require
from flexkern.render.meter import Meter, as_time, rate, seconds_left
from flexkern.render.target import GROWING, beside, validate_name

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexkern.render.script import PromptSwitch

PREVIEW_EVERY = 1.0  # seconds between two previews, at least
PREVIEWS = (".png", ".jpg", ".jpeg")


class Listener(Protocol):
    """Whatever events go to."""

    def write(self, event: str, **about: Any) -> None:
        """An event, and what it says; both as the log of ``flexkern render --log`` has them."""


class Listeners:
    """Several listeners as one."""

    def __init__(self, *listeners: Listener):
        self._listeners = listeners

    def write(self, event: str, **about: Any) -> None:
        """An event, and what it says. Raises OSError where one of them has no room, once all have heard it."""
        failed = None
        for listener in self._listeners:
            try:
                listener.write(event, **about)
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed


class EventLog:
    """JSON lines in a file, each written whole, so that several renders may share one."""

    def __init__(self, path: str | Path):
        """The file can be written; what it holds stays.

        Raises:
            OSError: It cannot.
        """
        self.path = Path(path)
        with self.path.open("ab"):
            pass

    def write(self, event: str, **about: Any) -> None:
        """Append a line. Raises OSError where there is no room."""
        append_line(self.path, as_line({"event": event} | about))


def as_line(content: Mapping[str, Any]) -> str:
    """JSON in one line, with the time before it."""
    return json_text({"time": now()} | dict(content), default=str)


def append_line(path: Path, line: str) -> None:
    """Append a line in one write, which other processes that append do not tear. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def now() -> str:
    """The time in UTC, to milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def validate_preview(path: Path) -> None:
    """Raises ValueError or FileNotFoundError where no preview can be written."""
    named = path.suffix.lower() in PREVIEWS
    require(named, f"a preview must be named {' or '.join(PREVIEWS)}, got {path.name!r}")
    validate_name(path.name)
    require(not path.is_dir(), f"{path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What is told of a chunk; all but the seconds of encoding is known before it is written."""

    index: int
    """number of the session's step, from 0; -1 for what the video was given to begin with"""
    frames: int
    """latent ones"""
    pictures: int
    """that are wanted of it"""
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    waited_seconds: float = 0.0
    """in which the render stood still for the writing of chunks before, since it handed the last one over"""
    peak_bytes: int = 0
    """the most memory until then"""


class Watch:
    """Follows a render and tells of it; one for each video. Chunks and changes of prompt may come from another thread.

    Attributes:
        made: Pictures so far, those of an earlier part of the render included.
        chunks: Chunks that this process made.
        waited: Seconds that the render stood still for the writing, in all; set when its loop is over.
    """

    def __init__(
        self,
        *,
        progress: bool = True,
        preview: str | Path | None = None,
        log: Listener | None = None,
        about: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing is shown yet.

        Args:
            progress: Show it on stderr.
            preview: Picture that is replaced by the newest one, at most once a second.
            log: Where events go.
            about: What the event ``started`` says besides.
            stream: In place of stderr.
            clock: Seconds, for tests.

        Raises:
            ValueError: The preview is named otherwise.
            FileNotFoundError: There is no folder for it.
        """
        if preview is not None:
            validate_preview(Path(preview))
        self.preview = None if preview is None else Path(preview)
        self.progress, self.log, self.about = progress, log, dict(about or {})
        self.made = self.chunks = self._pictures = 0
        self._began_with = 0
        self.waited = self._denoise = self._decode = self._encode = 0.0
        self._clock, self._meter = clock, Meter("pictures", shown=progress, stream=stream, clock=clock)
        self._unlogged = False  # whether an event was lost
        self._began = self._ended = self._previewed = 0.0

    def begin(self, *, pictures: int, made: int, waits_for: str, prompt_seconds: float = 0.0) -> None:
        """A render begins, or goes on from so many pictures; its prompt took so many seconds."""
        self._pictures, self.made, self._began_with = pictures, made, made
        self._began = self._ended = self._clock()
        self._previewed = self._began - PREVIEW_EVERY
        self._event("started", pictures=pictures, made=made, prompt_seconds=round(prompt_seconds, 4), **self.about)
        self._meter.begin(pictures, made, waits_for)

    def wrote(self, chunk: Made, encode_seconds: float = 0.0, newest: "NDArray[Any] | None" = None) -> None:
        """A chunk is in the file, which took so many seconds.

        Args:
            chunk: What it is.
            encode_seconds: That encoding and writing took.
            newest: Its last picture, where there are pictures.
        """
        self.made += chunk.pictures
        self._ended = self._clock()
        number = chunk.index + 1
        self._encode += encode_seconds
        if chunk.index >= 0:  # else it is what the video was given to begin with
            self.chunks += 1
            self._denoise, self._decode = self._denoise + chunk.denoise_seconds, self._decode + chunk.decode_seconds
            self._event(
                "chunk",
                chunk=number,
                made=self.made,
                pictures=self._pictures,
                frames=chunk.frames,
                denoise_seconds=round(chunk.denoise_seconds, 4),
                decode_seconds=round(chunk.decode_seconds, 4),
                encode_seconds=round(encode_seconds, 4),
                waited_seconds=round(chunk.waited_seconds, 4),
                peak_bytes=chunk.peak_bytes,
                left_seconds=round(self._left(), 1),
            )
        self._meter.advance(chunk.pictures, f"chunk {number}")
        due = self._ended - self._previewed >= PREVIEW_EVERY or self.made >= self._pictures
        if self.preview is not None and newest is not None and due:
            self._previewed = self._ended
            write_preview(self.preview, newest)

    def switched(self, switch: "PromptSwitch", seconds: float = 0.0) -> None:
        """The video follows another prompt from now on; that took so many seconds."""
        self._event("switch", at=switch.at, prompt=switch.prompt, cut=switch.cut, seconds=round(seconds, 4))

    def kept(self, pictures: int, copy_seconds: float, write_seconds: float) -> None:
        """A checkpoint of so many pictures is complete; from the thread that wrote it."""
        said = {"copy_seconds": round(copy_seconds, 4), "write_seconds": round(write_seconds, 4)}
        self._event("checkpoint", pictures=pictures, **said)

    def stopping(self) -> None:
        """Somebody wants it to stop; it will, when its chunk is made. Said in the middle of whatever is being said."""
        if self.progress:
            with suppress(RuntimeError):  # a stream that is being written to cannot be written to
                self._meter.say("stopping after this chunk, with a checkpoint; once more, and it is not waited for")

    def end(self) -> None:
        """The loop is over, however it ended."""
        self._meter.close()

    def finished(self, target: Path) -> None:
        """The file is whole."""
        self.end()
        speeds = {key: value for key, value in self.timings().items() if key != "decode_seconds"}
        self._event("finished", target=str(target), made=self.made, **speeds)
        if self.progress and self.chunks:
            self._meter.say(self.summary())

    def failed(self, target: Path, message: str) -> None:
        """The render has stopped before its end."""
        self.end()
        self._event("failed", target=str(target), made=self.made, message=message)

    def warn(self, message: str) -> None:
        """Something worth knowing."""
        self._event("warning", message=message)

    def timings(self) -> dict[str, float]:
        """What this process took, in seconds, and the pictures per second that it made itself."""
        made, seconds = self.made - self._began_with, self._ended - self._began
        return {
            "seconds": round(seconds, 3),
            "denoise_seconds": round(self._denoise, 3),
            "decode_seconds": round(self._decode, 3),
            "encode_seconds": round(self._encode, 3),
            "waited_seconds": round(self.waited, 3),
            "pictures_per_second": rate(made, seconds),
            "denoise_pictures_per_second": rate(made, self._denoise),
        }

    def summary(self) -> str:
        """One line: how fast it was."""
        made, found = self.made - self._began_with, self.timings()
        denoise = f"denoising {found['denoise_pictures_per_second']:.3g} pictures/s"
        whole = f"end to end {found['pictures_per_second']:.3g} pictures/s"
        written = f"encoding {found['encode_seconds']:.3g} s, of which {found['waited_seconds']:.3g} s were waited for"
        return f"{made} pictures in {as_time(found['seconds'])}: {denoise}, {whole}; {written}"

    def _left(self) -> float:
        """Seconds until the end, if it goes on like this."""
        return seconds_left(self._pictures - self.made, self.made - self._began_with, self._ended - self._began)

    def _event(self, event: str, **about: Any) -> None:
        """Write it to the log. A log that cannot be written is said, once, and ends no render."""
        if self.log is None:
            return
        try:
            self.log.write(event, **about)
        except OSError as error:
            if not self._unlogged:
                self._meter.say(f"the log cannot be written: {error}; the render goes on without")
            self._unlogged = True


def write_preview(path: Path, picture: "NDArray[Any]") -> None:
    """Replace a picture at once. A failure is no reason to stop a render, and is not raised."""
    from PIL import Image

    growing = beside(path, path.stem, f"{GROWING}{path.suffix}")
    try:
        Image.fromarray(picture).save(growing)
        growing.replace(path)
    except OSError:
        with suppress(OSError):
            growing.unlink()


def peak_bytes() -> int:
    """The most memory so far: that torch took of a GPU, or of this process where it took none."""
    torch = sys.modules.get("torch")  # never loaded for the sake of looking
    if torch is not None and torch.cuda.is_initialized():
        taken = max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
        if taken:
            return int(taken)
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) << 10
