"""The command ``flexkern``, and ``python -m flexkern``: quiet about Ctrl-C from its first import on."""

import sys


def main() -> int:
    """Run the command of ``sys.argv``. Returns the exit status, or raises SystemExit with it."""
    try:
        from flexkern.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("flexkern: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
