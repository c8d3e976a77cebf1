"""Text files as people have them, read in one way whatever wrote them.

UTF-8 with or without a byte order mark, UTF-16 with one; lines end at a newline, in the form of Unix, Windows or old
Macs, and nowhere else. YAML has YAML 1.2's numbers (010 is ten, 1e-3 a number, 1:30 no number of base sixty) and no
key twice; JSON and JSON lines are read as such.
"""

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TIMES = (  # hours, minutes, seconds
    re.compile(r"(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>[0-5]?\d(?:\.\d*)?)"),
    re.compile(
        r"(?=\S)(?:(?P<h>\d+)\s*h(?:ours?)?)?\s*(?:(?P<m>\d+)\s*m(?:in(?:ute)?s?)?)?\s*"
        r"(?:(?P<s>\d*\.?\d+)\s*s(?:ec(?:ond)?s?)?)?"
    ),
    re.compile(r"(?P<ms>\d+)\s*ms"),
    re.compile(r"(?P<s>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"),
)
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
TOO_DEEP = "its brackets are nested too deeply"
EXAMPLES = "seconds or a time such as 90, 1:30, 60s or 1m30s"


def read_text(path: str | Path, what: str = "file") -> str:
    """The text of a file.

    Args:
        path: The file; a pipe will do.
        what: What it is, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, or not text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {what} {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a {what}")
    content = path.read_bytes()
    if wide := _unmarked_utf16(content):
        how = f"save it as UTF-8, such as with iconv -f {wide} -t UTF-8"
        raise ValueError(f"{path} looks like {wide} without a byte order mark: {how}")
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        named = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise ValueError(f"{path} is not text in {named}, at byte {error.start}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds bytes of zero")
    return text


def _unmarked_utf16(content: bytes) -> str | None:
    """The form of UTF-16 that text without a byte order mark seems to have: every other byte of Latin letters is 0."""
    pairs, odd = divmod(len(content), 2)
    if odd or not pairs or content.startswith(tuple(MARKS)):
        return None
    zeros = content[::2].count(0), content[1::2].count(0)
    few, many = min(zeros), max(zeros)
    if many <= pairs / 4 or few > many / 8:
        return None
    return "UTF-16LE" if zeros[1] == many else "UTF-16BE"


def split_lines(text: str) -> list[str]:
    """The lines of a text; Unicode's other separators, which ``str.splitlines`` knows, belong to their line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_data(path: str | Path, what: str = "file") -> Any:
    """What a file of YAML, JSON or JSON lines holds; the lines as a list.

    Args:
        path: The file.
        what: What it is, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names the file, and the line where it is neither of these, or has a key twice.
    """
    text = read_text(path, what)
    if text.lstrip()[:1] in ("{", "["):
        for content in (text, f"[{','.join(line for _, line in filled(text))}]"):  # or JSON lines
            try:
                return read_json(content)
            except json.JSONDecodeError:
                continue
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    import yaml

    from flexkern.render.yaml_forms import Loader

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{path}: {TOO_DEEP}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not YAML: {getattr(error, 'problem', None) or error}{where}") from None


def read_json(text: str) -> Any:
    """What JSON holds. Raises JSONDecodeError, or another ValueError for a key that is written twice, or brackets."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def filled(text: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    return [(number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip()]


def parse_time(value: Any, name: str = "at") -> float:
    """Seconds, from a number or from text such as 7.5, 60s, 1m30s, 1:30 and 1:02:30.

    Args:
        value: What was written.
        name: What it is, for messages.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    for form in TIMES if isinstance(value, str) else ():
        if (found := form.fullmatch(value.strip().lower())) is not None:
            seconds = math.fsum(UNITS[unit] * float(count) for unit, count in found.groupdict(default="0").items())
            return int(seconds) if seconds.is_integer() else seconds
    raise ValueError(f"{name} must be {EXAMPLES}, got {value!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError for a key that comes twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is written twice")
        found[key] = value
    return found
