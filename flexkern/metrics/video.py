"""Video files, read as uint8 pictures in RGB, one by one or at given moments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexkern.metrics.vision import Picture

try:
    import av
except ModuleNotFoundError as error:
    raise ImportError('PyAV is not installed: pip install "flexkern[metrics]"') from error


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """What a file says of its first video stream; seconds and pictures are estimates where it does not say them."""

    path: Path
    fps: float
    width: int
    height: int
    seconds: float
    pictures: int


def inspect_video(path: str | Path) -> VideoFile:
    """Return the rate, size and length of a video file, from its headers.

    Args:
        path: anything that FFmpeg reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video, or has no constant rate.
    """
    path = Path(path)
    with _open(path) as container:
        stream = container.streams.video[0]
        fps = stream.average_rate or stream.guessed_rate
        if not fps:
            raise ValueError(f"{path} does not say how many pictures it shows per second")
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        pictures = stream.frames or round(length * fps)
        return VideoFile(
            path=path, fps=float(fps), width=stream.width, height=stream.height,
            seconds=float(length) or float(pictures / fps), pictures=pictures,
        )  # fmt: skip


def read_pictures(path: str | Path) -> Iterator[Picture]:
    """Yield the pictures of a video file in order, uint8 [H, W, 3] in RGB; one is in memory at a time.

    Pictures count, not their timestamps: a rate that varies is read as if it were constant.
    """
    with _open(Path(path)) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")


def pictures_at(path: str | Path, seconds: Sequence[float]) -> list[Picture | None]:
    """Return the pictures that a video shows at the given moments, None past its end; it decodes only near them.

    Args:
        path: of the file.
        seconds: from the start of the video, in any order.
    """
    with _open(Path(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return [_picture_at(container, stream, moment) for moment in seconds]


def _picture_at(container: Any, stream: Any, moment: float) -> Picture | None:
    start = stream.start_time or 0
    container.seek(start + int(moment / stream.time_base), stream=stream)
    shown, half = None, 0.5 / float(stream.average_rate or 16)
    for frame in container.decode(stream):
        at = float((frame.pts - start) * stream.time_base)
        if at > moment + half and shown is not None:
            return shown.to_ndarray(format="rgb24")
        shown, last = frame, at
        if at >= moment - half:
            return frame.to_ndarray(format="rgb24")
    return shown.to_ndarray(format="rgb24") if shown is not None and moment <= last + 2 * half else None


def _open(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a video")
    if not path.is_file():
        raise FileNotFoundError(f"there is no video {path}")
    try:
        container = av.open(f"file:{path.absolute()}")  # a path, whatever it looks like: take-12:30.mp4 is no URL
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no video that FFmpeg reads: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} holds no video stream")
    return container


def as_array(pictures: Any) -> Any:
    """A tensor of bytes as an array, wherever it is; anything else as it is."""
    return pictures.detach().cpu().numpy() if str(getattr(pictures, "dtype", "")) == "torch.uint8" else pictures


def as_pictures(pictures: Any) -> Iterator[Picture]:
    """Yield the pictures of an array, or of a tensor. Raises ValueError unless it is uint8 [T, H, W, 3]."""
    pictures = as_array(pictures)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 [T, H, W, 3], got {pictures.dtype} {list(pictures.shape)}")
    yield from pictures
