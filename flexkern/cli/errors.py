"""What the command line says beside its output: notes and refusals, one line each on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

VIDEO = {"av": "av", "tqdm": "tqdm", "tyro": "tyro", "yaml": "pyyaml", "PIL": "pillow"}  # module: package
VIDEO |= {"safetensors": "safetensors"}
FLAGS = {  # that a missing part can be given with
    "VAE": "give --vae PATH (Wan2.1_VAE.pth or a vae folder), or --latents FILE to write latents instead",
    "text encoder": "give --text-encoder PATH (models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder), or "
    "--embeddings FILE with saved embeddings",
}


@contextmanager
def refusing(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Errors of these kinds, and a missing package of an extra, become one line and the exit status."""
    try:
        yield
    except BrokenPipeError:  # of our own output, not the user's fault
        raise
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


def refuse(message: str, status: int) -> NoReturn:
    """One line on stderr, and the exit status."""
    print(f"flexkern: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def translated(part: str, why: str) -> str:
    """Why a part is missing, and the flags that give it."""
    return f"{why}: {FLAGS[part]}"


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    print(f"flexkern: {text}", file=sys.stderr)
