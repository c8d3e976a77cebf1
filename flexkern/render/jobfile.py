"""Job files: one job or several, in YAML, JSON or JSON lines, with the line that each word of them stands in.

    - {model: demo, prompt: "a red disc and a blue square on dark green, fast", seconds: 15, out: red.mp4}
    - {model: demo, prompt: "a yellow disc and a cyan square on black, slow", seconds: 15, out: yellow.mp4}

A file holds one job, a list of them, or a document for each. Relative paths start from the file's folder.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkern.checks import require
from flexkern.render.spec import JobSpec, SpecError
from flexkern.render.texts import filled, read_json, read_text

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")  # suffixes of files that hold no jobs
Lines = dict[tuple[str | int, ...], int]
"""the line of a value by the keys and indices that lead to it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """A job of a file, and where it stands."""

    path: Path
    spec: JobSpec
    lines: Mapping[str, int]
    """line of each field that is given, and of the job, under an empty name"""

    def where(self, field: str = "") -> str:
        """File and line of a field; of the job, where the field is not given."""
        return f"{self.path}, line {self.lines.get(field, self.lines[''])}"


def read_jobs(path: str | Path) -> tuple[JobEntry, ...]:
    """The jobs of a file, in their order, each valid in itself.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Names file and line of the first job that will not do, and the lines of the others.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else Path()  # a pipe has no folder
    if path.suffix.lower() in WEIGHTS:
        told = "an option such as --lora takes one file each time it is given"
        raise ValueError(f"{path} is not a job file: weights follow an option, and {told}")
    text = read_text(path, "job file")
    found: list[JobEntry] = []
    wrong: list[tuple[int, str]] = []
    for content, lines in _jobs(path, text):
        try:
            require(isinstance(content, dict), f"a job must be a mapping of fields, got {_named(content)}")
            spec = JobSpec.from_dict(content, folder)
            own = {"": lines[()]} | {str(key[0]): line for key, line in lines.items() if len(key) == 1}
            found.append(JobEntry(path=path, spec=spec, lines=own))
        except SpecError as error:
            entry = () if error.entry is None else (error.entry,)
            line = lines.get((error.field, *entry)) or lines.get((error.field,)) or lines[()]
            wrong.append((line, str(error)))
        except ValueError as error:
            wrong.append((lines[()], str(error)))
    if wrong:
        others = ", ".join(str(line) for line, _ in wrong[1:])
        also = f" ({len(wrong) - 1} more of its jobs will not do: line {others})" if others else ""
        raise ValueError(f"{path}, line {wrong[0][0]}: {wrong[0][1]}{also}")
    require(bool(found), f"{path} holds no job: expected a mapping of fields such as prompt, seconds and out")
    return tuple(found)


def _jobs(path: Path, text: str) -> Iterator[tuple[Any, Lines]]:
    """Content and lines of each job."""
    for content, lines in _documents(path, text):
        if not isinstance(content, list):
            yield content, lines
            continue
        for number, one in enumerate(content):
            yield one, {key[1:]: line for key, line in lines.items() if key[:1] == (number,)}


def _documents(path: Path, text: str) -> Iterator[tuple[Any, Lines]]:
    """Content and lines of each document; those that are empty are left out."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            yield _json(path, text)
            return
        except json.JSONDecodeError:
            pass
        try:
            parts = [(number, line, _json(path, line)) for number, line in filled(text)]
        except json.JSONDecodeError:  # then it is YAML's flow style
            parts = []
        if parts:
            for number, _, (content, lines) in parts:
                yield content, {key: line + number - 1 for key, line in lines.items()}
            return
    import yaml

    from flexkern.render.yaml_forms import Loader

    loader = Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            content = loader.construct_document(node)
            if content is not None:
                yield content, dict(_lines(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a job file: it is nested too deeply") from None
    finally:
        loader.dispose()


def _json(path: Path, text: str) -> tuple[Any, Lines]:
    """Content and lines of JSON. Raises JSONDecodeError where it is none, ValueError for a key that comes twice."""
    try:
        content = read_json(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    import yaml

    from flexkern.render.yaml_forms import Loader

    # YAML reads JSON, but for tabs between the words
    return content, dict(_lines(yaml.compose(text.replace("\t", " "), Loader)))


def _lines(node: Any, key: tuple[str | int, ...] = (), depth: int = 4) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The line of a node, and of those within it to some depth; a field's is that of its name."""
    if not depth or node is None:
        return
    if len(key) == 0 or isinstance(key[-1], int):
        yield key, node.start_mark.line + 1
    if node.id == "sequence":
        for number, one in enumerate(node.value):
            yield from _lines(one, (*key, number), depth - 1)
    elif node.id == "mapping":
        for number, (name, one) in enumerate(node.value):
            named = name.value if name.id == "scalar" else number
            yield (*key, str(named)), name.start_mark.line + 1
            if key and not isinstance(key[-1], int):  # a mapping as a list: {seconds: prompt}
                yield (*key, number), name.start_mark.line + 1
            yield from _lines(one, (*key, str(named)), depth - 1)


def _named(content: Any) -> str:
    return f"{content!r:.60}" if isinstance(content, str | int | float | bool) else f"a {type(content).__name__}"
