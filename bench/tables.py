"""Write the tables of the READMEs from the CSVs in bench/results, between markers; no figure is typed by hand.

python bench/tables.py             # rewrites what stands between <!-- table: NAME --> and <!-- end table -->
python bench/tables.py --check     # exits with 1 where that would change a file
python bench/tables.py --results DIR    # prints the tables of other CSVs, in DIR or in a folder of it; writes nothing

Names: correctness, roofs, attention, tiles, designs, targets, pointwise, engine, vae; compiled and variants, from
tests/data/compile*.csv; evidence_short, evidence_presets, evidence_far, evidence_parts,
evidence_choices and evidence_long_choices, from bench/results/evidence; four_minutes and an_hour, from
bench/results/rooms.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import machine
from breakdown import ChunkRow
from correctness import Verdict
from harness import Row, load
from vae_split import VaeRow

from flexkern.kernels.attention.hopper_variants import SELECTED, VARIANTS

FILES = ("README.md", "kernels/README.md", "flexkern/docs/evidence.md", "flexkern/docs/gallery.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.S)
NOT_YET = "not yet measured"
ORIGIN = ("gpu", "driver", "torch", "triton", "commit", "day")
POINTWISE = ("norm_rope_write", "modulate", "gate_residual", "add_modulate", "rms_norm")


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(row: Row | None) -> str:
    """Milliseconds and percent of the roof, or why there are none."""
    if row is None:
        return ""
    if math.isnan(row.ms):
        return row.note.partition(":")[0]
    return f"{row.ms:.3g} ({row.roof_percent:.0f} %)" if not math.isnan(row.roof_percent) else f"{row.ms:.3g}"


def by_provider(rows: list[Row], head: str) -> str:
    """A line for each shape, a column for each provider that ran at any shape."""
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


def correctness(rows: dict[str, list[Verdict]]) -> str:
    """A line for each kernel: shapes, the largest relative mean error, repeats and how many differed."""
    lines = []
    for kernel in dict.fromkeys(row.kernel for row in rows["correctness"]):
        found = [row for row in rows["correctness"] if row.kernel == kernel]
        wrong = [row.shape for row in found if row.verdict != "right"]
        repeats, differing = sum(row.repeats for row in found), sum(row.differing for row in found)
        verdict = f"wrong at {', '.join(wrong)}" if wrong else "right"
        error = max(row.error for row in found)
        lines.append([kernel, str(len(found)), verdict, f"{error:.1e}", f"{repeats}, {differing} differ"])
    head = ["kernel", "shapes", "against float64", "largest mean error", "repeats, bit for bit"]
    return grid(head, lines) if lines else ""


def attention(rows: dict[str, list[Row]]) -> str:
    return by_provider(rows["frame_attention"], "ms (of the bf16 product)") if rows["frame_attention"] else ""


def tiles(rows: dict[str, list[Row]]) -> str:
    """A line for each tile, the fastest at the first shape on top."""
    if not rows["tiles"]:
        return ""
    shapes = list(dict.fromkeys(row.shape for row in rows["tiles"]))
    found = {(row.provider, row.shape): row for row in rows["tiles"]}
    ms = lambda row: math.inf if math.isnan(row.ms) else row.ms
    names = [row.provider for row in sorted(rows["tiles"], key=ms) if row.shape == shapes[0]]
    lines = [[name, *(cell(found.get((name, shape))) for shape in shapes)] for name in names]
    return grid(["tile, ms (of the bf16 product)", *shapes], lines)


def designs(rows: dict[str, list[Row]]) -> str:
    return by_provider(rows["designs"], "ms a pass (of the bf16 product)") if rows["designs"] else ""


def pointwise(rows: dict[str, list[Row]]) -> str:
    found = [by_provider(rows[name], f"{name}, ms (of the copy rate)") for name in POINTWISE if rows[name]]
    return "\n\n".join(found)


def whole_chunks(rows: dict[str, list[Row]]) -> str:
    """A line for each row: what a chunk takes, pictures per second, and the most memory."""
    figure = lambda value, form: "" if math.isnan(value) else format(value, form)
    lines = [
        [row.shape, row.provider, cell(row), figure(row.pictures_s, ".3g"), figure(row.peak_gb, ".1f")]
        for row in chain(*rows.values())
        if not row.note.startswith("absent")
    ]
    return grid(["chunk", "backend", "ms", "pictures a second", "peak, GB"], lines) if lines else ""


def vae(rows: dict[str, list[VaeRow]]) -> str:
    """A line for each decoder: its speed and memory, then where the time of a chunk goes."""
    found = [row for row in rows["vae"] if not row.note.startswith("absent")]
    parts = ("convolution", "product", "attention", "ours", "copy", "other")
    lines = [
        [row.shape, row.provider, *(f"{getattr(row, f'{part}_ms'):.1f}" for part in parts), row.longest]
        for row in found if not math.isnan(row.convolution_ms)
    ]  # fmt: skip
    split = f"\n\n{grid(['chunk', 'decoder', *(f'{part}, ms' for part in parts), 'longest'], lines)}" if lines else ""
    return whole_chunks({"vae": found}) + split


def engine(rows: dict[str, list[ChunkRow]]) -> str:
    """A line for each path: its speed, where the time of a chunk goes, memory; then what the engine aims for."""
    found = [row for row in rows["engine"] if not row.note.startswith("absent")]
    if not found:
        return ""
    figure = lambda value, form: "" if math.isnan(value) else format(value, form)
    lines = [
        [
            row.shape, row.provider, cell_of_chunk(row), figure(row.ms_95, ".3g"), figure(row.denoise_fps, ".3g"),
            figure(row.pictures_s, ".3g"), figure(row.first_picture_ms, ".3g"), figure(row.peak_gb, ".1f"),
            figure(row.device_gb, ".1f"), figure(row.roof_percent, ".0f"),
        ]
        for row in found
    ]  # fmt: skip
    head = ["chunk", "path", "ms", "p95", "denoising, pictures a second", "with the VAE", "first pictures, ms"]
    speed = grid([*head, "peak, GB", "of the GPU, GB", "denoising, % of the roof"], lines)
    shares = [
        [
            row.shape, row.provider,
            *(figure(getattr(row, f"{part}_ms"), ".1f") for part in ("attention", "linear", "other", "vae", "idle")),
            interval(row, "slope_ms"), interval(row, "slope_mb"), str(row.chunks),
        ]
        for row in found if not math.isnan(row.ms)
    ]  # fmt: skip
    head = ["chunk", "path", "attention, ms", "linear", "other", "VAE", "idle", "ms over 100 chunks", "MB", "chunks"]
    return "\n\n".join((speed, grid(head, shares), engine_targets(found)))


def cell_of_chunk(row: ChunkRow) -> str:
    """Milliseconds, or why there are none; its percentage of the roof is of denoising alone."""
    return row.note.partition(":")[0] if math.isnan(row.ms) else f"{row.ms:.3g}"


def interval(row: ChunkRow, column: str) -> str:
    low, value, high = (getattr(row, name) for name in (f"{column}_low", column, f"{column}_high"))
    return "" if math.isnan(value) else f"{value:+.2g} ({low:+.2g} to {high:+.2g})"


def engine_targets(found: list[ChunkRow]) -> str:
    """What the engine aims for with the 1.3B model at 480x832, and what was measured of the path triton."""
    lines = []
    nothing = ChunkRow(**dict.fromkeys(("kernel", "provider", "shape", *ORIGIN), ""))

    def add(what: str, needed: str, value: float, shown: str, is_met: bool) -> None:
        known = not math.isnan(value)
        lines.append([what, needed, shown if known else NOT_YET, ("yes" if is_met else "no") if known else ""])

    for window, least in ((12, 58), (21, 40)):
        here = [row for row in found if row.shape.startswith("1.3B 480x832 ") and f" window {window} " in row.shape]
        by_path = {row.provider: row for row in here}
        ours, theirs = by_path.get("triton", nothing), by_path.get("research", nothing)
        fps, over = ours.denoise_fps, ours.over_roof_percent
        idle, faster = 100 * ours.idle_ms / ours.ms, fps / theirs.denoise_fps
        about = f"window {window}"
        add(f"{about}, denoising, pictures a second", f">= {least}", fps, f"{fps:.1f}", fps >= least)
        add(f"{about}, denoising, % over the roof", "<= 15", over, f"{over:.0f}", over <= 15)
        add(f"{about}, GPU idle, % of a chunk", "<= 2", idle, f"{idle:.1f}", idle <= 2)
        add(f"{about}, denoising, times the research pipeline", ">= 2.5", faster, f"{faster:.2f}", faster >= 2.5)
        for column, what in (("slope_ms", "ms"), ("slope_mb", "MB")):
            is_flat = getattr(ours, f"{column}_low") <= 0 <= getattr(ours, f"{column}_high")
            add(f"{about}, {what} over 100 chunks", "0", getattr(ours, column), interval(ours, column), is_flat)
    return grid(["target", "needed", "measured", "met"], lines)


def ratio(rows: list[Row], over: str, under: str, frames: int, read: int) -> float:
    """ms of one provider over that of another, for the 1.3B model at 480p."""
    ms = {row.provider: row.ms for row in rows if row.shape.startswith(f"1.3B 480p B=1 F={frames} R={read} ")}
    return ms.get(over, math.nan) / ms.get(under, math.nan)


def speed_over_copy(rows: list[Row]) -> list[float]:
    """ms of a device copy of the same bytes over that of the kernel, for every shape."""
    ms = {(row.shape, row.provider): row.ms for row in rows}
    return [ms.get((shape, "copy"), math.nan) / taken for (shape, name), taken in ms.items() if name == "triton"]


def targets(rows: dict[str, list[Row]]) -> str:
    """What the kernels aim for, and what was measured: designs at R = 12 and 21, other kernels at every shape."""
    lines = []

    def add(what: str, bound: float, values: list[float], is_upper: bool = False) -> None:
        needed = f"{'<=' if is_upper else '>='} {bound}"
        if not values or any(map(math.isnan, values)):
            return lines.append([what, needed, NOT_YET, ""])
        low, high = min(values), max(values)
        is_met = high <= bound if is_upper else low >= bound
        shown = dict.fromkeys(f"{value:.3f}" for value in (low, high))
        lines.append([what, needed, " to ".join(shown), "yes" if is_met else "no"])

    def against(what: str, other: str, frames: int, bound: float) -> None:
        values = [ratio(rows["designs"], other, "fused", frames, read) for read in (12, 21)]
        add(f"{what}, {1560 * frames} queries", bound, values)

    turned = [ratio(rows["designs"], "fused", "fused, no turn", 3, read) for read in (12, 21)]
    add("time with a turn per frame over time without turns", 1.01, turned, is_upper=True)
    against("speed over the best library, keys turned beforehand", "keys turned beforehand", 3, 1.0)
    against("speed over keys turned once a chunk and the best library", "turned once a chunk", 3, 1.03)
    against("speed over keys turned once a chunk and the best library", "turned once a chunk", 1, 1.3)
    against("speed over the research code's path", "research", 3, 2.0)
    for name in POINTWISE:
        least = 0.95 if name == "norm_rope_write" else 0.9
        add(f"{name}, speed over a device copy of the same bytes", least, speed_over_copy(rows[name]))
    return grid(["target", "needed", "measured, lowest to highest", "met"], lines)


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
    shape, found = {"kernel": "frame_attention_hopper", "dtype": "bfloat16", "head_dim": "128"}, {}
    for path in folder.glob("compile*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["matrix"] and shape.items() <= row.items():
                    name = row["variant"] or SELECTED
                    found[name, row["triton"]] = f"{row['loops']}, {row['barriers']}, {row['spill_stores']}"
    versions = sorted({version for _, version in found})
    lines = [[name, *(found.get((name, version), "") for version in versions)] for name in VARIANTS]
    head = ["instructions of both loops, barriers a step, spill at edges in B", *(f"Triton {v}" for v in versions)]
    return grid(head, lines)


def evidence(file: str, longest: bool, against: str) -> str:
    """What the films of rooms say, at the longest horizon that all variants of the file have, or that any has."""
    from evidence_tables import films, load_results
    from evidence_tables import table as table_of_results  # matplotlib, which the machine of a GPU may lack

    path = machine.RESULTS / "evidence" / f"{file}.csv"
    if not path.exists():
        return NOT_YET
    found = [one for one in load_results(path) if one.against == against]
    variants_at = {one.horizon: len({o.variant for o in found if o.horizon == one.horizon}) for one in found}
    whole = [horizon for horizon, count in variants_at.items() if longest or count == max(variants_at.values())]
    shown = [one for one in found if one.horizon == max(whole)]
    head = f"{max(whole)} times the horizon, {films(shown)} films, differences to {against}:"
    return "\n".join([head, "", *table_of_results(shown)])


SHORT = {"self-forcing": "plain window (`self-forcing`)", "sink": "sink of 3 frames, nothing else"}
SHORT |= {
    "pi": "`pi`: sink, every band slowed",
    "flex": "`flex`: sink, unlearnt bands slowed beyond the trained range, antiphase noise",
}


def evidence_short() -> str:
    """Four methods at the longest horizon that all presets have: means with their intervals."""
    path = machine.RESULTS / "evidence" / "presets.csv"
    if not path.exists():
        return NOT_YET
    from evidence_tables import BETTER, load_results

    everything = load_results(path)
    longest = max(one.horizon for one in everything if one.variant == "pi")
    found = {(one.variant, one.figure): one for one in everything if one.horizon == longest}
    say = lambda one: f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f})"
    lines = [[name, *(say(found[variant, figure]) for figure in BETTER)] for variant, name in SHORT.items()]
    head = ["", "ground: distance to the first second's", "palette: overlap with the first second's", "course", "speed"]
    return grid(head, lines)


def long_films(file: str, minutes: tuple[int, ...]) -> str:
    """What films of one room still know and do in some of their minutes, counted from 0."""
    path = machine.RESULTS / "rooms" / f"{file}.csv"
    if not path.exists():
        return NOT_YET
    figures = ("ground", "palette", "area", "course", "speed")
    said = {"ground": 4}  # digits after the point, where not two
    with path.open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if int(row["minute"]) in minutes]
    cell = lambda row, name: "-" if row[name] == "nan" else f"{float(row[name]):.{said.get(name, 2)}f}"
    lines = [[row["method"], str(int(row["minute"]) + 1), *(cell(row, name) for name in figures)] for row in rows]
    return grid(["", "minute", "ground", "palette", "area", "course", "speed"], lines)


FROM_TREE: dict[str, Callable[[], str]] = {  # from other folders than those of a GPU
    "compiled": compiled,
    "variants": variants,
    "evidence_short": evidence_short,
    "evidence_presets": partial(evidence, "presets", False, "self-forcing"),
    "evidence_far": partial(evidence, "presets", True, "self-forcing"),
    "evidence_parts": partial(evidence, "parts", False, "sink"),
    "evidence_choices": partial(evidence, "choices", False, "flex, all distances"),
    "evidence_long_choices": partial(evidence, "choices", True, "flex, all distances"),
    "four_minutes": partial(long_films, "four_minutes", (0, 3)),
    "an_hour": partial(long_films, "an_hour", (0, 9, 19, 29, 39, 49, 59)),
}
TABLES: dict[str, tuple[Callable, tuple[str, ...]]] = {  # name: what makes it, from which CSVs
    "correctness": (correctness, ("correctness",)),
    "roofs": (roofs, ("roofs",)),
    "attention": (attention, ("frame_attention",)),
    "tiles": (tiles, ("tiles",)),
    "designs": (designs, ("designs",)),
    "targets": (targets, ("designs", *POINTWISE)),
    "pointwise": (pointwise, POINTWISE),
    "engine": (engine, ("engine",)),
    "vae": (vae, ("vae",)),
}


def caption(rows: list) -> str:
    """Where the rows come from; mixed origins are all named."""
    say = lambda name: ", ".join(dict.fromkeys(getattr(row, name) for row in rows))
    interpreter = " in its interpreter" if any(row.interpreter for row in rows) else ""
    return (
        f"{say('gpu')}, driver {say('driver')}, torch {say('torch')}, Triton {say('triton')}{interpreter}, "
        f"commit {say('commit')}, {say('day')}"
    )


def table(name: str, results: Path) -> str:
    """The table of that name, one for each GPU that was measured."""
    if name in FROM_TREE:
        return FROM_TREE[name]()
    if name not in TABLES:
        raise ValueError(f"no table {name!r}: there is {', '.join([*TABLES, *FROM_TREE])}")
    make, files = TABLES[name]
    kind = {"correctness": Verdict, "engine": ChunkRow, "vae": VaeRow}.get(name, Row)
    found = []
    for folder in [results, *sorted(path for path in results.glob("*") if path.is_dir())]:
        rows = {file: load(folder / f"{file}.csv", kind) for file in files}
        everything = [row for group in rows.values() for row in group]
        text = make(rows) if everything else ""
        if text:
            found.append(f"{caption(everything)}:\n\n{text}")
    return "\n\n".join(found) or (targets({file: [] for file in files}) if name == "targets" else NOT_YET)


def fill(text: str, results: Path = machine.RESULTS) -> str:
    """The text, with every marked table regenerated."""
    return MARKED.sub(lambda m: f"{m[1]}{table(m[2], results)}\n{m[3]}", text)


def main() -> int:
    about = dict(prog=machine.program(), description=machine.described(__doc__))
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    parser.add_argument("--results", type=Path, metavar="DIR", help="CSVs to print tables of, instead of bench/results")
    args = parser.parse_args()
    if args.results is not None and not args.results.is_dir():
        parser.error(f"there is no folder {args.results}")
    if args.results is not None and not args.check:
        print("\n\n".join(f"{name}\n\n{table(name, args.results)}" for name in TABLES))
        return 0
    if not machine.CHECKOUT:
        parser.error("the pages are in a checkout: give --results DIR to print the tables of your own CSVs")
    stale = []
    for name in FILES:
        path = machine.ROOT / name
        old = path.read_text(encoding="utf-8")
        new = fill(old, args.results or machine.RESULTS)
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if args.check else 'rewritten'}: {name}" for name in stale) or "up to date")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
