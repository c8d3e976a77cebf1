"""How the command line refuses: one line on stderr, and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

VIDEO = {"av": "av", "tqdm": "tqdm", "tyro": "tyro", "yaml": "pyyaml", "PIL": "pillow"}  # module: package
VIDEO |= {"safetensors": "safetensors"}


@contextmanager
def refusing(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Errors of these kinds, and a missing package of an extra, become one line and the exit status."""
    try:
        yield
    except kinds as error:
        refuse(str(error), status)
    except ModuleNotFoundError as error:
        if error.name not in VIDEO:
            raise
        refuse(f'the package {VIDEO[error.name]!r} is not installed: pip install "flexkern[video]"', status)
    except ImportError as error:
        if error.name is not None:  # not the sentence of a part that needs another extra
            raise
        refuse(str(error), status)


def refuse(message: str, status: int) -> None:
    print(f"flexkern: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
