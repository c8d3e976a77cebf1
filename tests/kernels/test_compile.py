"""Every shipped configuration of every kernel compiles, for chips that are not here, to code that can be fast."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import compile_kernels
import pytest
from compile_kernels import SHIPPED, Case, committed, committed_lengths, objections, row_of, same_length

from flexkern.kernels.attention.hopper_variants import FITS_LAST

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
HOPPER = Case(kernel="frame_attention", arch=90)
GOOD = {
    "function": "_frame_attention", "triton": "3.7.1", "num_warps": 8, "registers": 224, "stack": 0,
    "spill_stores": 0, "spill_loads": 0, "shared": 163872, "warnings": [],
    "counts": {"length": 2000, "HGMMA": 40}, "loops": [{"length": 489, "HGMMA": 16, "MUFU.EX2": 66}],
}  # fmt: skip
SPECIALISED = GOOD | {"function": "_frame_attention_hopper", "loops": [GOOD["loops"][0] | {"covered": 66}]}
PLAIN = GOOD | {"function": "_modulate", "counts": {"length": 300}, "loops": []}
ROWS = PLAIN | {"function": "_norm_rope_write", "num_warps": 1, "registers": 130}
CROWDED_ROWS = ROWS | {"registers": 155}


@pytest.fixture(scope="module")
def report(request, tmp_path_factory):
    """Facts of the selected tests' cases. The interpreter cannot be turned off here, so another process compiles."""
    path = tmp_path_factory.mktemp("compile") / "facts.json"
    tests = [
        item for item in request.session.items if getattr(item, "originalname", "") == "test_compiles_to_fast_code"
    ]
    chosen = [item.callspec.params["case"] for item in tests]
    command = [sys.executable, compile_kernels.__file__, "--json", str(path), "--cases", *map(str, chosen)]
    done = subprocess.run(command, env=COMPILING, capture_output=True, text=True, timeout=900)
    assert path.exists(), f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text())


# variants of the Hopper loop whose branches all are in one that is not slow
MIXED = ("turns", "turns-three", "turns-pairs", "turns-fold")
CASES = [pytest.param(case, marks=pytest.mark.slow if case.variant in MIXED else ()) for case in SHIPPED]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_to_fast_code(case, report):
    table = committed()
    wrong = []
    for fact in report[str(case)]:
        lengths = committed_lengths(table, case, fact)
        wrong += [f"{fact['function']}: {line}" for line in objections(case, fact, lengths)]
    assert not wrong, f"{case}\n" + "\n".join(wrong)


def test_the_table_lists_what_is_shipped(report):
    compiled = {(name, fact["function"]) for name, found in report.items() for fact in found}
    hint = "run `python tests/support/compile_kernels.py --write`, and read the difference before committing it"
    assert {key for key in committed() if key[0] in report} == compiled, hint
    assert {name for name, _ in committed()} == {str(case) for case in SHIPPED}, hint


def test_the_tables_of_other_tritons_list_the_same():
    keys = ("kernel", "arch", "dtype", "head_dim", "variant", "function")
    folder, listed = compile_kernels.ROOT / "tests/data", {}
    for path in folder.glob("compile*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        [version] = {row["triton"] for row in rows}
        assert path.name == ("compile.csv" if version == compile_kernels.IN_CI else f"compile-{version}.csv")
        listed[version] = {tuple(row[key] for key in keys) for row in rows}
    assert set(listed) == {"3.6.0", "3.7.1", "3.8.0", "3.9.0"}
    everything = listed.pop("3.8.0")
    left = {row for row in everything if row[0] != "causal_conv_hopper" and row[4] not in FITS_LAST}
    assert listed.pop("3.9.0") == left != everything
    assert all(rows == everything for rows in listed.values())


def test_good_code_passes():
    assert not objections(HOPPER, GOOD, "489")
    assert not objections(HOPPER, SPECIALISED, "489")
    assert not objections(HOPPER, SPECIALISED | {"meetings": ["0x1", "0x2, 0x80", "0x7, 0x100"]}, "489")
    assert not objections(Case(kernel="modulate", arch=80), PLAIN, "")
    assert not objections(Case(kernel="norm_rope_write", arch=90), ROWS, "")
    assert not objections(Case(kernel="frame_attention", arch=90, dtype="float32"), GOOD | {"loops": [], "stack": 99})


@pytest.mark.parametrize(
    ("case", "fact", "says"),
    [
        (HOPPER, GOOD | {"warnings": ["(C7513) Potential Performance Loss: wgmma serialized"]}, "wgmma serialized"),
        (HOPPER, GOOD | {"shared": 240_000}, "227 KiB"),
        (Case(kernel="frame_attention", arch=120), GOOD | {"shared": 110_000}, "99 KiB"),
        (HOPPER, GOOD | {"loops": [{"length": 489, "HGMMA": 16, "LDL": 2, "STL": 1}]}, "3 accesses to local memory"),
        (HOPPER, GOOD | {"loops": [{"length": 489, "HGMMA": 16, "STS": 4}]}, "4 values pass through shared memory"),
        (HOPPER, GOOD | {"loops": [{"length": 489, "HMMA": 128}]}, "no HGMMA"),
        (HOPPER, GOOD | {"loops": []}, "no HGMMA"),
        (Case(kernel="frame_attention", arch=100), GOOD, "no UTCHMMA"),
        (HOPPER, GOOD | {"loops": [{"length": 500, "HGMMA": 16}]}, "loops of 500 instructions, 489"),
        (Case(kernel="modulate", arch=90), PLAIN | {"spill_stores": 8, "spill_loads": 8, "stack": 8}, "spills 8"),
        (HOPPER, SPECIALISED | {"loops": [{**SPECIALISED["loops"][0], "covered": 60}]}, "6 exponentials"),
        (HOPPER, SPECIALISED | {"meetings": ["0x1", "0x2, 0x80", "0x7, 0x100", "0x8, 0x80"]}, "named barrier 8"),
        (Case(kernel="norm_rope_write", arch=90), CROWDED_ROWS, "let 12 programs on an SM, 15 are wanted"),
        (HOPPER, {"function": "frame_attention", "error": "CompilationError: at 3:1"}, "does not compile"),
    ],
)
def test_bad_code_is_objected_to(case, fact, says):
    wrong = objections(case, fact, "489" if fact.get("loops") else None)
    assert any(says in line for line in wrong), wrong


def test_lengths_may_differ_by_two_percent():
    assert same_length("489", "498") and same_length("480 480", "481 479")
    assert not same_length("489", "500") and not same_length("480 480", "480") and not same_length("", "480")


def test_a_row_says_the_longest_loop():
    row = row_of(HOPPER, GOOD | {"loops": [*GOOD["loops"], {"length": 90, "HGMMA": 4}]})
    assert row["loops"] == "489 90" and row["matrix"] == "16 HGMMA" and row["exponentials"] == 66


CROWDED = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
from compile_kernels import Case, objections
from offline import compile_launch
import torch, triton, triton.language as tl

@triton.jit
def _frame_attention(query_ptr, key_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    query, acc = tl.load(query_ptr + offs), tl.zeros([M, N], tl.float32)
    for _ in range(steps):
        key = tl.load(key_ptr + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
        acc = tl.dot(tl.exp2(tl.dot(query, key.T)).to(tl.bfloat16), key, acc * 0.5)
        key_ptr += N * N
    tl.store(out_ptr + offs, acc)

half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
for arch, warps in ((80, 8), (80, 4), (90, 4)):
    launch = lambda: _frame_attention[(1,)](half, half, single, 9, M=128, N=128, num_warps=warps, num_stages=2)
    (fact,) = compile_launch(launch, arch)
    print(objections(Case(kernel="frame_attention", arch=arch), dataclasses.asdict(fact)))
"""


def test_a_kernel_that_spills_is_caught(tmp_path):
    """For real: eight warps hold 128 rows in registers; four do not, and on sm_90 ptxas serialises its wgmma."""
    script = tmp_path / "crowded.py"
    script.write_text(CROWDED.format(tests=str(Path(__file__).parent.parent / "support")))
    done = subprocess.run([sys.executable, str(script)], env=COMPILING, capture_output=True, text=True, timeout=300)
    eight, four, hopper = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert eight == "[]" and "local memory" in four and "local memory" in hopper and "serialized" in hopper
