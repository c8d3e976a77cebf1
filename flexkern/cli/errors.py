"""How the command line refuses: one line on stderr, and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

VIDEO = {"av": "av", "tqdm": "tqdm", "tyro": "tyro", "yaml": "pyyaml", "safetensors": "safetensors"}  # module: package


@contextmanager
def refusing(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Errors of these kinds, and a missing package of the extra ``video``, become one line and the exit status."""
    try:
        yield
    except kinds as error:
        refuse(str(error), status)
    except ModuleNotFoundError as error:
        if error.name not in VIDEO:
            raise
        refuse(f'the package {VIDEO[error.name]!r} is not installed: pip install "flexkern[video]"', status)


def refuse(message: str, status: int) -> None:
    print(f"flexkern: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
