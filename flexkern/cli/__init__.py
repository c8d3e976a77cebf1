"""The command line: ``flexkern render | fleet | decode | schema | inspect | metrics | sheet | eval | presets | warmup |
serve | bench | doctor``.

Bad input gets one line on stderr and exit status 2, before any work; ``flexkern.render.status`` has the others. Faults
of our own keep their traceback. What is heavy is imported by the command that needs it, so that errors and help come at
once.
"""

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flexkern import __version__
from flexkern.checks import did_you_mean
from flexkern.cli.errors import leaving_quietly, refuse, refusing
from flexkern.cli.ranks import follow_torchrun, torchrun_rank

# modules; the one that is named is loaded
COMMANDS = (
    "render", "fleet", "decode", "schema", "inspect", "metrics", "sheet", "eval", "presets", "warmup", "serve", "bench",
    "doctor",
)  # fmt: skip


@leaving_quietly()
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


def run_command(argv: Sequence[str]) -> int:
    """The exit status of the command that argv names."""
    if argv and argv[0] == "bench":  # what follows the name of a bench is its own
        from flexkern.cli.bench import Bench

        return Bench(words=tuple(argv[1:])).run()
    if argv and argv[0] == "render" and torchrun_rank() > 0:
        return follow_torchrun()
    with refusing(ValueError, OSError):
        import tyro

        if argv and argv[0] in COMMANDS:
            from flexkern.cli.argv import validate_words

            named = command_class(argv[0], argv)
            validate_words(named, argv[1:])
            command = tyro.cli(named, prog=f"flexkern {argv[0]}", args=argv[1:])
        else:
            if argv and not argv[0].startswith("-"):
                known = f"expected one of {', '.join(COMMANDS)}"
                raise ValueError(f"there is no command {argv[0]!r}: {known}{did_you_mean(argv[0], COMMANDS)}")
            listed: dict[str, Any] = {name: stand_in(name) for name in COMMANDS}
            about = "Video of any length from autoregressive diffusion models."
            tyro.extras.subcommand_cli_from_dict(listed, prog="flexkern", description=about, args=argv)
            raise AssertionError(f"{argv} names no command, and was not refused")
    status: int = command.run()
    return status


def command_class(name: str, argv: Sequence[str]) -> Any:
    """The dataclass of a command; those of ``render`` and ``warmup`` have the policies of argv's preset as options."""
    found = getattr(import_module(f"flexkern.cli.{name}"), name.capitalize())
    if name not in ("render", "warmup"):
        return found
    from flexkern.cli.policies import with_policies

    return with_policies(found, argv)


def stand_in(name: str) -> type:
    """An empty command under the docstring of the real one, which is read and not imported: a list needs no more."""
    file = Path(__file__).with_name(f"{name}.py")
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    (doc,) = [ast.get_docstring(node) for node in classes if node.name == name.capitalize()]
    made = make_dataclass(name.capitalize(), [])
    made.__doc__ = doc
    return made


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
