"""The process that renders, as the server sees it: lines of JSON to it and from it.

to it     {"run": {"id": ..., "spec": {...}}}    {"stop": id}    the end of the stream: go
from it   {"ready": {...}}    {"event": {...}}    {"outcome": {"status": ..., "code": ..., "message": ...}}
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TAIL = 2000  # characters of what a process said last
LINE = 1 << 20  # characters of a line, at most


class Child:
    """A process that renders. It ends when this one does.

    Attributes:
        ready: Whether it has said so.
    """

    def __init__(self, command: Sequence[str], log: Path):
        """It has been started.

        Args:
            command: To run.
            log: Where what it says on stderr goes; what the one before it said goes.
        """
        self.log, self.ready = log, False
        self._guard = threading.Lock()
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [*command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,  # Ctrl-C is the server's, which stops it in its own way
                text=True,
                encoding="utf-8",
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait_until_ready(self) -> bool:
        """Whether it has begun to listen; False where it ended before."""
        for message in self.messages():
            if "ready" in message:
                self.ready = True
                return True
        return False

    def send(self, **message: Any) -> bool:
        """Whether it could be told."""
        assert self._process.stdin is not None
        with self._guard, suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            return True
        return False

    def messages(self) -> Iterator[Mapping[str, Any]]:
        """What it says, until it ends. What is no message is passed over."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(LINE):
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message
        self._process.wait()

    def end(self, patience: float) -> None:
        """It has ended: by itself within so many seconds, or killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._guard, suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def kill(self) -> None:
        """It has ended."""
        self._process.kill()
        self._process.wait()

    @property
    def epitaph(self) -> str:
        """How it ended, and its last line."""
        status = self._process.poll()
        if status is None:
            return "it runs"
        how = f"ended with status {status}"
        if status < 0:
            with suppress(ValueError):
                how = f"was ended by {signal.Signals(-status).name}"
        with suppress(OSError):
            said = self.log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip().splitlines()
            if said:
                return f"{how}; the last it said: {said[-1][:300]}"
        if status == -signal.SIGKILL:
            return f"{how}, as a system does that has no memory left"
        return how


def worker_command(root: Path, index: int, *, device: str | None, threads: int, every: float) -> list[str]:
    """What starts a worker of flexkern.

    Args:
        root: The server's folder.
        index: Of the worker.
        device: cpu, cuda or cuda:N; None for the first GPU, or the CPU.
        threads: That torch uses; 0 for its own choice.
        every: Seconds between two checkpoints; 0 for one after every chunk.
    """
    more = [str(root), str(index), device or "", str(threads), str(every)]
    return [sys.executable, "-m", "flexkern.serve.work", *more]
