"""What a patch replaces in somebody else's objects, and how it is put back."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

ABSENT = object()
Own = TypeVar("Own", bound="Replaced")


class Replaced:
    """A handle of what was replaced. Leaving it as a context manager undoes it."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set the instance's attribute to ``value`` until ``undo``."""
        own = vars(owner).get(name, ABSENT)
        setattr(owner, name, value)
        if own is ABSENT:
            self._undo.callback(delattr, owner, name)
        else:
            self._undo.callback(setattr, owner, name, own)

    def undo(self) -> None:
        """Put everything back. The second call does nothing."""
        self._undo.close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def arguments(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a method takes, without self."""
    return tuple(inspect.signature(method).parameters)[1:]


def undo_patch(owner: Any, handle: str, what: str) -> None:
    """Undo the patch that an attribute of the owner holds.

    Args:
        owner: What was patched.
        handle: Name of the attribute.
        what: What the owner is called where it was patched, for the message.

    Raises:
        ValueError: It was not patched.
    """
    patched = getattr(owner, handle, None)
    if patched is None:
        raise ValueError(f"{what} must be one that patch was called with, got an unpatched {type(owner).__name__}")
    patched.undo()
