"""How pictures become files: rate, quality and form, apart from what they show."""

from dataclasses import dataclass, field, fields
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import Any, Literal

from flexkern.checks import check_bounds, check_fields, did_you_mean, require

Form = Literal["mp4", "mov", "png", "y4m", "rgb24"]
FORMS: tuple[Form, ...] = ("mp4", "mov", "png", "y4m", "rgb24")
SUFFIXES: dict[str, Form] = {".mp4": "mp4", ".mov": "mov"}
STDOUT = Path("-")
PIPED: tuple[Form, ...] = ("mp4", "y4m", "rgb24")  # what can be written without going back

FASTEST = 1000  # pictures per second
RATES = "fps must be a number of pictures per second, such as 16, 23.976 or 24000/1001"
NTSC = Fraction(1000, 1001)  # 23.976, 29.97 and 59.94 are this times a whole number


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How pictures are encoded; what is not said follows the name of the output and the model.

    Raises:
        TypeError: A field is of another type.
        ValueError: A value is out of range.
    """

    fps: float | None = field(default=None, metadata={"minimum": 1, "maximum": 1000})
    """pictures per second of the file, such as 24, 23.976 or 24000/1001; None: the model's. Another rate shows the same
    pictures faster or slower"""
    crf: int = field(default=18, metadata={"minimum": 0, "maximum": 51})
    """quality of H.264, 0 (lossless) to 51; 18 looks like the original"""
    format: Form | None = None
    """mp4 (H.264), mov (ProRes 422 HQ), png (a folder of pictures), y4m or rgb24 (raw, to stdout alone); None: as the
    output is named, mp4 for stdout"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_bounds(self)

    def rate(self, fps: int) -> int | Fraction:
        """Pictures per second of the file, for a model that makes so many."""
        return exact_rate(fps if self.fps is None else self.fps)

    def speed(self, fps: int) -> float:
        """How many times faster than the model made it the video is shown."""
        return 1.0 if self.fps is None else self.fps / fps

    def form(self, target: Path) -> Form:
        """The form of what is written to a target.

        Raises:
            ValueError: Name and format contradict each other, or the name says none.
        """
        named = form_of(target)
        if target == STDOUT:
            chosen = self.format or "mp4"
            require(chosen in PIPED, f"format {chosen} cannot be written to stdout: expected {' or '.join(PIPED)}")
            return chosen
        if self.format in ("y4m", "rgb24"):
            raise ValueError(f"format {self.format} is written to stdout alone, as '-', got {str(target)!r}")
        if named is None:
            near = did_you_mean(target.suffix, SUFFIXES) if target.suffix else ""
            kinds = "the video must be named .mp4, .mov, or FOLDER/%06d.png for a picture each"
            raise ValueError(f"{kinds}, got {target.name!r}{near}")
        if self.format not in (None, named):
            raise ValueError(
                f"format {self.format} contradicts the name of the output, {target.name!r}, which is {named}"
            )
        return named


def read_encoding(content: Any) -> Any:
    """The encoding that YAML or JSON was read to; what is no mapping is returned as it is.

    Raises:
        ValueError: Names the field and what is wrong in it.
    """
    if not isinstance(content, dict):
        return content
    names = [f.name for f in fields(Encoding)]
    for name in content:
        require(name in names, f"encoding has no field {name!r}{did_you_mean(name, names)}")
    try:
        fps = content.get("fps")
        return Encoding(**content | ({"fps": parse_rate(fps)} if isinstance(fps, str) else {}))
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace("Encoding.", "encoding.")) from None


def parse_rate(text: str) -> float:
    """Pictures per second from text, such as 16, 23.976 and 24000/1001. Raises ValueError where it is none."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{RATES}, got {text!r}") from None


def exact_rate(fps: float | Fraction) -> int | Fraction:
    """Pictures per second as MP4 stores them: whole, or a fraction; 23.976 is 24000/1001, as everybody means it.

    Args:
        fps: A whole number, a float or a fraction, NumPy's too; 1 to 1000.

    Raises:
        ValueError: It is out of range, or not a number.
    """
    if not isinstance(fps, Real) or isinstance(fps, bool) or fps != fps:
        raise ValueError(f"{RATES}, got {fps!r}")
    if fps < 1 or fps > FASTEST:
        raise ValueError(f"fps must be at {'least 1' if fps < 1 else f'most {FASTEST}'}, got {fps}")
    if isinstance(fps, Rational):
        rate = Fraction(int(fps.numerator), int(fps.denominator))
    else:
        rate = Fraction(float(fps)).limit_denominator(1001)
        broadcast = round(rate / NTSC) * NTSC
        if rate.denominator > 1 and abs(rate - broadcast) < Fraction(1, 1000):
            rate = broadcast
    if rate.denominator > 100_000:
        raise ValueError(f"fps must be a fraction with a denominator of at most 100000, got {fps}")
    return int(rate) if rate.denominator == 1 else rate


def form_of(target: Path) -> Form | None:
    """The form that a name tells, None where it tells none."""
    return SUFFIXES.get(target.suffix.lower()) or ("png" if is_sequence(target) else None)


def is_sequence(target: Path) -> bool:
    """Whether a target names a picture each, FOLDER/%06d.png."""
    return target.suffix.lower() == ".png" and numbered(target.name) is not None


def numbered(name: str) -> tuple[str, int, str] | None:
    """What stands before the number in a name such as shot_%06d.png, its digits, and what stands after; else None."""
    before, mark, after = name.partition("%")
    digits, d, rest = after.partition("d")
    fits = bool(mark and d) and (not digits or (digits.isdecimal() and digits.isascii())) and "%" not in rest
    if not fits or not 0 <= int(digits or "0") <= 12 or (digits and not digits.startswith("0")):
        return None
    return before, int(digits or "0"), rest
