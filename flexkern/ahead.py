"""What a function with a state gives, computed on a thread before it is asked for: the same values, in the same order.

What is asked for need not be what was expected. Then the function goes back to the state that it would be in without a
thread, and is called on the spot.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Generic, TypeVar

THREAD = "flexkern-ahead"

Call = TypeVar("Call")
Value = TypeVar("Value")
Held = TypeVar("Held")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made(Generic[Value, Held]):
    """What a call gave, and the state before it."""

    before: Held
    value: Value | None
    error: Exception | None


class Ahead(ABC, Generic[Call, Value, Held]):
    """A function with a state, some of whose calls are made before they are asked for.

    The thread makes one call at a time, in order, and the caller none while it does. It begins with the first
    ``expect``, and ends with this object, once the calls that were expected are made.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Call, Future[_Made[Value, Held]]]] = deque()
        self._worker: ThreadPoolExecutor | None = None

    @abstractmethod
    def _make(self, call: Call) -> Value:
        """What the function gives for a call."""

    @abstractmethod
    def _save(self) -> Held:
        """A copy of its state."""

    @abstractmethod
    def _go_back(self, state: Held) -> None:
        """Take the state that ``_save`` gave."""

    def expect(self, calls: Sequence[Call]) -> None:
        """Begin these calls, which will be asked for next; those of them that were expected before are not repeated."""
        waiting = [call for call, _ in self._waiting]
        if waiting != list(calls[: len(waiting)]):
            self.forget()
            waiting = []
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, THREAD)
        for call in calls[len(waiting) :]:
            self._waiting.append((call, self._worker.submit(self._before_asked, call)))

    def _ask(self, call: Call) -> Value:
        """What the function gives for that call. Raises what it raised, also where that was on the thread."""
        if not self._waiting or self._waiting[0][0] != call or self._waiting[0][1].cancelled():
            self.forget()
            return self._make(call)
        made = self._waiting[0][1].result()  # where this is interrupted, the call still waits
        if made.error is not None:
            self.forget()
            raise made.error
        self._waiting.popleft()
        assert made.value is not None, "a call gives a value or an error"
        return made.value

    def state(self) -> Held:
        """The state after the calls that were asked for, whatever was made since."""
        begun = bool(self._waiting) and not self._waiting[0][1].cancelled()
        return self._waiting[0][1].result().before if begun else self._save()

    def forget(self) -> None:
        """Expect nothing any more. Afterwards the function has the state of the calls that were asked for."""
        for _, future in reversed(self._waiting):
            future.cancel()
        begun = [future for _, future in self._waiting if not future.cancelled()]
        wait_for(begun)
        if begun:
            self._go_back(begun[0].result().before)
        self._waiting.clear()

    def _before_asked(self, call: Call) -> _Made[Value, Held]:
        before = self._save()
        try:
            return _Made(before=before, value=self._make(call), error=None)
        except Exception as error:  # whatever it is, the caller raises it
            return _Made(before=before, value=None, error=error)
