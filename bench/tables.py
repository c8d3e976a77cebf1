"""Write the tables of the READMEs from the CSVs in bench/results, between markers; no figure is typed by hand.

python bench/tables.py             # rewrites what stands between <!-- table: NAME --> and <!-- end table -->
python bench/tables.py --check     # exits with 1 where that would change a file

Names: roofs, attention, designs, targets, pointwise, end_to_end; compiled and variants, from tests/data/compile*.csv.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import machine
from harness import Row, load

from flexkern.kernels.attention.hopper_variants import SELECTED, VARIANTS

FILES = ("README.md", "kernels/README.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.S)
NOT_YET = "not yet measured"
POINTWISE = ("norm_rope_write", "modulate", "gate_residual", "rms_norm")


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(row: Row | None) -> str:
    """Milliseconds and percent of the roof, or what hindered the measurement."""
    if row is None:
        return ""
    if math.isnan(row.ms):
        return row.note.partition(":")[0]
    return f"{row.ms:.3g} ({row.roof_percent:.0f} %)" if not math.isnan(row.roof_percent) else f"{row.ms:.3g}"


def by_provider(rows: list[Row], head: str) -> str:
    """A line for each shape, a column for each provider that ran anywhere."""
    ran = [row for row in rows if not row.note.startswith("absent")]
    providers = list(dict.fromkeys(row.provider for row in ran))
    found = {(row.shape, row.provider): row for row in ran}
    shapes = dict.fromkeys(row.shape for row in ran)
    return grid([head, *providers], [[shape, *(cell(found.get((shape, p))) for p in providers)] for shape in shapes])


def roofs(rows: dict[str, list[Row]]) -> str:
    lines = [
        [f"{row.provider}, {row.shape}", f"{row.gb_s:.0f} GB/s" if row.gb_s > 0 else f"{row.tflop_s:.0f} TFLOP/s"]
        for row in rows["roofs"]
    ]
    return grid(["roof", "measured"], lines) if lines else ""


def attention(rows: dict[str, list[Row]]) -> str:
    return by_provider(rows["frame_attention"], "ms (of the bf16 product)") if rows["frame_attention"] else ""


def designs(rows: dict[str, list[Row]]) -> str:
    return by_provider(rows["designs"], "ms a pass (of the bf16 product)") if rows["designs"] else ""


def pointwise(rows: dict[str, list[Row]]) -> str:
    found = [by_provider(rows[name], f"{name}, ms (of the copy rate)") for name in POINTWISE if rows[name]]
    return "\n\n".join(found)


def end_to_end(rows: dict[str, list[Row]]) -> str:
    return by_provider(rows["end_to_end"], "ms a chunk") if rows["end_to_end"] else ""


def ratio(rows: list[Row], over: str, under: str, frames: int, read: int) -> float:
    """ms of one provider over that of another, for the 1.3B model at 480p."""
    ms = {row.provider: row.ms for row in rows if row.shape.startswith(f"1.3B 480p B=1 F={frames} R={read} ")}
    return ms.get(over, math.nan) / ms.get(under, math.nan)


def targets(rows: dict[str, list[Row]]) -> str:
    """What the kernels aim for, and what was measured: the worse of windows 12 and 21."""
    lines = []

    def add(what: str, needed: str, values: list[float], worst: Callable, is_met: Callable) -> None:
        known = [value for value in values if not math.isnan(value)]
        if len(known) < len(values) or not known:
            lines.append([what, needed, NOT_YET, ""])
        else:
            value = worst(known)
            lines.append([what, needed, f"{value:.3g}", "yes" if is_met(value) else "no"])

    def against(what: str, other: str, frames: int, needed: float) -> None:
        values = [ratio(rows["designs"], other, "fused", frames, read) for read in (12, 21)]
        add(f"{what}, {1560 * frames} queries", f">= {needed}", values, min, lambda value: value >= needed)

    turned = [ratio(rows["designs"], "fused", "fused, no turn", 3, read) for read in (12, 21)]
    add("time with a turn per frame over time without turns", "<= 1.01", turned, max, lambda value: value <= 1.01)
    against("speed over the best library, keys turned beforehand", "keys turned beforehand", 3, 1.0)
    against("speed over keys turned once a chunk and the best library", "turned once a chunk", 3, 1.03)
    against("speed over keys turned once a chunk and the best library", "turned once a chunk", 1, 1.3)
    against("speed over the research code's path", "research", 3, 2.0)
    for name in POINTWISE:
        percent = [row.roof_percent for row in rows[name] if row.provider == "triton"]
        add(f"{name}, percent of the copy rate", ">= 90", percent, min, lambda value: value >= 90)
    return grid(["target", "needed", "measured, worst case", "met"], lines)


def compiled(path: Path = machine.ROOT / "tests" / "data" / "compile.csv") -> str:
    """What ptxas makes of the kernels that multiply; needs no GPU."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["matrix"] and row["variant"] not in VARIANTS]
    columns = ("registers", "spill_stores", "shared", "matrix", "exponentials", "loops")
    name = lambda row: f"{row['kernel']} sm_{row['arch']} {row['dtype']} D={row['head_dim']} {row['variant']}".strip()
    head = ["configuration", "registers", "spill at edges, B", "shared, B", "matrix", "exp2", "loop, instructions"]
    return f"Triton {rows[0]['triton']}:\n\n" + grid(head, [[name(row), *(row[c] for c in columns)] for row in rows])


def variants(folder: Path = machine.ROOT / "tests" / "data") -> str:
    """What ptxas makes of every loop of the Hopper kernel, by Triton; needs no GPU."""
    found = {}
    for path in folder.glob("compile*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                name = row["variant"] or SELECTED
                if (row["kernel"], row["dtype"], row["head_dim"]) == (
                    "frame_attention_hopper",
                    "bfloat16",
                    "128",
                ) and row["matrix"]:
                    found[name, row["triton"]] = f"{row['loops']}, {row['barriers']}, {row['spill_stores']}"
    versions = sorted({version for _, version in found})
    lines = [[name, *(found.get((name, version), "") for version in versions)] for name in VARIANTS]
    head = ["instructions of both loops, barriers a step, spill at edges in B", *(f"Triton {v}" for v in versions)]
    return grid(head, lines)


COMPILED = {"compiled": compiled, "variants": variants}
TABLES = {fn.__name__: fn for fn in (roofs, attention, designs, targets, pointwise, end_to_end)}
CSVS = ("roofs", "frame_attention", "designs", "end_to_end", *POINTWISE)


def caption(rows: list[Row]) -> str:
    """Where the rows come from; mixed origins are all named."""
    say = lambda name: ", ".join(dict.fromkeys(getattr(row, name) for row in rows))
    return (
        f"{say('gpu')}, driver {say('driver')}, torch {say('torch')}, Triton {say('triton')}, "
        f"commit {say('commit')}, {say('day')}"
    )


def table(name: str, results: Path) -> str:
    """The table of that name, one for each GPU there are figures of."""
    if name in COMPILED:
        return COMPILED[name]()
    if name not in TABLES:
        raise ValueError(f"no table {name!r}: there is {', '.join([*TABLES, *COMPILED])}")
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        rows = {name: load(folder / f"{name}.csv") for name in CSVS}
        everything = [row for group in rows.values() for row in group]
        text = TABLES[name](rows) if everything else ""
        if text:
            found.append(f"{caption(everything)}:\n\n{text}")
    return "\n\n".join(found) or (targets({name: [] for name in CSVS}) if name == "targets" else NOT_YET)


def fill(text: str, results: Path = machine.RESULTS) -> str:
    """The text with every marked table made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{table(m[2], results)}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    args = parser.parse_args()
    stale = []
    for name in FILES:
        path = machine.ROOT / name
        old = path.read_text()
        new = fill(old)
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new)
    print("\n".join(f"{'stale' if args.check else 'rewritten'}: {name}" for name in stale) or "up to date")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
