"""The benches without a GPU: the suite's queue, what counts as wrong, CSVs, tables, the mathematics of the peers."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench_frame_attention as bench
import correctness
import designs
import gpu_suite
import harness
import machine
import peers
import pointwise
import pytest
import roofs
import tables
import torch
from bare import run_python
from gpu_suite import Item
from harness import Case, Provider, Row, Truth

import flexkern.kernels.reference as oracle

ROOT = Path(__file__).parent.parent.parent

SMALL = replace(designs.TINY, frames=2, read=3, tokens=10, heads=1)
ROOF = roofs.Roofs(matmul_tflop_s=790.0, copy_gb_s=4300.0)
LIBRARY = "sdpa math" if roofs.DEVICE == "cpu" else "sdpa flash"  # torch's own, of which there is one everywhere
ABOUT = dict(gpu="GPU X", driver="1", torch="2", triton="3", commit="abc", day="2026-01-01")


def item(name: str, code: str, **fields) -> Item:
    return Item(name=name, doc="", command=[sys.executable, "-c", code], **({"estimate": 1, "limit": 60} | fields))


def outcomes(out: Path) -> dict[str, str]:
    with (out / "suite.csv").open(newline="") as file:
        return {row["item"]: row["outcome"] for row in csv.DictReader(file)}


def test_the_queue_survives_whatever_an_item_does(tmp_path, capsys):
    leave = f"open({str(tmp_path / 'left')!r}, 'a').write('x')"
    hang = f"{leave}; import os, time; os.fork(); time.sleep(60)"
    items = [
        item("crash", "raise SystemExit(3)"),
        item("abort", "import os; os.abort()"),
        item("garbage", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9)"),
        item("hang", hang, limit=3),  # by when it has written, on a busy machine too
        Item(name="no program", doc="", command=["/nowhere/at/all"], estimate=1, limit=60),
        item("not here", "raise SystemExit(1)", absent=lambda: "it is not installed"),
        item("good", f"{leave}; print('all is well')"),
    ]
    start = time.monotonic()
    gpu_suite.run_queue(items, tmp_path, minutes=5)
    assert time.monotonic() - start < 30
    said = outcomes(tmp_path)
    assert said.pop("no program").startswith("failed (")
    assert said == {
        "crash": "failed (code 3)", "abort": "failed (code -6)", "garbage": "ok", "hang": "cut off",
        "not here": "skipped (it is not installed)", "good": "ok",
    }  # fmt: skip
    assert (tmp_path / "left").read_text() == "xx"  # what an item wrote before it was cut off stays
    assert b"all is well" in (tmp_path / "suite.log").read_bytes() and "all is well" in capsys.readouterr().out


def test_the_queue_stops_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "GRACE", 0.5)
    items = [item("long", "import time; time.sleep(60)"), item("late", "print('never')")]
    gpu_suite.run_queue(items, tmp_path, minutes=0.2 / 60)
    assert outcomes(tmp_path) == {"long": "not reached", "late": "not reached"}  # too little to be worth a start
    gpu_suite.run_queue(items, tmp_path, minutes=1 / 60)
    assert outcomes(tmp_path) == {"long": "cut off", "late": "not reached"}
    gpu_suite.run_queue(items[1:], tmp_path, minutes=1)  # --from late
    assert outcomes(tmp_path) == {"long": "cut off", "late": "ok"}


def test_a_killed_suite_leaves_what_was_finished(tmp_path):
    done = f"open({str(tmp_path / 'rows')!r}, 'w').write('finished')"
    code = (
        f"import sys; from pathlib import Path; from gpu_suite import Item, run_queue\n"
        f"item = lambda n, c: Item(name=n, doc='', command=[sys.executable, '-c', c], estimate=1, limit=60)\n"
        f"run_queue([item('first', {done!r}), item('second', 'import time; time.sleep(20)')],"
        f" Path({str(tmp_path)!r}), 5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=machine.child_environment())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (tmp_path / "suite.csv").exists() and "second" in outcomes(tmp_path):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert outcomes(tmp_path) == {"first": "ok", "second": "running"}
    assert (tmp_path / "rows").read_text() == "finished"


def test_a_loop_that_may_hang_is_not_among_the_tests_of_the_queue(monkeypatch):
    file = "tests/kernels/test_frame_attention_hopper.py"
    assert f"def {correctness.TRIED_ALONE}(" in (machine.ROOT / file).read_text()
    given = []
    monkeypatch.setattr(pytest, "main", given.extend)
    correctness.run_pytest("kernels")
    assert given[given.index("-k") + 1] == f"not {correctness.TRIED_ALONE}" and str(machine.ROOT / file) in given


def test_items_are_chosen_by_name():
    queue = gpu_suite.make_queue(Path("out"))
    names = [item.name for item in queue]
    assert len(names) == len(set(names)) and names[:3] == ["correctness frame_attention", "variants", "default path"]
    assert names.index("graphs") < names.index("roofs"), "what must be right comes before what is timed"
    assert [i.name for i in gpu_suite.choose(queue, ["tiles", "roofs"], None)] == ["roofs", "tiles"]
    assert [i.name for i in gpu_suite.choose(queue, [], "ncu")][0] == "ncu"
    with pytest.raises(ValueError, match="no item 'peer' in the queue: correctness frame_attention, "):
        gpu_suite.choose(queue, ["peer"], None)
    for entry in queue:
        scripts = [part for part in entry.command if part.endswith(".py")]
        assert scripts and all(Path(script).is_file() for script in scripts) and entry.estimate <= entry.limit


@pytest.fixture
def archive(tmp_path):
    """The sources alone, as `git archive` leaves them: no git, not installed."""
    root = tmp_path / "archive"
    skip = shutil.ignore_patterns("results", "__pycache__", "*.safetensors")
    for folder in ("bench", "flexkern", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip, symlinks=True)
    return root


def test_the_suite_lists_its_queue_from_an_archive(archive):
    done = run_python(archive / "bench/gpu_suite.py", "--dry-run", cwd=archive)
    assert done.returncode == 0, done.stderr
    for name in (
        "correctness frame_attention",
        "roofs",
        "tiles",
        "peers",
        "norm_rope_write",
        "engine",
        "ncu",
        "in all",
    ):
        assert f"\n{name} " in done.stdout
    assert not (archive / "bench/results").exists()
    assert run_python(archive / "bench/gpu_suite.py", "--dry-run", "--only", "rofs", cwd=archive).returncode == 2


def test_a_bench_runs_from_an_archive_on_its_own_kernels(archive, tmp_path):
    (archive / "COMMIT").write_text("0123456789\n")
    out = tmp_path / "out"
    done = run_python(archive / "bench/bench_rms_norm.py", "--tiny", "--out", out, cwd=archive)
    assert done.returncode == 0, done.stderr
    row = next(row for row in harness.load(out / "rms_norm.csv") if row.provider == "triton")
    assert row.ms > 0 and row.note == "" and row.commit == "0123456789"

    # children of the suite, in whatever folder they run, import the archive too
    code = "import json, machine; print(json.dumps(machine.child_environment()))"
    env = json.loads(run_python("-c", code, cwd=archive / "bench").stdout)
    names = "flexkern.policies", "flexkern.kernels.pointwise.rms_norm", "harness"
    code = f"import machine; from importlib.util import find_spec; print(*[find_spec(name).origin for name in {names}])"
    done = run_python("-c", code, cwd=archive, **env)
    assert done.returncode == 0, done.stderr
    assert all(Path(name).is_relative_to(archive) for name in done.stdout.split()), done.stdout
    assert env["FLEXKERN_COMMIT"] == "0123456789"


def test_rows_survive_a_csv(tmp_path):
    path = tmp_path / "gpu" / "x.csv"
    timed = Row(kernel="k", provider="a", shape="s, 1", ms=1.25, ms_20=1, ms_80=1.5, error=2e-3, **ABOUT)
    wrong = Row(kernel="k", provider="b", shape="s, 1", note='wrong: "far", off', **ABOUT)
    harness.save([timed, wrong], path)
    harness.save([replace(timed, ms=0.125)], path)  # takes the old one's place
    a, b = harness.load(path)
    assert replace(a, gb_s=0, tflop_s=0, roof_percent=0) == replace(timed, ms=0.125, gb_s=0, tflop_s=0, roof_percent=0)
    assert b.note == wrong.note and math.isnan(b.ms) and math.isnan(b.error)
    before = path.read_text()
    harness.save(harness.load(path), path)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["x.csv"]
    assert harness.load(tmp_path / "none.csv") == []


def test_flops_bytes_and_percent_by_hand():
    shape = designs.shape("1.3B", "480p", frames=3, read=21)
    assert shape.flops == 4 * 4680 * 32760 * 1536 == 941_978_419_200
    assert shape.bytes == 201_277_440 + 28_753_920  # keys and values; query and output
    assert str(shape) == "1.3B 480p B=1 F=3 R=21 S=1560 H=12 D=128 bfloat16"
    assert (shape.bands, designs.TINY.bands) == (22, 12)
    assert len(set(designs.EVERY)) == 48 and set(designs.SHORT) <= set(designs.EVERY)
    assert len(set(pointwise.EVERY)) == len(pointwise.EVERY) == 13
    none = Truth(exact=torch.ones(1), entitled=torch.ones(1))
    case = Case(kernel="k", shape="s", bytes=43 * 10**8, flops=79 * 10**10, bound="matmul", providers={}, truth=none)
    found = harness.rates(case, [1.0, 2.0, 4.0, 3.0, 5.0], ROOF)  # 790 GFLOP in 3 ms
    assert (found["ms"], found["ms_20"], found["ms_80"]) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert found["tflop_s"] == pytest.approx(790 / 3) and found["roof_percent"] == pytest.approx(100 / 3)
    assert harness.rates(replace(case, bound="copy"), [1.0], ROOF)["roof_percent"] == pytest.approx(100)


@pytest.mark.skipif(roofs.DEVICE == "cuda", reason="counts the calls of a CPU, whose budget is none")
def test_providers_are_timed_in_turns():
    calls = []
    taken = roofs.measure([lambda: calls.append("a"), lambda: calls.append("b")])
    order = "".join(calls).replace("aaaa", "", 1).replace("bbbb", "", 1)  # the first runs tell how long one takes
    assert order == "aabbbbaa" and [len(times) for times in taken] == [2, 2]


@pytest.fixture(scope="module")
def problem():
    return designs.Problem(SMALL, roofs.DEVICE)


@pytest.fixture(scope="module")
def truth(problem):
    return problem.truth(problem.turn)


@pytest.mark.skipif(roofs.DEVICE == "cuda", reason="on a GPU the queue judges them, at real shapes")
def test_designs_and_peers_agree_with_the_oracle():
    case = bench.build_designs(SMALL, "sdpa math")
    faults = {name: harness.judge(case, provider)[1] for name, provider in case.providers.items()}
    assert len(faults) == 6 and set(faults.values()) == {""}, faults
    case = bench.build(SMALL, tuple(peers.PEERS))
    faults = {name: harness.judge(case, provider)[1] for name, provider in case.providers.items()}
    assert faults.pop("sdpa math") == ""
    assert set(faults.values()) == {"absent: needs a CUDA GPU"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
def test_every_variant_says_why_it_cannot_run_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--what", "variants", "--tiny", "--out", str(tmp_path)])
    bench.main()
    notes = {row.provider: row.note for row in harness.load(tmp_path / "variants.csv")}
    assert set(notes) == {*(f"hopper {name}" for name in bench.VARIANTS), *bench.RIVALS}
    assert all(notes[f"hopper {name}"] == "absent: needs a GPU of compute capability 9.0" for name in bench.VARIANTS)


def test_a_variant_that_hangs_or_breaks_is_not_timed(tmp_path, monkeypatch):
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys, time\nname = sys.argv[-1]\n"
        "time.sleep(60 if name == 'turns' else 0)\nassert name != 'named', 'a compiler error'\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    monkeypatch.setattr(bench, "without_hopper", lambda: "")
    monkeypatch.setattr(bench, "TRIAL", 3.0)
    faults = bench.try_variants(["plain", "named", "turns"])
    assert faults["plain"] == "" and faults["turns"] == "did not come back in 3 s"
    assert faults["named"].startswith("exit code 1: ") and "a compiler error" in faults["named"]


def test_a_variant_whose_repeats_differ_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "hopper", lambda problem, name: bench.ours(problem))
    monkeypatch.setattr(bench, "count_differing", lambda case, name, repeats: int(name.endswith("turns")))
    case = bench.build_variants(SMALL, {"plain": "", "turns": "", "named": "did not come back in 3 s"})
    assert isinstance(case.providers["hopper plain"], Provider)
    assert case.providers["hopper turns"] == "1 of 50 repeats differ"
    assert case.providers["hopper named"] == "did not come back in 3 s"


def test_a_wrong_provider_is_caught_and_not_timed(problem, truth, capsys):
    attend = peers.get_peer(LIBRARY, roofs.DEVICE)
    query, key, value = problem.ready
    off = designs.Problem(SMALL, roofs.DEVICE)
    off.key_angle = off.key_angle + 0.03 * torch.randn_like(off.key_angle)
    calls = []

    def poisoned():
        calls.append("poisoned")
        return attend(query, key, value).index_fill(1, torch.tensor([7], device=roofs.DEVICE), math.nan)

    library = dict(result=problem.sample, **bench.LIBRARY)
    case = bench.case_of("frame_attention", problem, {
        "right": Provider(call=lambda: attend(query, key, value), **library),
        "keys not turned": Provider(call=lambda: attend(query, problem.keys.flatten(1, 2), value), **library),
        "0.03 rad off": Provider(call=lambda: attend(*off.ready), **library),
        "poisoned": Provider(call=poisoned, **library),
        "too short": Provider(call=lambda: attend(query[:, 1:], key, value), **library),
        "raises": Provider(call=lambda: 1 / 0, **library),
        "not there": "it is not installed",
    })  # fmt: skip
    rows = {row.provider: row for row in harness.compare(case, ROOF)}
    right = rows.pop("right")
    assert right.ms > 0 and right.note == "" and right.error < 1e-3
    assert all(math.isnan(row.ms) for row in rows.values()) and calls == ["poisoned"]
    notes = {name: row.note.split(":")[0] for name, row in rows.items()}
    assert notes == {
        "keys not turned": "wrong", "0.03 rad off": "wrong", "poisoned": "failed", "too short": "failed",
        "raises": "failed", "not there": "absent",
    }  # fmt: skip
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_race_is_counted(problem, truth):
    attend, calls = peers.get_peer(LIBRARY, roofs.DEVICE), []

    def racy():
        calls.append(None)
        out = attend(*problem.ready)
        out[0, 0, 0, 0] *= 1 + 1e-3 * (len(calls) % 3 == 0)
        return out

    racy = Provider(call=racy, result=problem.sample, everything=lambda out: out, **bench.LIBRARY)
    case = bench.case_of("frame_attention", problem, {"racy": racy})
    # one call is judged, one is compared with
    row = correctness.judge("frame_attention", case, "racy", repeats=10)
    assert (row.repeats, row.differing, row.verdict) == (10, 4, "wrong: 4 of 10 repeats differ")


def test_pages_are_turned_and_others_left_alone():
    pages = torch.randn(2, 4, 5, 3, 64, device=roofs.DEVICE)
    angle = torch.randn(2, 12, dtype=torch.float64, device=roofs.DEVICE)
    out, slots = torch.full_like(pages, math.nan), torch.tensor([3, 1], dtype=torch.int32, device=roofs.DEVICE)
    designs.turn_pages(pages, slots, designs.turns(angle), out)
    assert out[:, [0, 2]].isnan().all()
    turn = oracle.pad_turn(designs.turns(angle), 32)[:, None, None]
    torch.testing.assert_close(out[:, [3, 1]], oracle.rotate(pages[:, [3, 1]], turn))


def test_tables_say_what_was_not_measured(tmp_path):
    text = "# Title\n<!-- table: attention -->\nold\n<!-- end table -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled == "# Title\n<!-- table: attention -->\nnot yet measured\n<!-- end table -->\nafter\n"
    assert all(tables.NOT_YET in tables.table(name, tmp_path) for name in tables.TABLES)
    with pytest.raises(ValueError, match="no table 'speed': there is correctness, roofs, attention, tiles, designs"):
        tables.fill(text.replace("attention", "speed"), tmp_path)


COPIED = ((12, "triton", 2.0), (12, "copy", 1.9), (21, "triton", 4.0), (21, "copy", 3.4))  # R, provider, ms


def test_tables_are_made_from_the_csvs(tmp_path):
    folder = tmp_path / "GPU-X"
    (tmp_path / "demo").mkdir()  # other results are no GPU's

    def row(kernel, provider, ms, frames=3, read=21, **fields):
        shape = str(designs.shape("1.3B", "480p", frames, read))
        return Row(kernel=kernel, provider=provider, shape=shape, ms=ms, **fields, **ABOUT)

    times = {"fused": 1.0, "fused, no turn": 0.995, "keys turned beforehand": 1.05, "turned once a chunk": 1.02}
    for frames, read in ((3, 21), (3, 12)):
        harness.save([row("designs", *time, frames, read) for time in times.items()], folder / "designs.csv")
    attention = [row("frame_attention", "triton", 1.234, roof_percent=71.6), row("frame_attention", "flex", math.nan)]
    attention[1] = replace(attention[1], note="wrong: far off")
    harness.save(attention, folder / "frame_attention.csv")
    copied = [row("modulate", name, ms, read=read) for read, name, ms in COPIED]
    harness.save(copied, folder / "modulate.csv")
    marked = "<!-- table: {0} -->\n<!-- end table -->\n"
    text = "".join(marked.format(name) for name in tables.TABLES)
    filled = tables.fill(text, tmp_path)
    assert tables.fill(filled, tmp_path) == filled
    assert "GPU X, driver 1, torch 2, Triton 3, commit abc, 2026-01-01:" in filled
    assert "| 1.23 (72 %) | wrong |" in filled
    assert "| time with a turn per frame over time without turns | <= 1.01 | 1.005 | yes |" in filled
    assert "keys turned beforehand, 4680 queries | >= 1.0 | 1.050 | yes |" in filled
    assert "best library, 4680 queries | >= 1.03 | 1.020 | no |" in filled
    assert "research code's path, 4680 queries | >= 2.0 | not yet measured |" in filled
    assert "modulate, speed over a device copy of the same bytes | >= 0.9 | 0.850 to 0.950 | no |" in filled
    assert filled.count("not yet measured\n<!-- end") == 5  # correctness, roofs, tiles, engine, vae


def test_the_readmes_hold_the_tables_of_the_committed_csvs():
    for name in tables.FILES:
        text = (ROOT / name).read_text()
        assert tables.fill(text) == text, f"{name}: run python bench/tables.py"


@pytest.mark.gpu
def test_the_clock_of_the_gpu():
    a = torch.randn(2048, 2048, device="cuda")
    [[*once], [*thrice]] = roofs.measure([lambda: a @ a, lambda: a @ a @ a @ a], budget_ms=20)
    # 3 where nobody else uses the GPU, which other processes of these tests may
    assert 1.5 < sorted(thrice)[len(thrice) // 2] / sorted(once)[len(once) // 2] < 6


def test_only_a_gpu_writes_to_the_results(tmp_path, capsys):
    parser = harness.arguments("")
    assert harness.folder(parser.parse_args([])) is None
    assert harness.folder(parser.parse_args(["--out", str(tmp_path)])) == tmp_path
    if roofs.DEVICE == "cpu":
        with pytest.raises(SystemExit, match="2"):
            harness.folder(parser.parse_args(["--save"]))
        assert "no CUDA GPU: only figures of a GPU belong in bench/results" in capsys.readouterr().err
