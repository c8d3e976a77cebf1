"""A test on a GPU that hangs ends its process: a kernel whose barriers deadlock hears no signal and no exception."""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 300.0  # of a test; the longest takes a minute, and eight processes may share the GPU


@contextmanager
def ends_after(seconds: float, stderr: int) -> Iterator[None]:
    """A block that takes longer ends the process with a traceback; pytest-xdist names the test and goes on."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def uncaptured_stderr(config) -> int:
    """A descriptor of what pytest's stderr was before it captured it."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return os.dup(2)
