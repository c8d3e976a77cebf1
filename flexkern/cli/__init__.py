"""The command line: ``flexkern render | inspect | metrics | sheet | presets | doctor``.

Bad input gets one line on stderr and exit status 2, before any work; Ctrl-C gives 130. Faults of our own keep their
traceback. What is heavy is imported by the command that needs it, so that errors and help come at once.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flexkern import __version__
from flexkern.cli.doctor import Doctor
from flexkern.cli.errors import refuse, refusing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv as in ``sys.argv[1:]``. Returns the exit status, or raises SystemExit with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with closing_output():
            if argv in (["--version"], ["-V"]):
                print(f"flexkern {__version__}")
                return 0
            return run_command(argv)
    except BrokenPipeError:  # the reader has seen enough, as in `flexkern presets | head -1`
        return 128 + 13  # what a shell reports of a program that SIGPIPE has ended
    except KeyboardInterrupt:  # before the first picture, or a second time
        print("flexkern: interrupted", file=sys.stderr)
        return 130


def run_command(argv: list[str]) -> int:
    """The exit status of the command that argv names."""
    with refusing(ValueError, OSError):
        import tyro

        from flexkern.cli.argv import validate_words
        from flexkern.cli.inspect import Inspect
        from flexkern.cli.metrics import Metrics
        from flexkern.cli.policies import with_policies
        from flexkern.cli.presets import Presets
        from flexkern.cli.render import Render
        from flexkern.cli.sheet import Sheet

        render = with_policies(Render, argv if argv[:1] == ["render"] else [])
        commands: dict[str, Any] = {
            "render": render, "inspect": Inspect, "metrics": Metrics, "sheet": Sheet, "presets": Presets,
            "doctor": Doctor,
        }  # fmt: skip
        if argv and argv[0] in commands:
            validate_words(commands[argv[0]], argv[1:])
    about = "Video of any length from autoregressive diffusion models."
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="flexkern", description=about, args=argv)
    status: int = command.run()
    return status


@contextmanager
def closing_output() -> Iterator[None]:
    """What was printed is written out at the end, where it can be told that it cannot."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        silence()
        raise
    except OSError as error:
        if error.filename is not None:  # of a file, not of the output
            raise
        silence()
        refuse(f"the output cannot be written: {error}", 1)


def silence() -> None:
    """Give what is left in the buffers to nobody, so that Python does not complain when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
