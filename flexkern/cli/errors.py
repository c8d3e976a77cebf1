"""What the command line says beside its output: notes and refusals, one line each on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from flexkern.render.spoken import heard_by_nobody

FLAGS = {  # that a missing part can be given with
    "VAE": "give --vae PATH (Wan2.1_VAE.pth or a vae folder), or --latents FILE to write latents instead",
    "text encoder": "give --text-encoder PATH (models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder), or "
    "--embeddings FILE with saved embeddings",
}


@contextmanager
def refusing(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Errors of these kinds, and a package that is missing or too old, become one line and the exit status."""
    try:
        yield
    except BrokenPipeError:  # of our own output, not the user's fault
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (advice := missing(error)):
            refuse(advice, status)
        if why := unloadable(error):  # a library of the system that is missing, say: not a word of the user's
            refuse_unfit(error, status)
            refuse(why, status)
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("flexkern"):
            refuse(f"the package {error.name.partition('.')[0]!r} is not installed", status)  # of a copy of the tree
        if isinstance(error, kinds):
            refuse(str(error), status)
        if isinstance(error, ImportError) and error.name is None:  # the sentence of a part that needs another extra
            refuse(str(error), status)
        refuse_unfit(error, status)
        raise


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install for the module that is not there, None where nothing of flexkern asks for it."""
    from flexkern.cli.requirements import command_of, need_of

    need = need_of(str(error.name), command_of(error))
    return None if need is None else f"the package {need.package!r} is not installed: {need.advice}"


def unloadable(error: BaseException) -> str:
    """Which installed package does not load, and why; "" where the error is of none of them."""
    from flexkern.cli.requirements import broken

    if not (need := broken(error)):
        return ""
    why = f"{type(error).__name__}: {error}"
    return f"the package {need.package!r} is installed, {need.installed}, and does not load ({why})"


def refuse_unfit(error: Exception, status: int) -> None:
    """Refuse where the error may be due to packages that are outside flexkern's bounds, by naming them."""
    from flexkern.cli.requirements import comes_from, unfit

    if sentences := "; ".join(need.sentence for need in unfit() if comes_from(error, need)):
        refuse(f"{sentences} ({type(error).__name__}: {error})", status)


def refuse(message: str, status: int) -> NoReturn:
    """One line on stderr, and the exit status."""
    note(f"error: {' '.join(message.split())}")
    raise SystemExit(status)


def translated(part: str, why: str) -> str:
    """Why a part is missing, and the flags that give it."""
    return f"{why}: {FLAGS[part]}"


def in_flags(told: str) -> str:
    """A note on a checkpoint in words of the command line."""
    from flexkern.model.checkpoint import NAME_LORA

    return told.replace(NAME_LORA, "add --lora PATH to use one")


def note(text: str) -> None:
    """Something worth knowing, on stderr; where that is full, or a terminal that is gone, nobody is told."""
    with heard_by_nobody():
        print(f"flexkern: {text}", file=sys.stderr, flush=True)
