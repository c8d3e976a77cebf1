"""The command line: ``flexkern render | inspect | metrics | sheet | presets | doctor``.

Bad input gets one line on stderr and exit status 2, before any work; Ctrl-C gives 130. Faults of our own keep their
traceback. What is heavy is imported by the command that needs it, so that errors and help come at once.
"""

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flexkern.cli.errors import leaving_quietly, refusing

COMMANDS = ("render", "inspect", "metrics", "sheet", "presets", "doctor")  # modules; the one that is named is loaded


@dataclass(kw_only=True)
class Presets:
    """List the presets: methods of horizon extension, each four policies under a name."""

    def run(self) -> int:
        from flexkern.policies import PRESETS

        for preset in PRESETS.values():
            print(f"{preset.name:18} {preset.doc}\n{'':18} {preset.source}")
        return 0


@leaving_quietly()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv as in ``sys.argv[1:]``. Returns the exit status, or raises SystemExit with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with refusing(ValueError, OSError):
            import tyro

            if argv and argv[0] in COMMANDS:
                command = tyro.cli(command_class(argv[0], argv), prog=f"flexkern {argv[0]}", args=argv[1:])
            else:
                listed: dict[str, Any] = {name: stand_in(name) for name in COMMANDS}
                about = "Video of any length from autoregressive diffusion models."
                tyro.extras.subcommand_cli_from_dict(listed, prog="flexkern", description=about, args=argv)
                raise AssertionError(f"{argv} names no command, and was not refused")
        status: int = command.run()
        return status
    except KeyboardInterrupt:  # before the first picture, or a second time
        print("flexkern: interrupted", file=sys.stderr)
        return 130


def command_class(name: str, argv: Sequence[str]) -> Any:
    """The dataclass of a command; that of ``render`` has the policies that argv names as options."""
    if name == "presets":
        return Presets
    found = getattr(import_module(f"flexkern.cli.{name}"), name.capitalize())
    if name != "render":
        return found
    from flexkern.cli.policies import with_policies

    return with_policies(found, argv)


def stand_in(name: str) -> type:
    """An empty command under the docstring of the real one, which is read and not imported: a list needs no more."""
    file = Path(__file__) if name == "presets" else Path(__file__).with_name(f"{name}.py")
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    (doc,) = [ast.get_docstring(node) for node in classes if node.name == name.capitalize()]
    made = make_dataclass(name.capitalize(), [])
    made.__doc__ = doc
    return made
