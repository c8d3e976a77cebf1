"""The loop that carries a session's chunks to a file: while one is encoded and written, the next is made.

A thread encodes, writes and tells of a chunk (``flexkern.render.backlog``). What it gets is finite, and in the host's
memory or on its way there. The next chunk does not wait for it, unless the one before that is not written yet.

Bytes: the pictures, or latents, of three chunks at most: one is being made, one waits, one is being written.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from flexkern.render.backlog import Backlog
from flexkern.render.latents import LatentsFile
from flexkern.render.outputs import PipeWriter, SequenceWriter
from flexkern.render.script import PromptSwitch
from flexkern.render.segments import SegmentWriter
from flexkern.render.watch import Made, Watch, peak_bytes
from flexkern.render.writer import VideoWriter

if TYPE_CHECKING:  # torch takes seconds to load, and bad input should be told at once
    from flexkern.hostcopy import HostCopy
    from flexkern.session import Chunk, Session

Filled = SegmentWriter | SequenceWriter | LatentsFile
"""what a job can fill, each a ``Writer``"""
Open = VideoWriter | PipeWriter | Filled
"""what a loop can fill"""
Written = Callable[[], None]
"""waits until every chunk so far is in the file; raises what writing raised"""


def render(
    session: "Session",
    writer: Open,
    *,
    pictures: int,
    script: Sequence[PromptSwitch] = (),
    progress: bool = True,
    start: "Chunk | None" = None,
    followed: int = 0,
    after: Callable[[int, Written], None] | None = None,
    fps: float | None = None,
    watch: Watch | None = None,
    stop: Callable[[int, Written], bool] | None = None,
) -> bool:
    """Write the first pictures of the session's video, wherever its chunks end.

    Memory does not grow with the length of the video. When this returns or raises, nothing is being written any more.

    Args:
        session: What makes it. Its decoder gives each chunk's pictures a tensor of their own.
        writer: An open file; pictures that it holds already are not made again.
        pictures: How many to write in all.
        script: Prompts that follow the session's own, in ascending order.
        progress: Show a bar on stderr.
        start: What the session was prefilled with; written first.
        followed: How many prompts of the script the session has come to.
        after: Called when a chunk is made and another follows, with the same number, and with what waits until the
            chunk is written.
        fps: Pictures per second that the script counts by. Default: the writer's.
        watch: Follows it, in place of the bar; hears of a chunk from the thread that has written it.
        stop: Called before each chunk, with what ``after`` gets; where it returns True the render stops.

    Returns:
        True, or False where Ctrl-C or ``stop`` came first; what was made until then is written.

    Raises:
        OSError: The file has no room; told at the next chunk at the latest.
        NotFiniteError: A chunk is not finite; it is not written.
    """
    made, waiting, rate = min(writer.pictures, pictures), list(script[followed:]), fps or writer.fps
    watch = watch or Watch(progress=progress)
    waits = first_wait(session) if watch.progress else ""
    watch.begin(pictures=pictures, made=made, waits_for=waits, prompt_seconds=session.prompt_seconds)
    backlog = Backlog()
    chunks = _Chunks(writer, backlog, watch)
    try:
        with backlog:
            if start is not None:
                made += chunks.write(start, pictures, begun=False)
            while made < pictures:
                if stop is not None and stop(len(script) - len(waiting), backlog.drain):
                    return False
                due = [switch for switch in waiting if switch.at * rate <= made + 1e-6]
                if due:
                    began = time.perf_counter()
                    session.switch(due[-1].prompt)
                    if any(switch.cut for switch in due):
                        session.cut()
                    waiting = waiting[len(due) :]
                    backlog.add(partial(watch.switched, due[-1], time.perf_counter() - began))
                made += chunks.write(session.step(), pictures - made, begun=made > 0, finite=session.validate_chunks)
                if after is not None and made < pictures:
                    after(len(script) - len(waiting), backlog.drain)
    except KeyboardInterrupt:
        backlog.close()  # again: it may have come just before the first time
        return False
    finally:
        watch.waited = backlog.waited
        watch.end()
    return True


def first_wait(session: "Session") -> str:
    """What the first chunk waits for: kernels are compiled at their first launch, unless Triton's cache has them."""
    engine = session.engine
    is_compiled = engine.backend_name == "triton" and engine.model.device.type == "cuda"
    return "compiling or loading kernels" if is_compiled else f"chunk {session.chunks}"


class _Chunks:
    """Hands chunks to the thread that writes them."""

    def __init__(self, writer: Open, backlog: Backlog, watch: Watch):
        self._writer, self._backlog, self._watch = writer, backlog, watch
        self._told = 0.0  # seconds of waiting

    def write(self, chunk: "Chunk", most: int, *, begun: bool, finite: Callable[[], None] = lambda: None) -> int:
        """At most so many pictures of the chunk will be appended. Returns how many.

        Args:
            chunk: What was made.
            most: How many pictures are wanted.
            begun: Whether there are pictures before it.
            finite: Waits for the chunk, and raises where it is not finite; then nothing of it is written.
        """
        from flexkern.hostcopy import HostCopy

        pixels = latents = None
        if isinstance(self._writer, LatentsFile):
            latents = HostCopy(chunk.latents[0])
            _, count = self._writer.taken(chunk.latents.shape[1], most, begun=begun)
        elif chunk.pixels is None:
            raise ValueError("the session's engine has no decoder: write its latents to a LatentsFile")
        else:
            count = min(most, chunk.pixels.shape[1])
        if chunk.pixels is not None and (latents is None or self._watch.preview is not None):
            pixels = HostCopy(chunk.pixels[0, :count])
        finite()
        spent = (0.0, 0.0) if chunk.spent is None else (chunk.spent.denoise, chunk.spent.decode)  # waits for pictures
        self._backlog.make_room()
        waited, self._told = self._backlog.waited - self._told, self._backlog.waited
        made = Made(
            index=chunk.index,
            frames=len(chunk.frames),
            pictures=count,
            denoise_seconds=spent[0],
            decode_seconds=spent[1],
            waited_seconds=waited,
            peak_bytes=peak_bytes(),
        )
        self._backlog.add(partial(_write, self._writer, self._watch, made, most, pixels, latents))
        return count


def _write(
    writer: Open, watch: Watch, made: Made, most: int, pixels: "HostCopy | None", latents: "HostCopy | None"
) -> None:
    """Append the chunk, and tell of it."""
    for copy in (pixels, latents):
        if copy is not None:
            copy.wait()  # which is no part of encoding
    began = time.perf_counter()
    if isinstance(writer, LatentsFile):
        assert latents is not None, "what such a file holds"
        writer.write(latents.wait(), most)
    else:
        assert pixels is not None, "what a video holds"
        writer.write(pixels.wait().numpy())
    newest = pixels.wait()[-1].numpy() if pixels is not None and made.pictures else None
    watch.wrote(made, time.perf_counter() - began, newest)
