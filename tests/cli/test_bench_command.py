"""``flexkern bench``: what it lists, what it refuses, and that the words behind the name are the bench's own."""

from pathlib import Path

import pytest

from flexkern.cli import bench, main

FOLDER = Path(__file__).parent.parent.parent / "bench"


def test_every_bench_is_listed_with_its_first_sentence(capsys):
    assert main(["bench"]) == 0
    said = capsys.readouterr().out
    for program in (*FOLDER.glob("bench_*.py"), FOLDER / "gpu_suite.py"):
        name = {"gpu_suite": "suite"}.get(program.stem, program.stem.removeprefix("bench_").replace("_", "-"))
        sentence = program.read_text().removeprefix('"""').partition("\n\n")[0]
        assert f"  {name} " in said and " ".join(sentence.split()) in said
    assert main(["bench", "--help"]) == 0 and capsys.readouterr().out == said


def test_the_words_behind_the_name_reach_the_bench(monkeypatch):
    called = []
    monkeypatch.setattr(bench.subprocess, "call", lambda command: called.append(command) or 7)
    assert main(["bench", "norm_rope_write", "--tiny", "--json", "--out", "there"]) == 7  # its status is ours
    assert Path(called[0][1]).samefile(FOLDER / "bench_norm_rope_write.py")
    assert called[0][2:] == ["--tiny", "--json", "--out", "there"]


@pytest.mark.parametrize(
    "words, missing, said",
    [
        (["moduate"], (), "there is no bench 'moduate'; did you mean 'modulate'?"),
        (["modulate"], ("pytest",), 'flexkern bench needs pytest: pip install "flexkern[bench]"'),
    ],
)
def test_refusals(capsys, monkeypatch, words, missing, said):
    found = bench.find_spec
    monkeypatch.setattr(bench, "find_spec", lambda module: None if module in missing else found(module))
    with pytest.raises(SystemExit) as left:
        main(["bench", *words])
    assert left.value.code == 2 and said in capsys.readouterr().err
