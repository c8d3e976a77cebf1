"""The record of a render: what was ordered, with which options, by what; kept in its folder and in every checkpoint."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkern.render.order import Order
from flexkern.render.target import GROWING, JOB, parts_name, write_json

FORMAT = 1
Record = dict[str, Any]
"""id: of this render alone. order, identity, options: what it was begun with. history: when it went on, a list."""


def new_record(
    order: Order, identity: Mapping[str, Any], options: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> Record:
    """The record of a render that begins; its entry ``done`` becomes true when the file is whole.

    Args:
        order: What is rendered.
        identity: What decides its bits, besides.
        options: What the engine is made of again; for whoever makes it. Fits JSON.
        about: What the sidecar says besides. Fits JSON.
    """
    return {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "order": order.to_dict(),
        "identity": dict(identity),
        "options": dict(options),
        "about": dict(about or {}),
        "history": [],
        "done": False,
    }


def went_on(record: Record, *, picture: int, identity: Mapping[str, Any], differs: list[str]) -> Record:
    """The record of a render that goes on.

    Args:
        record: As it was.
        picture: The number of the first picture that is made now.
        identity: What decides the bits from here on.
        differs: What is not as it was, in words; empty where nothing is.
    """
    return record | {
        "identity": dict(identity),
        "history": [*record["history"], {"picture": picture, "anyway": differs}],
    }


def write_record(folder: Path, record: Record) -> None:
    """The folder holds the record. Raises OSError where there is no room."""
    write_json(folder / JOB, {"record": record, "checksum": _checksum(record)})


def read_record(target: str | Path) -> Record:
    """The record of the render that was begun to a file.

    Raises:
        FileNotFoundError: None was, or it is over.
        ValueError: The record is damaged or was changed.
    """
    path = parts_name(target) / JOB
    try:
        content = json.loads(path.read_bytes())
        record: Record = content["record"]
        if content["checksum"] != _checksum(record) or record["format"] != FORMAT:
            raise ValueError("its checksum is not that of what it says")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is nothing to go on with: no render to {target} was stopped{_meant(target)}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or was changed: {error}") from None
    return record


def _meant(target: str | Path) -> str:
    """The end of a sentence where the name is that of an unfinished file."""
    path = Path(target)
    named = path.with_name(path.stem.removesuffix(GROWING) + path.suffix)
    return f"; did you mean {named}?" if named != path and (parts_name(named) / JOB).is_file() else ""


def _checksum(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
