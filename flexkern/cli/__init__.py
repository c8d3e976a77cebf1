"""The command line: ``flexkern render | inspect | metrics | sheet | presets | doctor``.

Bad input gets one line on stderr and exit status 2, before any work; Ctrl-C gives 130. Faults of our own keep their
traceback. What is heavy is imported by the command that needs it, so that errors and help come at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexkern.cli.doctor import Doctor
from flexkern.cli.errors import refusing
from flexkern.policies import PRESETS


@dataclass(kw_only=True)
class Presets:
    """List the presets: methods of horizon extension, each four policies under a name."""

    def run(self) -> int:
        for preset in PRESETS.values():
            print(f"{preset.name:18} {preset.doc}\n{'':18} {preset.source}")
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv as in ``sys.argv[1:]``. Returns the exit status, or raises SystemExit with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with refusing(ValueError, OSError):
            import tyro

            from flexkern.cli.inspect import Inspect
            from flexkern.cli.metrics import Metrics
            from flexkern.cli.policies import with_policies
            from flexkern.cli.render import Render
            from flexkern.cli.sheet import Sheet

            render = with_policies(Render, argv if argv[:1] == ["render"] else [])
            commands: dict[str, Any] = {
                "render": render, "inspect": Inspect, "metrics": Metrics, "sheet": Sheet, "presets": Presets,
                "doctor": Doctor,
            }  # fmt: skip
        about = "Video of any length from autoregressive diffusion models."
        command = tyro.extras.subcommand_cli_from_dict(commands, prog="flexkern", description=about, args=argv)
        status: int = command.run()
        return status
    except KeyboardInterrupt:  # before the first picture, or a second time
        print("flexkern: interrupted", file=sys.stderr)
        return 130
