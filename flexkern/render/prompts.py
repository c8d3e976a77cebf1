"""Lists of prompts: one video for each line of a text file or a table (CSV), or of a file of JSON lines.

    a cat walks on grass                                        {"prompt": "a cat walks on grass"}
    a dog in the snow                                           {"prompts": ["a dog sleeps", "it wakes up"]}

Several prompts of one line follow each other in one video, as in LongLive's interactive files. A table has its prompts
in the column called prompt, caption or text.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkern.checks import require
from flexkern.render.texts import filled, read_json, read_text

FIELDS = ("prompts", "prompt", "caption", "text")  # the first one there is taken
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
SHAPE = '{"prompt": text}, {"prompts": [text, ...]} or a text'
LIKE_JSON = re.compile(r"\s*(\{\s*[\"'}]|\[\s*[\"'{\]])")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptList:
    """The prompts of a file: for each video one, or several that follow each other."""

    videos: tuple[tuple[str, ...], ...]
    unused: tuple[str, ...] = ()
    """keys of JSON, or columns of a table, that say nothing here"""


def read_prompts(path: str | Path) -> PromptList:
    """The prompts of a file, in its order; empty lines are skipped.

    A file is JSON where its name or a line of it says so, and then each of its lines must be; it is a table where its
    name ends in .csv or .tsv, and then its first line names the columns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names the file, the line and what is wrong in it.
    """
    path = Path(path)
    text = read_text(path, "prompt file")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ValueError(f"{path} is YAML, which holds prompts over time; expected one prompt a line, or JSON lines")
    lines = filled(text)
    require(bool(lines), f"{path} holds no prompt: expected one a line")
    if path.suffix.lower() in TABLES:
        return _table(path, text, lines[0][1])
    whole = _whole(path, text) if path.suffix.lower() == ".json" else None
    named = path.suffix.lower() in (*LINES, ".json")
    if not (named or any(LIKE_JSON.match(line) for _, line in lines)):
        return PromptList(videos=tuple((line.strip(),) for _, line in lines))
    unused: dict[str, None] = {}
    videos = []
    for where, entry in _entries(path, lines) if whole is None else enumerate(whole, start=1):
        try:
            videos.append(_prompts(entry, unused))
        except ValueError as error:
            raise ValueError(f"{path}, {'line' if whole is None else 'entry'} {where}: {error}") from None
    require(bool(videos), f"{path} holds no prompt: expected {SHAPE}")
    return PromptList(videos=tuple(videos), unused=tuple(unused))


def _whole(path: Path, text: str) -> Sequence[Any] | None:
    """The entries of a file that is JSON as a whole, None where it is not."""
    try:
        content = read_json(text)
    except json.JSONDecodeError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content if isinstance(content, list) else [content]


def _table(path: Path, text: str, head: str) -> PromptList:
    """The prompts of a table. head: its first line, whose most frequent separator is the table's."""
    separator = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    columns = [cell.strip() for cell in rows[0][1]]
    plain = [column.lower() for column in columns]
    found = next((plain.index(name) for name in FIELDS if name in plain), None)
    if found is not None and plain.count(plain[found]) > 1:
        raise ValueError(f"{path} has several columns called {plain[found]}: rename all but the one of the prompts")
    if found is None:
        how = f"its first line must name the column of the prompts, {' | '.join(FIELDS)}; or call the file .txt"
        raise ValueError(f"{path} is a table by its name: {how}; got {_short(columns)}")
    for number, row in rows[1:]:
        counts = f"{len(row)} cells, the first line {len(columns)}: put quotes around text that holds {separator!r}"
        require(len(row) == len(columns), f"{path}, line {number} has {counts}")
        require(bool(row[found].strip()), f"{path}, line {number} holds no {columns[found]}")
    require(len(rows) > 1, f"{path} holds no prompt below its first line, {head.strip()!r}")
    videos = tuple((row[found].strip(),) for _, row in rows[1:])
    return PromptList(videos=videos, unused=tuple(column for column in columns if column != columns[found]))


def _entries(path: Path, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    """The number and the content of each line."""
    for number, line in lines:
        try:
            yield number, read_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): expected {SHAPE}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _prompts(entry: Any, unused: dict[str, None]) -> tuple[str, ...]:
    """The prompts of one entry. unused: gets the keys that are not used."""
    if isinstance(entry, dict):
        require("at" not in entry, "a prompt with its time belongs to a script, which is a file of its own")
        found = [name for name in FIELDS if name in entry]
        require(bool(found), f"expected {SHAPE}, got {_short(entry)}")
        unused |= dict.fromkeys(name for name in entry if name != found[0])
        entry = entry[found[0]]
    prompts = entry if isinstance(entry, list) else [entry]
    fine = bool(prompts) and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    require(fine, f"expected {SHAPE}, got {_short(entry)}")
    return tuple(prompt.strip() for prompt in prompts)


def _short(entry: Any) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} ..."
