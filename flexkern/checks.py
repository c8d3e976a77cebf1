"""One rule for the fields of every frozen dataclass: the annotation is the check."""

import ast
import inspect
import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from operator import ge, gt, le
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

BOUNDS = {  # name of a bound: in words, and whether a value is within it
    "minimum": ("at least", ge),
    "exclusiveMinimum": ("more than", gt),
    "maximum": ("at most", le),
}
_HINTS: dict[type, dict[str, Any]] = {}
LARGEST_LATENT = 270 * 480  # places of a latent frame: those of a 4K picture
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def json_text(content: Any, **how: Any) -> str:
    """JSON as a person reads it, without escapes, which can be written as UTF-8 whatever it holds.

    A file name of bytes that are no UTF-8 is the exception: it is escaped, and whoever reads the JSON gets it back.

    Args:
        content: What ``json.dumps`` takes.
        how: Its other options.
    """
    text = json.dumps(content, ensure_ascii=False, **how)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, **how)
    return text


def check_fields(instance: Any) -> None:
    """Check that every field of a dataclass instance holds what its annotation says, and make its numbers Python's own.

    Understood: int, float (an int will do, inf and nan will not), bool, str, None, classes, ``Literal``, mappings (not
    what is in them), ``tuple[x, ...]``, ``tuple[x, y]`` and unions of these.

    Raises:
        TypeError: Names the field, what it takes and what it got.
        ValueError: The same, where a ``Literal`` excludes a string.
    """
    hints = hints_of(type(instance))
    for field in fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if not _fits(value, hint):
            words = _literals(hint) if isinstance(value, str) else ()
            error = ValueError if words else TypeError
            name = f"{type(instance).__name__}.{field.name}"
            raise error(f"{name} must be {_describe(hint)}, got {shown(value)}{did_you_mean(value, words)}")
        object.__setattr__(instance, field.name, python_numbers(value))


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a class by name, as objects; resolved once, since jobs are read by the hundred thousand."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def check_bounds(instance: Any) -> None:
    """Check that every number of a dataclass instance is within what the field's metadata says, None left out.

    Understood, as in JSON Schema: minimum, exclusiveMinimum, maximum; of a tuple, they hold for each item.

    Raises:
        ValueError: Names the field, its bound and what it got.
    """
    for field in fields(instance):
        value = getattr(instance, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            for bound, (words, fits) in BOUNDS.items():
                if one is not None and bound in field.metadata and not fits(one, field.metadata[bound]):
                    name = f"{type(instance).__name__}.{field.name}"
                    raise ValueError(f"{name} must be {words} {field.metadata[bound]}, got {one!r}")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass that has one, as one line without a full stop."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs = {}
    for field_and_below in pairwise(getattr(definition, "body", ())):
        match field_and_below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.replace("``", "").split()).removesuffix(".")
    return docs


def require(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def python_numbers(value: Any) -> Any:
    """The value with Python's own numbers, which JSON knows, in place of NumPy's; tuples and lists are looked into."""
    if isinstance(value, tuple | list):
        return type(value)(map(python_numbers, value)) if type(value) in (tuple, list) else value
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def shown(value: Any) -> str:
    """A value as a message can hold it: in one line, cut to 80 characters; an array by its type and shape."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} {list(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def whole(name: str, value: Any, low: int = 0) -> int:
    """The value as an int. Raises ValueError, naming it, unless it is a whole number (no bool) of at least low."""
    require(is_index(value, low), f"{name} must be a whole number >= {low}, got {shown(value)}")
    return int(value)


def latent_size(value: Any) -> tuple[int, int]:
    """Height and width of a latent frame. Raises ValueError unless value is such, as for those of a picture."""
    fits = isinstance(value, tuple | list) and len(value) == 2 and all(is_index(side, 1) for side in value)
    require(fits, f"size must be (height, width), two whole numbers >= 1, got {shown(value)}")
    height, width = int(value[0]), int(value[1])
    expected = "size must be that of a latent frame, an eighth of the picture's in Wan 2.1, (60, 104) for 480x832"
    require(height * width <= LARGEST_LATENT, f"{expected}; got {(height, width)}, larger than that of a 4K picture")
    return height, width


def is_index(value: Any, low: int = 0) -> bool:
    """Whether value is an integer (numpy's included, bool excluded) of at least low."""
    return _fits(value, int) and value >= low


def is_float32(value: Any) -> bool:
    """Whether value is a number (numpy's included, bool excluded) that stays finite in float32."""
    return _fits(value, float) and abs(value) <= LARGEST_FLOAT32


def is_unicode(text: str) -> bool:
    """Whether no character is half of one (a surrogate), which UTF-8 has no bytes for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def did_you_mean(got: Any, known: Iterable[str]) -> str:
    """The tail of an error message that names the closest known word, or an empty string."""
    plain = {word.lower().replace("_", "-"): word for word in known}  # CAPITALS and under_scores are near as well
    close = get_close_matches(str(got).lower().replace("_", "-"), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else ""


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        items = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or hint)


def _literals(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for arg in get_args(hint) for word in _literals(arg))


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin is tuple:
        count = "" if args[1:] == (...,) else f"of {len(args)} "
        return f"a tuple {count}({_describe(args[0])} each)"
    words = {int: "an int", float: "a finite number", bool: "a bool", str: "a str", NoneType: "None"}
    return words.get(hint) or f"a {(origin or hint).__name__}"
