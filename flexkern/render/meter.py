"""How far a work is: a bar that moves on a terminal; in a file or a pipe a line, at most every ten seconds."""

import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TextIO

from tqdm import tqdm

from flexkern.render.spoken import Spoken

BAR = "{{desc}}|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit} [{{elapsed}}<{{remaining}}, {{rate_noinv_fmt}}]"
EVERY = 10.0  # seconds between two lines


class Meter:
    """Says how far a work is, on stderr; a context manager that ends its bar. From any thread.

    Attributes:
        total: How many there are to make.
        made: So far.

    Args:
        unit: What is counted, in the plural.
        shown: Whether anything is said of it; what is said beside it always is.
        stream: In place of stderr.
        program: Who says it.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        unit: str,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        program: str = "flexkern",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = self.made = self._first = 0
        self._unit, self._shown, self._program, self._clock = unit, shown, program, clock
        self._stream = Spoken(stream or sys.stderr)
        self._began = self._told = 0.0
        self._what = ""
        self._bar: tqdm[NoReturn] | None = None
        self._guard = threading.RLock()  # a signal's handler may say something in the middle

    def begin(self, total: int, made: int = 0, what: str = "") -> None:
        """So many are to be made, of which some are there.

        Args:
            total: How many.
            made: How many are there.
            what: What is going on.
        """
        self.total, self.made, self._first = total, made, made
        self._began = self._told = self._clock()
        self._what, bar = what, BAR.format(unit=self._unit)
        if self._shown and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=made, desc=_before(what), unit=f" {self._unit}", bar_format=bar, mininterval=0.1,
                dynamic_ncols=True, file=self._stream,
            )  # fmt: skip

    def advance(self, count: int, what: str | None = None) -> None:
        """So many more are made.

        Args:
            count: How many.
            what: What is going on; None for what was.
        """
        with self._guard:
            self.made += count
            self._what = self._what if what is None else what
            now = self._clock()
            if self._bar is not None:
                self._bar.set_description_str(_before(self._what), refresh=False)
                self._bar.update(count)
            elif self._shown and (now - self._told >= EVERY or (count and self.made >= self.total)):
                self._told = now
                self.say(self._line(now - self._began))

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        with self._guard:
            if self._bar is not None:
                self._bar.write(f"{self._program}: {text}", file=self._stream)
            else:
                print(f"{self._program}: {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing moves any more."""
        with self._guard:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, seconds: float) -> str:
        own = self.made - self._first
        share = f"{100 * self.made / self.total:.0f} %" if self.total else "100 %"
        left = seconds_left(self.total - self.made, own, seconds)
        told = f"{as_time(left)} left" if self.made < self.total else "done"
        made = f"{self.made} of {self.total} {self._unit} ({share}), {rate(own, seconds):.3g} {self._unit}/s, {told}"
        return f"{self._what}, {made}" if self._what else made


def _before(what: str) -> str:
    return f"{what} " if what else ""


def seconds_left(left: int, made: int, seconds: float) -> float:
    """Until so many are made as well, if it goes on as with those that took so many seconds."""
    return left * seconds / made if made else 0.0


def rate(count: int, seconds: float) -> float:
    """How many a second, to four decimals; 0 where it took no time."""
    return round(count / seconds, 4) if seconds > 0 else 0.0


def as_time(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
