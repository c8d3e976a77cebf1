"""What is in a video that a test has made."""

from pathlib import Path

import av


def pictures_in(path: str | Path) -> int:
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))
