"""Values that begin with a dash are values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from flexkern import demo
from flexkern.cli.argv import with_values


@dataclass(kw_only=True)
class Inner:
    mode: str = ""


@dataclass(kw_only=True)
class Command:
    file: Annotated[Path | None, tyro.conf.Positional] = None
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["--what-it-shows"])] = None
    out: Path = Path()
    crf: int = 18
    lora: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    names: tuple[str, ...] = ()
    ema: bool = False
    inner: Inner


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["--prompt", "-a cat"], ["--prompt=-a cat"]),
        (["--prompt", "--a cat", "--ema"], ["--prompt=--a cat", "--ema"]),
        (["--prompt", "-cat", "x"], ["--prompt=-cat", "x"]),
        (["--what_it_shows", "- a cat"], ["--what_it_shows=- a cat"]),
        (["--inner.mode", "-b"], ["--inner.mode=-b"]),
        (["--lora", "-a.pt", "--lora", "-b.pt"], ["--lora=-a.pt", "--lora=-b.pt"]),
        (["--crf", "-3"], ["--crf=-3"]),
        (["--prompt", "a", "-b"], ["--prompt", "a", "-b"]),  # of no option, as is what follows
        (["--ema", "-b"], ["--ema", "-b"]),
        (["--names", "-a"], ["--names", "-a"]),
        (["--out", "-"], ["--out", "-"]),
        (["--prompt", "-h"], ["--prompt", "-h"]),
        (["--", "--prompt", "-a"], ["--", "--prompt", "-a"]),
        (["--prompt"], ["--prompt"]),
    ],
)
def test_a_value_that_begins_with_a_dash_is_given_to_its_option(words, made):
    assert with_values(Command, words) == made


@pytest.mark.parametrize("value", ["--crf", "--cfr", "--a'cat"])
def test_what_may_be_an_option_is_refused_with_the_way_to_write_it(value):
    with pytest.raises(ValueError, match="^--prompt lacks its value; if it is ") as told:
        with_values(Command, ["--prompt", value, "3"])
    written = {"--a'cat": "'--a'\"'\"'cat'"}.get(value, value)
    assert str(told.value).endswith(f"if it is {value}, write --prompt={written}")


def test_commands_take_such_values(flexkern_, monkeypatch):
    monkeypatch.setattr(demo, "load_engine", lambda *_, **__: pytest.fail("the model was loaded"))
    status, _, err = flexkern_("render", "--prompt", "-a cat", "--frames", 3)
    assert status == 2 and err.endswith("got '-a cat'\n")
    told = "flexkern: error: --prompt lacks its value; if it is --frames, write --prompt=--frames\n"
    assert flexkern_("render", "--prompt", "--frames", 3) == (2, "", told)
    status, _, err = flexkern_("decode", "none.safetensors", "--out", "-a.mp4")
    assert status == 2 and err == "flexkern: error: there are no latents none.safetensors\n"
    status, _, err = flexkern_("render", "--preset", "-flex")
    assert status == 2 and "no preset '-flex'" in err
