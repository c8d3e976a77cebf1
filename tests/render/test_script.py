"""Scripts and lists of prompts: every form that people write them in, what is refused, and which prompts are shown."""

import json
from pathlib import Path

import pytest

import flexkern.render
from flexkern.render import Pace, PromptSwitch, read_prompts, read_script, seconds_needed, spread, validate_shown
from flexkern.render.texts import parse_time, read_text, split_lines

WAN = Pace(chunk=3, first_chunk=3, per_frame=4, fps=16)


@pytest.mark.parametrize(
    "text",
    ["- {at: 0, prompt: one}\n- {at: 2.5, prompt: two, cut: true}", "[{prompt: one, at: 0.0}, {at: 2.5, prompt: two}]"]
    + ["0: one\n2.5: two"],
)
def test_scripts_have_two_forms(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    one, two = read_script(tmp_path / "s.yaml")
    assert (one.at, one.prompt, one.cut) == (0, "one", False)
    assert (two.at, two.prompt, two.cut) == (2.5, "two", "cut" in text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0: [", "s.yaml is not YAML: .*, line 1$"),
        (b"\xff\xfe\x00", "s.yaml is not text in UTF-16"),
        ("", "expected a list .* got nothing"),
        ("just text", "expected a list .* got str"),
        ("1: late", "the first prompt must be at 0 seconds, got 1"),
        ("{0: a, 5: b, 4: c}", "times must ascend, got 4 after 5"),
        ("[{at: 0, prompt: a}, {at: 0, prompt: b}]", "times must ascend"),
        ("[{at: 0, prompt: a, cut: true}]", "the first prompt cannot cut"),
        ("[{at: 0, text: a}]", "entry 1: expected {at: seconds, prompt: text}"),
        ("[{at: 0, prompt: a, blend: 3}]", "entry 1: expected"),
        ("[a, b]", "entry 1: expected"),
        ("{0: a, 5: b, 5: c}", "s.yaml is not YAML: '5' is written twice, line 1"),
        ('{"0": "a", "5": "b", "5": "c"}', "s.yaml: '5' is written twice"),
        ("{0: a, 5: b, 5.0: c}", "s.yaml is not YAML: '5.0' is written twice, line 1"),
        ("[" * 9000, "s.yaml: its brackets are nested too deeply"),
        ("{a: " * 9000, "s.yaml: its brackets are nested too deeply"),
        ("{0: a, 1.0.0: b}", "entry 2: at must be seconds .* got '1.0.0'"),
        ("{0: a, '1:75': b}", "entry 2: at must be seconds .* got '1:75'"),
        ("{0: a, true: b}", "entry 2: at must be seconds .* got True"),
        ("{0: a, 1e400: b}", "entry 2: PromptSwitch.at must be a finite number, got inf"),
        (b"0: caf\xe9", "s.yaml is not text in UTF-8, at byte 6: save it as UTF-8"),
        ("{0: a, soon: b}", "entry 2: at must be seconds or a time such as 90, 1:30, .* got 'soon'"),
        ("{0: a, .inf: b}", "entry 2: PromptSwitch.at must be a finite number, got inf"),
        ("{-1: a}", "entry 1: at must be a number of seconds >= 0, got -1"),
        ("{0: 7}", "entry 1: PromptSwitch.prompt must be a str, got 7"),
        ("[{at: 0, prompt: a}, {at: 1, prompt: b, cut: 1}]", "entry 2: PromptSwitch.cut must be a bool, got 1"),
    ],
)
def test_wrong_scripts_are_refused(tmp_path, text, words):
    (tmp_path / "s.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        read_script(tmp_path / "s.yaml")


def test_a_missing_script_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no prompt file"):
        read_script(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1:30", 90), ("0:30", 30), ("01:05", 65), ("1:02:30", 3750), ("1:30.5", 90.5), ("60s", 60), ("1m30s", 90),
        ("1m", 60), ("2 min", 120), ("1h", 3600), ("1.5 seconds", 1.5), ("250ms", 0.25), ("7.5", 7.5), (" 90 ", 90),
        ("010", 10), ("1e1", 10), (".5", 0.5), (3, 3), (2.5, 2.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "form", ["{{0: a, {}: b}}", "{{0: a, '{}': b}}", "[{{at: 0, prompt: a}}, {{at: {}, prompt: b}}]"]
)
def test_times_are_read_as_people_write_them(tmp_path, written, seconds, form):
    """Bare, quoted, and in both forms of a script; YAML 1.1 has numbers of base sixty and eight of its own."""
    assert parse_time(written) == seconds
    if ":" in str(written) and "'" not in form:  # in YAML's braces a bare colon is a colon of the mapping
        form = "0: a\n{}: b" if form.startswith("{{0") else "- {{at: 0, prompt: a}}\n- at: {}\n  prompt: b"
    (tmp_path / "s.yaml").write_text(form.format(written))
    assert [switch.at for switch in read_script(tmp_path / "s.yaml")] == [0, seconds]


def test_a_script_may_be_json_or_json_lines(tmp_path):
    """Escapes, tabs and surrogates are JSON's own; YAML reads none of the three."""
    entries = [{"at": 0, "prompt": "a/b"}, {"at": "0:02", "prompt": "caf\u00e9 \U0001f600", "cut": True}]
    expected = (PromptSwitch(at=0, prompt="a/b"), PromptSwitch(at=2, prompt="caf\u00e9 \U0001f600", cut=True))
    whole = json.dumps(entries, indent="\t").replace("/", "\\/")
    lines = "\r\n".join(map(json.dumps, entries)) + "\r\n"
    for name, text in {"s.json": whole, "s.yaml": whole, "s.jsonl": lines, "s.txt": lines}.items():
        (tmp_path / name).write_text(text)
        assert read_script(tmp_path / name) == expected
    (tmp_path / "one.jsonl").write_text(json.dumps(entries[0]))
    assert read_script(tmp_path / "one.jsonl") == expected[:1]


ENCODED = {"plain": "utf-8", "marked": "utf-8-sig", "wide": "utf-16"}


@pytest.mark.parametrize("encoding", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_nobodys_words(tmp_path, encoding, end):
    odd = "b\x0bc\x1cd\x85e\u2028f\u2029g"  # where str.splitlines would cut
    (tmp_path / "p.txt").write_bytes(end.join(["a\u00e9", "", odd, ""]).encode(encoding))
    assert read_prompts(tmp_path / "p.txt").videos == (("a\u00e9",), (odd,))
    (tmp_path / "s.yaml").write_bytes(end.join(["0: a\u00e9", "5: b", ""]).encode(encoding))
    assert [switch.prompt for switch in read_script(tmp_path / "s.yaml")] == ["a\u00e9", "b"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in ("a\u00e9", "b\u2028c")]
    (tmp_path / "p.jsonl").write_bytes(end.join(lines).encode(encoding))
    assert read_prompts(tmp_path / "p.jsonl").videos == (("a\u00e9",), ("b\u2028c",))


def test_lines_end_at_newlines_only():
    assert split_lines("a\nb\r\nc\rd\x0ce") == ["a", "b", "c", "d\x0ce"]


def test_a_pipe_is_a_file(tmp_path):
    import os
    import threading

    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=(tmp_path / "p").write_text, args=("a cat\n",))
    writer.start()
    assert read_text(tmp_path / "p") == "a cat\n"
    writer.join()


@pytest.mark.parametrize(
    ("name", "text", "videos", "unused"),
    [
        ("p.txt", "a\n\n b \n", [["a"], ["b"]], []),
        ("p.txt", '"a" he said\n{b} c\n[d] e', [['"a" he said'], ["{b} c"], ["[d] e"]], []),
        ("p.jsonl", '{"prompts": ["a", "b"]}\n\n{"prompts": ["c"]}\n', [["a", "b"], ["c"]], []),
        ("p.txt", '{"prompts": ["a", "b"]}\n', [["a", "b"]], []),
        ("p.jsonl", '{"prompt": "a", "id": 3}\n{"caption": "b", "seed": 1}\n"c"\n["d", "e"]',
         [["a"], ["b"], ["c"], ["d", "e"]], ["id", "seed"]),
        ("p.json", '[\n  {"prompt": "a"},\n  "b"\n]', [["a"], ["b"]], []),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', [["a"], ["b"]], []),
        ("p.json", '{"prompts": ["a", "b"]}', [["a", "b"]], []),
        ("p.NDJSON", '{"text": "a"}', [["a"]], []),
        ("p.csv", "prompt\na\nb\n", [["a"], ["b"]], []),
        ("p.csv", 'Prompt\n"a, ""b"""\n\nc\n', [['a, "b"'], ["c"]], []),
        ("p.CSV", "id;caption;seed\r\n1;a, b;0\r\n2;c;1\r\n", [["a, b"], ["c"]], ["id", "seed"]),
        ("p.tsv", "text\tn\na, b\t1\n", [["a, b"]], ["n"]),
    ],
)  # fmt: skip
def test_lists_of_prompts_are_text_or_json(tmp_path, name, text, videos, unused):
    (tmp_path / name).write_text(text)
    found = read_prompts(tmp_path / name)
    assert found.videos == tuple(map(tuple, videos)) and found.unused == tuple(unused)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", " \n\n", "holds no prompt: expected one a line"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b"',
            r"p.jsonl, line 3 is not JSON .*: expected {\"prompt\": text}",
        ),
        ("p.txt", '{"prompt": "a"}\nb', "p.txt, line 2 is not JSON"),
        ("p.txt", "{'prompt': 'a'}", "p.txt, line 1 is not JSON"),
        ("p.jsonl", "a cat", "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", '{"promt": "a"}', r'line 1: expected .*, got {"promt": "a"}'),
        ("p.jsonl", '{"prompts": []}', "line 1: expected"),
        ("p.jsonl", '{"prompts": ["a", 3]}', "line 1: expected"),
        ("p.jsonl", '{"prompt": " "}', "line 1: expected"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' is written twice"),
        ("p.jsonl", '{"at": 0, "prompt": "a"}', "line 1: a prompt with its time belongs to a script"),
        ("p.json", '["a", {"x": 1}]', "p.json, entry 2: expected"),
        ("p.json", "[]", "holds no prompt"),
        ("p.yaml", "0: a", "p.yaml is YAML, which holds prompts over time"),
        ("p.txt", b"a\0b", "p.txt is not text: it holds bytes of zero"),
        (
            "p.txt",
            "a cat\u00e9\n".encode("utf-16-le"),
            "p.txt looks like UTF-16LE without a .*: save it as UTF-8, such",
        ),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16-be"), "p.jsonl looks like UTF-16BE without a byte order mark"),
        ("p.csv", "a cat\na dog\n", r'p.csv is a table .* name the column .*prompt \| caption.*; got \["a cat"\]'),
        ("p.csv", "prompt\na cat, a dog\n", "p.csv, line 2 has 2 cells, the first line 1: put quotes around text"),
        ("p.csv", "id,prompt\n1,\n", "p.csv, line 2 holds no prompt"),
        ("p.csv", "prompt\n", "p.csv holds no prompt below its first line, 'prompt'"),
        ("p.csv", 'prompt\n"a cat\n', "p.csv, line 2: unexpected end of data"),
        ("p.csv", "prompt,Prompt\na,b\n", "p.csv has several columns called prompt: rename all but the one"),
        ("p.json", "[" * 9000, "p.json: its brackets are nested too deeply"),
        ("p.jsonl", "[" * 9000, "p.jsonl, line 1: its brackets are nested too deeply"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a prompt file"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("pace", [WAN, Pace(chunk=1, first_chunk=1, per_frame=1, fps=16),
                                  Pace(chunk=3, first_chunk=1, per_frame=4, fps=16)])  # fmt: skip
def test_a_pace_says_when_chunks_begin(pace):
    sizes = [pace.first_chunk] + [pace.chunk] * 50
    starts = [0]
    for count in range(1, 50):
        starts.append(1 + (sum(sizes[:count]) - 1) * pace.per_frame)
    assert [pace.start(chunk) for chunk in range(50)] == starts
    for sixteenths in (0, 0.5, 1, 4, 4.8, 9, 9.5, 21, 33):
        assert pace.chunk_at(sixteenths / 16) == next(i for i, start in enumerate(starts) if start >= sixteenths)
    for pictures in range(1, 40):
        assert pace.chunks(pictures) == sum(start < pictures for start in starts)


@pytest.mark.parametrize(
    ("times", "pictures", "words"),
    [
        ([0, 12], 160, "the prompt at 12 seconds is never shown: the video has 160 pictures, 10 seconds, and its last"),
        ([0, 9.9], 160, "at 9.9 seconds is never shown: .* its last chunk begins at 9.56"),
        ([0, 5, 12], 160, "at 12 seconds"),
        ([0, 1, 1.2, 5], 160, "the prompt at 1 seconds is never shown: that at 1.2 begins with the same chunk"),
        ([0, 9.5625], 160, None),
        ([0, 0.5], 10, None),
        ([0, 0.6], 10, "at 0.6 seconds is never shown"),
    ],
)
def test_a_prompt_that_is_never_shown_is_refused(times, pictures, words):
    script = tuple(PromptSwitch(at=at, prompt=f"{at}") for at in times)
    if words is None:
        validate_shown(script, pictures, WAN)
    else:
        with pytest.raises(ValueError, match=words):
            validate_shown(script, pictures, WAN)


def test_prompts_without_times_are_spread_over_chunks():
    even = spread(["a", "b", "c"], WAN.start(9), WAN)
    assert [WAN.chunk_at(switch.at) for switch in even] == [0, 3, 6] and [s.prompt for s in even] == ["a", "b", "c"]
    for count in range(1, 8):
        validate_shown(spread(["a"] * count, WAN.start(7), WAN), WAN.start(7), WAN)
    told = spread(["a", "b"], 100, WAN, switches=[6])
    assert told[1].at == 21 / 16 and WAN.chunk_at(told[1].at) == 2  # after six latent frames
    with pytest.raises(ValueError, match="4 prompts need as many chunks, the video has 3"):
        spread(["a"] * 4, WAN.start(3), WAN)
    with pytest.raises(ValueError, match="1 switches are for 2 prompts, got 3"):
        spread(["a"] * 3, 100, WAN, switches=[6])


def test_the_last_prompt_needs_as_long_as_the_one_before():
    at = lambda *times: [PromptSwitch(at=time, prompt="a") for time in times]
    assert [seconds_needed(at(0)), seconds_needed(at(0, 12)), seconds_needed(at(0, 5, 7))] == [0, 24, 9]


def test_the_examples_are_read():
    folder = Path(flexkern.render.__file__).parents[1] / "docs/examples"
    assert [switch.at for switch in read_script(folder / "prompts_over_time.yaml")] == [0, 5, 10]
    assert [len(prompts) for prompts in read_prompts(folder / "interactive.jsonl").videos] == [2, 2]
    assert [len(prompts) for prompts in read_prompts(folder / "prompts.txt").videos] == [1, 1]
