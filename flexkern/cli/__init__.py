"""The command line: ``flexkern render | fleet | decode | schema | inspect | metrics | sheet | eval | presets | warmup |
serve | bench | doctor``.

Bad input gets one line on stderr and exit status 2, before any work; ``flexkern.render.status`` has the others. Faults
of our own keep their traceback. What is heavy is imported by the command that needs it, so that errors and help come at
once.
"""

import ast
import codecs
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from importlib import import_module
from pkgutil import get_data
from typing import Any

from flexkern import __version__
from flexkern.checks import did_you_mean
from flexkern.cli.errors import refuse, refusing
from flexkern.cli.ranks import follow_torchrun, torchrun_rank
from flexkern.render.signals import leaving_quietly

# modules; the one that is named is loaded
COMMANDS = (
    "render", "fleet", "decode", "schema", "inspect", "metrics", "sheet", "eval", "presets", "warmup", "serve", "bench",
    "doctor",
)  # fmt: skip
NARROWEST = 60  # columns of help


@leaving_quietly("flexkern")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv as in ``sys.argv[1:]``. Returns the exit status, or raises SystemExit with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    prepare_streams()
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
    with refusing(ValueError, OSError), wide_enough():
        import tyro

        if argv and argv[0] in COMMANDS:
            from flexkern.cli.argv import validate_words, with_values

            words = with_values(plain_class(argv[0]), argv[1:])
            named = command_class(argv[0], words)
            validate_words(named, words)
            command = tyro.cli(named, prog=f"flexkern {argv[0]}", args=words)
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


def plain_class(name: str) -> Any:
    """The dataclass of a command."""
    found = getattr(import_module(f"flexkern.cli.{name}"), name.capitalize())
    if sys.flags.optimize > 1:
        found.__doc__ = sentence_of(name)
    return found


def command_class(name: str, words: Sequence[str]) -> Any:
    """The dataclass of a command; those of ``render`` and ``warmup`` have the policies of the preset in the words that
    follow its name as options."""
    found = plain_class(name)
    if name not in ("render", "warmup"):
        return found
    from flexkern.cli.policies import with_policies

    return with_policies(found, words)


def stand_in(name: str) -> type:
    """An empty command under the docstring of the real one, which is read and not imported: a list needs no more."""
    made = make_dataclass(name.capitalize(), [])
    made.__doc__ = sentence_of(name)
    return made


def sentence_of(name: str) -> str | None:
    """The docstring of a command, from its source: `python -OO` drops those of what is imported."""
    source = get_data("flexkern.cli", f"{name}.py")  # from a zip as well
    assert source is not None, f"flexkern.cli.{name} has no source"
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (doc,) = [ast.get_docstring(node) for node in classes if node.name == name.capitalize()]
    return doc


def prepare_streams() -> None:
    """Streams that are closed lead nowhere, and no character is too strange for one: a locale may know ASCII alone."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # a file name of any bytes is printed as those bytes
        is_wide = codecs.lookup(sys.stdout.encoding).name.startswith("utf")
        sys.stdout.reconfigure(errors="surrogateescape" if is_wide else "replace")


@contextmanager
def wide_enough() -> Iterator[None]:
    """Help has room for its words: in a column or two tyro would look for it without end."""
    given = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns >= NARROWEST:
        yield
        return
    os.environ["COLUMNS"] = str(NARROWEST)
    try:
        yield
    finally:
        if given is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = given


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
