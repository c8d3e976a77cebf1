"""The one rule for the fields of frozen dataclasses."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest

from flexkern.checks import check_fields, is_unicode, json_text


@dataclass(frozen=True, kw_only=True)
class Example:
    size: tuple[int, int] = (4, 6)
    names: tuple[str, ...] = ()
    values: Mapping[str, object] | None = None
    path: Path | None = None
    share: float = 0.0

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "fields", [{}, {"names": ("a", "b", "c")}, {"values": {}}, {"path": Path("x"), "size": (1, 2)}]
)
def test_what_the_annotation_says_passes(fields):
    Example(**fields)


def test_numbers_of_numpy_become_pythons_own():
    one = Example(size=(numpy.int64(4), numpy.int32(6)), share=numpy.float32(0.5))
    assert [type(value) for value in (*one.size, one.share)] == [int, int, float] and one == Example(share=0.5)
    assert type(Example(share=1).share) is int and Example(names=("a",)).names == ("a",)
    with pytest.raises(TypeError, match="Example.share must be a finite number"):
        Example(share=numpy.bool_(True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": (4,)}, r"Example.size must be a tuple of 2 \(an int each\), got \(4,\)"),
        ({"size": (4, 6, 8)}, "tuple of 2"),
        ({"size": (4, 6.5)}, "tuple of 2"),
        ({"size": [4, 6]}, "tuple of 2"),
        ({"names": ("a", 1)}, r"Example.names must be a tuple \(a str each\)"),
        ({"values": [("a", 1)]}, "Example.values must be a Mapping or None"),
        ({"path": "x"}, "Example.path must be a Path or None, got 'x'"),
    ],
)
def test_what_it_does_not_say_is_refused(fields, words):
    with pytest.raises(TypeError, match=words):
        Example(**fields)


def test_json_is_plain_text_that_can_be_written():
    assert json_text({"prompt": "grün 猫"}) == '{"prompt": "grün 猫"}'
    name = os.fsdecode(b"gr\xfcn")  # of a file, in Latin-1
    text = json_text({"file": name, "prompt": "猫"}, indent=1)
    assert json.loads(text.encode().decode()) == {"file": name, "prompt": "猫"}


@pytest.mark.parametrize("text", ["", "a cat", "ü", "🐈", "\u0000"])
def test_whole_characters_are_unicode(text):
    assert is_unicode(text)


@pytest.mark.parametrize("text", ["\udcff", "a \ud83d", "\ud83d\udc08"])
def test_half_of_a_character_is_not(text):
    assert not is_unicode(text)
