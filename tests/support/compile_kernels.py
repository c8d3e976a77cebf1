"""Compile every shipped configuration of every kernel, with no GPU, and print what ptxas and SASS say.

    python tests/support/compile_kernels.py [--write] [--json FILE] [--only TEXT] [--cases NAME ...]

--write replaces the committed table of loop lengths that kernels/test_compile.py and this script compare with:
tests/data/compile.csv for the Triton of CI, compile-VERSION.csv beside it for another (make compile TRITON=VERSION).
Needs torch and Triton (3.6 to 3.9) and nothing else. A new kernel is one entry in MODULES and one in LAUNCH, and its
cases in SHIPPED.
"""

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before any `import triton`

import torch
from offline import MATRIX, compile_launch

ROOT = Path(__file__).parent.parent.parent
IN_CI = "3.7.1"  # the Triton of .ci/constraints.txt
TABLE = ROOT / "tests/data" / ("compile.csv" if version("triton") == IN_CI else f"compile-{version('triton')}.csv")
ARCHS = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may ask for
# functions that must use the matrix units
MULTIPLIES = ("_frame_attention", "_frame_attention_hopper", "_causal_conv_hopper")
ROWS_IN_FLIGHT = 15  # tokens of norm_rope_write at 12 heads of 128 in bfloat16, 9 KB each, that an SM must hold at once
OUR_BARRIERS = 6  # the first named barrier that hopper_ring.py takes
COLUMNS = ("function", "triton", "num_warps", "registers", "stack", "spill_stores", "spill_loads", "shared")
PROGRAMS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}  # multiprocessors of A100, 4090, H200, B200, 5090
FRAMES, READ, TOKENS, HEADS = 3, 12, 1560, 12  # Wan 2.1 1.3B at 480p: a chunk of three frames reads twelve


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration that somebody may run: a launcher of kernels/ on a chip, with these arguments."""

    kernel: str
    arch: int
    dtype: str = "bfloat16"
    head_dim: int = 128
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(
            filter(None, (self.kernel, f"sm_{self.arch}", self.dtype, f"d{self.head_dim}", self.variant))
        ).replace(" ", "_")


def empty(case: Case, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, case.dtype))


def pages(case: Case) -> torch.Tensor:
    return empty(case, 1, READ, TOKENS, HEADS, case.head_dim)


def turn(case: Case, *shape: int) -> torch.Tensor:
    return torch.empty((*shape, 22 if case.head_dim == 128 else 12, 2))


def stream(case: Case) -> torch.Tensor:
    return empty(case, 1, FRAMES, TOKENS, HEADS * case.head_dim)


def gates(case: Case) -> tuple[torch.Tensor, ...]:
    """Scale, shift and gate, as the model passes them: views out of one tensor."""
    return empty(case, 1, FRAMES, 6, HEADS * case.head_dim).unbind(2)


def load_file(name: str) -> ModuleType:
    """A file of kernels/ that imports nothing but the standard library."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "kernels" / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# loops of the Hopper kernel that wait for a measurement
VARIANTS = load_file("attention/hopper_variants.py")
PENDING = [name for name in VARIANTS.VARIANTS if name != "plain"]
CONVOLUTION_LAST = load_file("__init__.py").CONVOLUTION_LAST


def frame_attention(launcher, case: Case) -> None:
    frames = 1 if case.variant == "one frame" else FRAMES
    groups = HEADS if case.variant == "turn by head" else 1
    query = empty(case, 1, frames, TOKENS, HEADS, case.head_dim)
    bias = torch.empty(frames, READ) if case.variant == "bias" else None
    launcher(
        query, pages(case), pages(case), torch.empty(READ, dtype=torch.int32), turn(case, frames, READ, groups),
        torch.empty(frames), bias, want_lse=case.variant == "lse",
        **({"path": "portable"} if case.kernel == "frame_attention" else {}),  # whether or not it is selected there
        **({"variant": case.variant} if case.variant in PENDING else {}),
    )  # fmt: skip


def norm_rope_write(launcher, case: Case) -> None:
    query, key, value = (empty(case, 1, FRAMES, TOKENS, HEADS, case.head_dim) for _ in range(3))
    if case.variant == "product":  # side by side, as one product leaves them
        query, key, value = torch.cat((query, key, value), dim=-2).split(HEADS, dim=-2)
    weight = empty(case, HEADS * case.head_dim)
    pairs = case.head_dim // 2 - turn(case, 1).shape[-2]
    slots = torch.empty(FRAMES, dtype=torch.int32)
    query = None if case.variant == "recache" else query
    launcher(query, key, value, weight, weight, torch.empty(TOKENS, pairs, 2), pages(case), pages(case), slots)


def add_modulate(launcher, case: Case) -> None:
    scale, shift, gate, *_ = gates(case)
    launcher(stream(case), stream(case), None if case.variant == "no gate" else gate, scale, shift)


def add_norm_silu(launcher, case: Case) -> None:
    channels = int(case.variant.split()[0]) if case.variant.endswith("channels") else 96
    x, addend, past = (empty(case, 1, frames, 480, 832, channels) for frames in (FRAMES, FRAMES, 2))
    first = case.variant == "first"
    launcher(x, None if first else addend, empty(case, channels), None if first else past)


def causal_conv_hopper(launcher, case: Case) -> None:
    channels, frames = (int(number) for number in case.variant.split()[::2]) if case.variant else (96, 12)
    height, width = 480 * 96 // channels, 832 * 96 // channels  # of a frame at the level with so many channels
    weight = empty(case, channels, channels, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    launcher(empty(case, 1, frames + 2, height, width, channels), weight, empty(case, channels))


def to_bytes(launcher, case: Case) -> None:
    shape = 1, FRAMES, 480, 832, 3
    launcher(empty(case, *shape), torch.empty(shape, dtype=torch.uint8))


MODULES = {  # of kernels/, that hold the launchers
    "frame_attention": "attention.portable",
    "frame_attention_hopper": "attention.hopper",
    "norm_rope_write": "pages.norm_rope_write",
    "rms_norm": "pointwise.rms_norm",
    "modulate": "pointwise.modulate",
    "gate_residual": "pointwise.gate_residual",
    "add_modulate": "pointwise.add_modulate",
    "add_norm_silu": "vae.add_norm_silu",
    "to_bytes": "vae.to_bytes",
    "causal_conv_hopper": "vae.causal_conv",
}
LAUNCH = {
    "frame_attention": frame_attention,
    "frame_attention_hopper": frame_attention,
    "norm_rope_write": norm_rope_write,
    "rms_norm": lambda launcher, case: launcher(stream(case), empty(case, HEADS * case.head_dim)),
    "modulate": lambda launcher, case: launcher(stream(case), *gates(case)[:2]),
    "gate_residual": lambda launcher, case: launcher(stream(case), stream(case), gates(case)[2]),
    "add_modulate": add_modulate,
    "add_norm_silu": add_norm_silu,
    "to_bytes": to_bytes,
    "causal_conv_hopper": causal_conv_hopper,
}


def runs_on(kernel: str, arch: int) -> bool:
    return arch == 90 or "hopper" not in kernel


def is_compiled_by(case: Case, triton: str) -> bool:
    """Whether a Triton of that version compiles the case as it should: registers do not suffice with all of them."""
    last = CONVOLUTION_LAST if case.kernel == "causal_conv_hopper" else VARIANTS.FITS_LAST.get(case.variant, (9, 9))
    return tuple(int(number) for number in triton.split(".")[:2]) <= last


EVERY = [
    *(Case(kernel=kernel, arch=arch) for kernel in LAUNCH for arch in ARCHS if runs_on(kernel, arch)),
    # other variants on one chip: a chip that differs in tiles alone would give the same answer
    Case(kernel="frame_attention", arch=90, dtype="float16"),
    Case(kernel="frame_attention", arch=90, dtype="float32"),
    Case(kernel="frame_attention", arch=90, head_dim=64),
    *(Case(kernel="frame_attention", arch=90, variant=v) for v in ("bias", "lse", "one frame", "turn by head")),
    Case(kernel="frame_attention_hopper", arch=90, dtype="float16"),
    Case(kernel="frame_attention_hopper", arch=90, head_dim=64),
    *(Case(kernel="frame_attention_hopper", arch=90, variant=v) for v in ("bias", "lse", "one frame", *PENDING)),
    Case(kernel="norm_rope_write", arch=90, dtype="float32"),
    Case(kernel="norm_rope_write", arch=90, variant="recache"),
    Case(kernel="norm_rope_write", arch=90, variant="product"),
    Case(kernel="norm_rope_write", arch=90, head_dim=64),
    Case(kernel="add_modulate", arch=90, variant="no gate"),
    Case(kernel="add_norm_silu", arch=90, dtype="float32"),
    *(Case(kernel="add_norm_silu", arch=90, variant=v) for v in ("first", "192 channels", "384 channels")),
    Case(kernel="causal_conv_hopper", arch=90, dtype="float16"),
    *(  # the tiles that a decoder of Wan launches: chunks of three latents, the first chunk, one latent
        Case(kernel="causal_conv_hopper", arch=90, variant=f"{channels} channels {frames} frames")
        for channels, frames in ((192, 12), (384, 3), (384, 6), (96, 9), (96, 1), (192, 1), (384, 1), (384, 2))
    ),
]
SHIPPED = [case for case in EVERY if is_compiled_by(case, version("triton"))]


def load_kernels() -> ModuleType:
    """The package kernels/ of this tree, installed or not."""
    path = ROOT / "kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("shipped", path, submodule_search_locations=[str(path.parent)])
    package = sys.modules["shipped"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def compile_case(case: Case) -> list[dict]:
    """Facts of every kernel that the case launches, as plain dictionaries; or one that holds the compiler's error."""
    try:
        return facts_of_case(case)
    except Exception as error:
        chain = [error]  # Triton wraps an error once for every function that it is inlined into
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        return [{"function": case.kernel, "error": "\n".join(f"{type(e).__name__}: {e}" for e in chain[-2:])}]


def facts_of_case(case: Case) -> list[dict]:
    if "shipped" not in sys.modules:
        load_kernels()
    module = importlib.import_module(f"shipped.{MODULES[case.kernel]}")
    for loaded in [module for name, module in sys.modules.items() if name.startswith("shipped.")]:
        for name, answer in (("arch_of", case.arch), ("multiprocessors", PROGRAMS[case.arch])):
            if hasattr(loaded, name):
                setattr(loaded, name, lambda device, answer=answer: answer)
    if case.kernel == "frame_attention":
        importlib.import_module("shipped.attention.select").forget()
    launcher = getattr(module, case.kernel)
    facts = compile_launch(lambda: LAUNCH[case.kernel](launcher, case), case.arch)
    return [dataclasses.asdict(fact) for fact in {fact.function: fact for fact in facts}.values()]


def objections(case: Case, fact: dict, lengths: str | None = None) -> list[str]:
    """What is wrong with a compiled kernel; `lengths` is the committed length of its loops, None to leave it alone."""
    if "error" in fact:
        return [f"does not compile: {fact['error']}"]
    counts, loops, wrong = fact["counts"], fact["loops"], []
    wrong += [f"ptxas: {warning}" for warning in fact["warnings"]]
    if fact["shared"] > SHARED[case.arch] * 1024:
        wrong.append(f"{fact['shared']} bytes of shared memory, sm_{case.arch} has {SHARED[case.arch]} KiB")
    for loop in loops:
        if local := loop.get("LDL", 0) + loop.get("STL", 0):
            wrong.append(f"{local} accesses to local memory in a loop of {loop['length']} instructions")
        if case.arch == 90 and (staged := loop.get("LDS", 0) + loop.get("STS", 0)):
            wrong.append(f"{staged} values pass through shared memory in a loop of {loop['length']} instructions")
    spills = fact["stack"] or fact["spill_stores"] or fact["spill_loads"]
    # attention in float32 has no matrix unit; it exists to check logic
    to_check = (case.kernel, case.dtype) == ("frame_attention", "float32")
    if spills and not loops and fact["function"] not in MULTIPLIES and not to_check:
        wrong.append(f"spills {fact['spill_stores']} bytes and loads {fact['spill_loads']}, stack {fact['stack']}")
    unit = {90: "HGMMA", 100: "UTCHMMA"}.get(case.arch, "HMMA")
    if fact["function"] in MULTIPLIES and case.dtype != "float32" and not (loops and loops[0].get(unit)):
        wrong.append(f"no {unit} in a loop; found {counts}")
    if fact["function"] == "_frame_attention_hopper":  # what it is written for
        bare = [loop["MUFU.EX2"] - loop["covered"] for loop in loops]
        wrong += [f"{number} exponentials in a loop with no product under way" for number in bare if number]
        wrong += [f"Triton takes named barrier {number}" for number in taken_barriers(fact) if number >= OUR_BARRIERS]
    if fact["function"] == "_norm_rope_write" and (case.dtype, case.variant) == ("bfloat16", ""):
        fit = 65536 // (-(-fact["registers"] // 8) * 8 * 32 * fact["num_warps"])
        if fit < ROWS_IN_FLIGHT:
            wrong.append(f"{fact['registers']} registers let {fit} programs on an SM, {ROWS_IN_FLIGHT} are wanted")
    if lengths is not None and not same_length(lengths, loop_lengths(fact)):
        wrong.append(f"loops of {loop_lengths(fact)} instructions, {lengths} in {TABLE.name}")
    return wrong


def taken_barriers(fact: dict) -> list[int]:
    """Numbers of named barriers that Triton takes for itself: where 256 or 288 threads meet, it is one of ours."""
    found = [meeting.split(", ") for meeting in fact.get("meetings", ())]
    return sorted({int(number, 16) for number, *threads in found if threads not in (["0x100"], ["0x120"])})


def loop_lengths(fact: dict) -> str:
    return " ".join(str(loop["length"]) for loop in fact["loops"])


def same_length(committed: str, found: str, within: float = 0.02) -> bool:
    pairs = list(zip(map(int, committed.split()), map(int, found.split()), strict=False))
    return len(committed.split()) == len(found.split()) and all(abs(b - a) <= within * a for a, b in pairs)


def row_of(case: Case, fact: dict) -> dict[str, object]:
    """A line of the table: the case, then its facts; of the loops, the longest."""
    loop = fact["loops"][0] if fact["loops"] else {}
    matrix = {name: loop[name] for name in MATRIX if name in loop}
    return {
        **dataclasses.asdict(case),
        **{name: fact[name] for name in COLUMNS},
        "loops": loop_lengths(fact),
        "matrix": " ".join(f"{number} {name}" for name, number in matrix.items()),
        "exponentials": loop.get("MUFU.EX2", 0),
        "barriers": loop.get("BAR.SYNC", 0),
    }


def committed() -> dict[tuple[str, str], dict[str, str]]:
    """The rows of this Triton's table by case and function; empty before it is first written."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [field.name for field in dataclasses.fields(Case)]
    case = lambda row: Case(**{name: row[name] for name in names} | {n: int(row[n]) for n in ("arch", "head_dim")})
    return {(str(case(row)), row["function"]): row for row in rows}


def committed_lengths(table: dict, case: Case, fact: dict) -> str | None:
    """What the table says of a kernel's loops, if it was written with this Triton."""
    row = table.get((str(case), fact["function"]))
    return row["loops"] if row and row["triton"] == fact.get("triton") else None


def show(case: Case, fact: dict) -> None:
    if "error" in fact:
        return print(f"{str(case):48} does not compile", flush=True)
    row = row_of(case, fact)
    print(
        f"{str(case):48} {fact['function']:24} {fact['registers']:>3} regs, {fact['spill_stores']:>4} spilled, "
        f"{fact['shared']:>6} shared, loops {row['loops'] or '-':>12} ({row['matrix'] or 'no matrix unit'}), "
        f"{fact['seconds']:.1f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the rows of these cases in {TABLE.name}")
    parser.add_argument("--json", type=Path, help="write every fact to this file")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="these cases, by their whole names")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()

    cases = [case for case in SHIPPED if args.only in str(case) and (args.cases is None or str(case) in args.cases)]
    table, facts, wrong = committed(), {}, []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for case, found in zip(cases, pool.map(compile_case, cases), strict=True):
            facts[str(case)] = found
            for fact in found:
                show(case, fact)
                lengths = None if args.write else committed_lengths(table, case, fact)
                wrong += [f"{case}: {fact['function']}: {line}" for line in objections(case, fact, lengths)]
    if args.json:
        args.json.write_text(json.dumps(facts))
    if args.write and not any("error" in fact for found in facts.values() for fact in found):
        rows = {(str(case), fact["function"]): row_of(case, fact) for case in cases for fact in facts[str(case)]}
        shipped = {str(case) for case in SHIPPED}
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, next(iter(rows.values())), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for (case, _), row in (table | rows).items() if case in shipped)
    print("\n".join(wrong) or f"{len(cases)} configurations compile as they should")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
