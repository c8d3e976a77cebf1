"""Every word of a command line is used or refused: what comes twice, what excludes what, habits of other programs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flexkern import __version__
from flexkern.cli import COMMANDS
from flexkern.cli.argv import FOREIGN, as_text, spellings
from flexkern.cli.doctor import Doctor
from flexkern.cli.inspect import Inspect
from flexkern.cli.metrics import Metrics
from flexkern.cli.policies import with_policies
from flexkern.cli.presets import PLAIN, Presets, describe
from flexkern.cli.render import Render
from flexkern.cli.sheet import Sheet
from flexkern.cli.warmup import Warmup
from flexkern.policies import PRESETS, get_preset
from flexkern.policies.presets import POLICIES
from flexkern.session import Session

ENVIRONMENT = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
REPEATED = {
    "--seed 1 --seed 1": "--seed is given twice",
    "--seed=1 --seed 2": "--seed is given twice",
    "--num-output-frames 3 --num_output_frames=6": "twice, as --num-output-frames and --num_output_frames",
    "--weights a --checkpoint_path b": "--weights is given twice, as --weights and --checkpoint_path",
    "--ema --use_ema": "--ema is given twice, as --ema and --use_ema",
    "--progress --no-progress": "--progress is given twice, as --progress and --no-progress",
    "--switch.keep-sink --switch.no_keep_sink": "--switch.keep-sink is given twice",
    "--retention.window 9 --retention.window=12": "--retention.window is given twice",
    "--position.table 1 1 --position.table 2": "--position.table is given twice",
    "--preset flex --preset pi": "--preset is given twice",
    "--prompt a --prompt b": "--prompt is given twice",
    "--data-path a --prompt_file_path b": "--data-path is given twice",
}


@pytest.mark.parametrize("words", REPEATED)
def test_what_comes_twice_is_refused_by_name(flexkern_, words):
    status, out, err = flexkern_("render", *words.split())
    assert status == 2 and not out
    assert re.fullmatch(rf"flexkern: error: [^\n]*{REPEATED[words]}[^\n]*: give it once\n", err), err


@pytest.mark.parametrize("command", [Render, Inspect, Metrics, Sheet, Presets, Warmup, Doctor])
def test_every_option_of_help_is_known_to_the_words(flexkern_, command, monkeypatch):
    """So that none can come twice: names, aliases and pairs are those that the parser itself has."""
    monkeypatch.setenv("COLUMNS", "300")
    known = spellings(with_policies(command, []) if command in (Render, Warmup) else command)
    text = flexkern_(command.__name__.lower(), "--help")[1]
    rows = re.findall(r"(?:^|  )[^\w-]*(--[a-z][\w.-]*(?:, --[a-z][\w.-]*)*)", text, re.MULTILINE)
    listed = {word for row in rows for word in row.split(", ")}
    assert listed - {"--lora", "--lora-scale"} <= known.keys()
    assert "--no-progress" in listed or command is not Render


@pytest.mark.parametrize("name", ["inspect", "sheet"])
def test_other_commands_refuse_it_too(flexkern_, name):
    known = spellings({"inspect": Inspect, "sheet": Sheet}[name])
    option = next(iter(sorted(known)))
    status, _, err = flexkern_(name, option, "x", f"{option}=y")
    assert status == 2 and f"{option} is given twice" in err


DROPPED = {
    "--frames 3 --out a.mp4 --log a.mp4": "--log a.mp4 is the video's, or its sidecar's file as well: give it another",
    "--frames 3 --out a.mp4 --log ./a.mp4.json": "--log a.mp4.json is the video's, or its sidecar's file as well",
    "--frames 3 --out a.mp4 --manifest a.mp4": "--manifest a.mp4 is the video's, or its sidecar's file as well",
    "--frames 3 --log n.jsonl --manifest ./n.jsonl": "--manifest n.jsonl is --log's file as well: give it another name",
    "--data_path two.txt --output_folder v --log two.txt": "two.txt would be overwritten by --log: it is also --data",
    "--frames 3 --out %06d" + 242 * "x" + ".png": "a file name has at most 255 bytes, got 258: 0",
    "--frames 3 --preview " + 252 * "x" + ".png": "a file name has at most 255 bytes, got 256: x",
    "--prompt \udcff --model self-forcing --weights none.pt": r"prompt must be text in UTF-8, got b'.xff'",
    "--frames 3 --out a.mp4 --latents b.safetensors": "give --latents or --out, not both",
    "--latents b.safetensors --output_folder v": "give --latents or --output-folder, not both",
    "--data_path p.txt --output_folder v --out a.mp4": "give --out or --data-path, not both",
    "--output_folder v --out w/a.mp4": "--out must be a name where --output-folder is given, got w/a.mp4",
    "--extended_prompt_path p.txt": "--extended-prompt-path needs --data-path as well",
    "--save_with_index": "--save-with-index needs --data-path as well",
    "--i2v": "--i2v needs --image as well",
    "--lora-scale 0.5": "--lora-scale is given once for each --lora, or not at all: got 0 of --lora and 1 of --lora-sc",
    "--lora a --lora b --lora-scale 1": "got 2 of --lora and 1 of --lora-scale",
    "--lora a --lora-scale nan": "--lora-scale must be a finite number in float32, got nan",
    "--lora a --lora-scale 1e39": "--lora-scale must be a finite number in float32, got 1e.39",
    "--model tiny.safetensors --config_path c.yaml": "--config-path is for checkpoints",
    "--num_samples 0": "--num-samples must be at least 1, got 0",
    "--seed 18446744073709551616": r"seed must be a whole number >= 0 and below 2\^64",
    "--seed 18446744073709551615 --num_samples 2 --frames 3": "is too large for 2 videos: the last has 1844674407",
    "--data_path two.txt --output_folder v --seed 18446744073709551615": "seed .* is too large for 2 videos",
    "--data_path two.txt --output_folder v --extended_prompt_path p.txt": "p.txt holds 1 prompts, two.txt 2",
    "--data_path s.yaml --output_folder v": "s.yaml is YAML, which holds prompts over time",
    "--prompts two.txt": "two.txt: expected a list of .* got str",
    "--prompts s.yaml --seconds 1": "s.yaml: the prompt at 12 seconds is never shown",
    "--prompts twice.yaml": "twice.yaml is not YAML: '0' is written twice, line 2",
    "--prompts s.yaml --out s.yaml": "the video must be named .mp4",
    "--weights t.mp4 --out t.mp4": "t.mp4 would be overwritten: it is also --weights",
    "--size 48": "--size must be HEIGHTxWIDTH in pixels, such as 480x832, got '48'",
    "--data_path cows.txt --output_folder v --frames 3": "the demo model knows prompts like .* got 'a cow'",
    "--data_path two.txt --output_folder taken": "0001.mp4 is a folder",
    "--noise.kind zero_sum --model self-forcing --weights none.pt --prompt a": "no checkpoint at none.pt",
}


@pytest.mark.parametrize("words", DROPPED)
def test_what_would_be_dropped_or_fail_late_is_refused(flexkern_, tmp_path, tiny, monkeypatch, words):
    monkeypatch.setattr(Session, "step", lambda session: pytest.fail("work was done"))
    red = "a red disc and a blue square on dark green, fast"
    for name, text in {
        "p.txt": f"{red}\n", "two.txt": f"{red}\n{red}\n", "cows.txt": f"{red}\na cow\n", "c.yaml": "sink_size: 1\n",
        "s.yaml": f"0: {red}\n12: {red}\n", "twice.yaml": f"0: {red}\n0: {red}\n", "t.mp4": "",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    Path("taken/0001.mp4").mkdir(parents=True)
    Path("tiny.safetensors").symlink_to(tiny)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = flexkern_("render", *words.split())
    assert status == 2 and not out
    assert re.search(rf"^flexkern: error: [^\n]*{DROPPED[words]}[^\n]*\n\Z", err, re.MULTILINE), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", FOREIGN)
def test_options_of_other_programs_get_a_sentence(flexkern_, option):
    for written in (option, option.replace("-", "_").replace("__", "--", 1)):
        status, out, err = flexkern_("render", written, "3")
        assert (status, out, err) == (2, "", f"flexkern: error: {written}: {FOREIGN[option]}\n")


def test_the_length_follows_the_script(flexkern_):
    red = "a red disc and a blue square on dark green, fast"
    Path("s.yaml").write_text(f"0: {red}\n0:11: {red}\n")
    status, out, err = flexkern_("render", "--prompts", "s.yaml", "--no-progress")
    assert status == 0 and out == "video.mp4: 352 pictures, 22.0 s\n"
    told = (
        "s.yaml: 22 seconds, so that its last prompt, at 11 seconds, is shown as long as the one before it; --seconds"
    )
    assert told in err


def test_samples_have_names_and_seeds_of_their_own(flexkern_):
    red = "a red disc and a blue square on dark green, fast"
    Path("p.txt").write_text(f"{red}\n{red}\n")
    given = ("--frames", 3, "--no-progress")
    listed = ("--data_path", "p.txt", "--output_folder", "v", "--num_samples", 2, "--save_with_index", "--seed", 5)
    status, out, err = flexkern_("render", *listed, *given)
    names = ["v/0000-0.mp4", "v/0000-1.mp4", "v/0001-0.mp4", "v/0001-1.mp4"]
    assert status == 0 and [line.partition(":")[0] for line in out.splitlines()] == names, err
    contents = [Path(name).read_bytes() for name in names]
    for i, content in enumerate(contents):
        assert flexkern_("render", *given, "--seed", 5 + i, "--out", "one.mp4", "--overwrite")[0] == 0
        assert Path("one.mp4").read_bytes() == content
    assert flexkern_("render", *given, "--num-samples", 2, "--out", "w.mp4")[0] == 0
    assert Path("w-0.mp4").exists() and Path("w-1.mp4").exists()


def test_extended_prompts_are_shown_in_place_of_short_ones(flexkern_, monkeypatch):
    seen = []
    begun = Session.__init__
    monkeypatch.setattr(Session, "__init__", lambda s, e, prompt, **k: seen.append(prompt) or begun(s, e, prompt, **k))
    long = "a yellow disc and a cyan triangle on black, slow"
    Path("p.txt").write_text("a disc\n")
    Path("long.txt").write_text(f"{long}\n")
    given = ("--prompt_file_path", "p.txt", "--extended_prompt_path", "long.txt", "--output_folder", "v", "--frames", 3)
    assert flexkern_("render", *given)[0] == 0 and seen == [long]


@pytest.mark.parametrize(
    ("name", "near"), [("FLEX", "flex"), ("Self_Forcing", "self-forcing"), ("LongLive", "longlive")]
)
def test_capitals_and_underscores_are_near(flexkern_, name, near):
    for words in (("render", "--preset", name), ("presets", name)):
        status, _, err = flexkern_(*words)
        assert status == 2 and err.endswith(f"did you mean {near!r}?\n")


def test_a_preset_is_shown_in_words(flexkern_):
    status, out, _ = flexkern_("presets", "flex")
    assert status == 0
    for words in (
        "Bands of fewer than 0.25 cycles in training are slowed by s, those of 1 or more stay as trained.",
        "A frame sees 21 latent frames in all, its own chunk included; the first 3 frames of the video stay",
        "The noise of a frame is correlated by -0.7 with that of the frame before (antiphase noise).",
        "A new prompt leaves what is remembered as it is.",
    ):
        assert words in out
    assert re.search(r"^\* --position.alpha 0.25 +cycles in training", out, re.MULTILINE)
    assert re.search(r"^\* --switch.recent 12 ", flexkern_("presets", "longlive")[1], re.MULTILINE)  # as the window
    assert "--position.jitter-sigma" in out[out.index("Without effect in flex") :]


@pytest.mark.parametrize("name", PRESETS)
def test_options_without_effect_have_none(name):
    """Every field is either listed with its value and plain words, or named as without effect; and that is so."""
    preset = get_preset(name)
    lines = describe(preset)
    apart = " ".join(lines).partition("Without effect")
    idle = lambda option: re.search(rf"{option}(?![\w-])", apart[2]) is not None
    for policy in POLICIES:
        for field in type(getattr(preset, policy)).__dataclass_fields__:
            option = f"--{policy}.{field.replace('_', '-')}"
            assert (f"{option} " in apart[0]) != idle(option), option
            assert f"{policy}.{field}" in PLAIN
    changed = {"noise.rho": 0.5, "noise.weight": 0.5, "noise.window": 8, "position.alpha": 0.3, "position.beta": 3.0}
    changed |= {"position.scale": 2.0, "position.riflex_band": 1, "position.jitter_sigma": 0.1}
    for dotted, value in changed.items():
        other, option = get_preset(name).override({dotted: value}), f"--{dotted.replace('_', '-')}"
        frames = {"query": [60, 61, 62], "visible": [0, *range(45, 63)], "bands": 22, "heads": 2}
        phases = [one.position.phases(**frames) for one in (preset, other)]
        noises = [one.noise.source(0, shape=(2,)) for one in (preset, other)]
        drawn = [[source.initial(range(i, i + 4)) for i in range(0, 40, 4)] for source in noises]
        same = (phases[0].key == phases[1].key).all() and all((a == b).all() for a, b in zip(*drawn, strict=True))
        assert same == idle(option), dotted
    retention = preset.retention
    before = [range(retention.window), *[[*range(3), 7, 7, *range(8, 15)]] * (retention.evicted == "memory")]
    changed = {"sink_rate": 0.5, "slow_rate": 0.5, "fast_rate": 0.5, "average": "frames", "budget": 17, "recent": 5}
    for field, value in changed.items():
        other = get_preset(name).override({f"retention.{field}": value})
        same = all(retention.keep(frames, 3) == other.retention.keep(frames, 3) for frames in before)
        assert same == idle(f"--retention.{field.replace('_', '-')}"), field


IDLE = "--position.cut-position 5 --noise.weight 0.5 --position.riflex-band 3 --noise.window 7 --switch.no-keep-sink"


def test_options_without_effect_are_named_in_a_note(flexkern_, monkeypatch):
    monkeypatch.setattr(Session, "step", lambda session: pytest.fail("work was done"))
    words = ["render", "--frames", "3", "--out", "no/such/v.mp4", "--preset", "flex"]
    told = "riflex-band --position.cut-position --noise.weight --noise.window --switch.keep-sink"
    note = f"flexkern: without effect in flex: --position.{told.replace(' ', ', ')}; see flexkern presets flex\n"
    err = flexkern_(*words, *IDLE.split(), "--position.alpha", 0.2, "--retention.sink", 2)[2]
    assert err.startswith(note) and err.count("\n") == 2
    assert "effect" not in flexkern_(*words, "--noise.kind", "freenoise", "--noise.window", 8)[2]
    assert "effect" not in flexkern_(*words, "--position.index", "slot", "--position.cut-position", 5)[2]


@pytest.mark.parametrize(
    ("word", "guess"), [("rendr", "; did you mean 'render'?"), ("Presets", "; did you mean 'presets'?"), ("xyz", "")]
)
def test_a_command_that_is_none_is_told_by_the_nearest(flexkern_, word, guess):
    told = f"flexkern: error: there is no command {word!r}: expected one of {', '.join(COMMANDS)}{guess}\n"
    assert flexkern_(word, "--frames", 3) == (2, "", told)


def test_the_help_of_positions_says_what_its_letters_are(flexkern_, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(flexkern_("render", "--help")[1].translate({ord(bar): " " for bar in "│|"}).split())
    for words in ("r_j: turns of band j in train_len frames", "s: how many times longer", "share of band j that stays"):
        assert words in text[text.index("position options") : text.index("--position.mode")]


@pytest.mark.parametrize("module", ["flexkern", "flexkern.cli"])
def test_the_module_is_the_command(module, tmp_path):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"flexkern {__version__}\n", "")


@pytest.mark.parametrize("words", ["presets", "presets flex", "render --help", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(tmp_path, words, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "flexkern", *words.split()]
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    command = [sys.executable, "-m", "flexkern", "presets"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"flexkern: error: the output cannot be written: .*No space left on device\n", done.stderr)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale that knows nothing else


def typed(*words: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *words]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, timeout=60)


def test_help_is_whole_where_the_locale_is_ascii():
    done = typed("-m", "flexkern", "--help", **ASCII)
    assert (done.returncode, done.stderr) == (0, b"") and b"? doctor " in done.stdout  # in place of a bullet


@pytest.mark.parametrize("columns", ["1", "2", "20"])
def test_help_ends_and_can_be_read_in_a_few_columns(columns):
    done = typed("-m", "flexkern", "doctor", "--help", COLUMNS=columns)
    assert done.returncode == 0 and "print one JSON object" in done.stdout.decode()


def test_help_has_its_sentences_without_docstrings():
    for words in (("--help",), ("doctor", "--help")):
        done = typed("-OO", "-m", "flexkern", *words)
        assert done.returncode == 0 and b"Print what this machine can do" in done.stdout


@pytest.mark.parametrize("words", ["--help", "doctor --help", "presets flex", "bench", "--version"])
def test_a_stream_that_is_closed_is_no_error(words):
    command = ["sh", "-c", f'exec "$0" -m flexkern {words} <&- >&-', sys.executable]
    done = subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_that_is_closed_gives_its_number_to_nobody():
    """A video that is opened next would get what is printed written into it."""
    code = (
        "import os, flexkern.cli as c; c.prepare_streams(); print('x'); print(os.open('/', 0) > 2, file=c.sys.stderr)"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    done = subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "True\n")


def test_a_prompt_is_what_was_typed_whatever_the_locale():
    as_ascii = "ein grüner Kreis".encode().decode("ascii", "surrogateescape")
    assert as_text(as_ascii) == as_text("ein grüner Kreis") == "ein grüner Kreis"
    with pytest.raises(ValueError, match=r"--prompt must be text in UTF-8, got b'gr\\xfcn'"):
        as_text("grün".encode("latin-1").decode("ascii", "surrogateescape"))
    done = typed("-m", "flexkern", "render", "--frames", "3", "--prompt", "ein grüner Kreis".encode(), **ASCII)
    assert done.returncode == 2 and b"got 'ein gr\\xfcner Kreis'" in done.stderr  # as ASCII writes it


def test_an_image_of_floats_is_refused(flexkern_):
    Image.new("F", (64, 48)).save("x.tif")
    given = ("--model", "self-forcing", "--weights", "none.pt", "--prompt", "a", "--image", "x.tif", "--chunk", 1)
    assert flexkern_("render", *given)[0] == 2
