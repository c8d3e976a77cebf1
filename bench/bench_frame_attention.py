"""Time frame_attention: alone, beside libraries and other designs of the turn, or with every tile or loop.

python bench/bench_frame_attention.py --save                     # the kernel that is selected: frame_attention.csv
python bench/bench_frame_attention.py --what hopper --save       # the portable kernel beside the Hopper kernel
python bench/bench_frame_attention.py --what peers --save        # and libraries, and the designs: also designs.csv
python bench/bench_frame_attention.py --what tiles --save        # every tile that might be the best: tiles.csv
python bench/bench_frame_attention.py --what variants --save     # loops of the Hopper kernel, to decide: variants.csv
python bench/bench_frame_attention.py --what once                # two launches, for a profiler
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import harness
import torch
from correctness import count_differing
from designs import EVERY, PASSES, SHORT, TINY, Problem, Shape
from harness import Case, Provider, Row
from peers import PEERS, first, get_peer
from roofs import DEVICE, measure_roofs

from flexkern.kernels.attention.hopper_variants import SELECTED, VARIANTS
from flexkern.kernels.attention.portable import frame_attention
from flexkern.kernels.attention.select import PathName, choose_tile, portable_tile
from flexkern.kernels.attention.tiles import Config
from flexkern.kernels.attention.tune import candidates
from flexkern.kernels.gpus import arch_of

LIBRARY = {"mean": 2.0, "worst": 4.0}  # query and key are both turned and rounded before a library sees them
QUANTISED = {"mean": 40.0, "worst": 40.0}  # catches a wrong result, not a coarse one: the CSV has its error
COMPILERS = 8  # processes that compile tiles side by side
HOPPER = "flexkern.kernels.attention.hopper"
# backends of flexkern over a library: what a call costs with keys gathered and turned, which peers get at no charge
BACKENDS = {f"backend {name}": name for name in ("sdpa", "flash-attn", "xformers")}
PROVIDERS = ("triton", *PEERS, *BACKENDS)
# where a loop is chosen: the shape that is rendered most, one-frame chunks, many heads, long frames
DECISIVE = [shape for shape in SHORT if shape.read == 21 and shape.model != "5B"]
RIVALS = ("sdpa cudnn", "flash-attn 4")
TRIAL = 80.0  # seconds that a variant has to compile and to come back
REPEATS = 50  # of each variant and shape, bit by bit


def path_of(problem: Problem, config: Config | None = None, path: PathName | None = None) -> str:
    """Which kernel a call launches, and with which loop or tile."""
    tile = choose_tile(problem.query, config, path)
    return f"hopper {SELECTED}" if tile is None else f"portable {tile}"


def ours(problem: Problem, config: Config | None = None, path: PathName | None = None) -> Provider:
    """The kernel that is selected, or the one that is asked for."""
    arguments = problem.arguments(problem.turn)
    call = lambda: frame_attention(*arguments, config=config, path=path)[0]
    about = {"path": path_of(problem, config, path)}
    return Provider(call=call, result=problem.sample, everything=lambda out: out, **about)


def without_hopper() -> str:
    """Why the Hopper kernel cannot run here, "" where it can."""
    if find_spec(HOPPER) is None:
        return "no such kernel in this version"
    is_hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return "" if is_hopper else "needs a GPU of compute capability 9.0"


def hopper(problem: Problem, variant: str = SELECTED) -> Provider | str:
    if absent := without_hopper():
        return absent
    from flexkern.kernels.attention.hopper import frame_attention_hopper

    arguments = problem.arguments(problem.turn)
    call = lambda: first(frame_attention_hopper(*arguments, variant=variant))
    return Provider(call=call, result=problem.sample, everything=lambda out: out, path=f"hopper {variant}")


def library(problem: Problem, name: str) -> Provider | str:
    attend = get_peer(name, DEVICE)
    if isinstance(attend, str):
        return attend
    budget = QUANTISED if PEERS[name].quantised else LIBRARY
    return Provider(call=lambda: attend(*problem.ready), result=problem.sample, **budget)


def backend(problem: Problem, name: str) -> Provider | str:
    """A backend as the engine calls it, its gather and turns included; judged as libraries are."""
    try:
        from flexkern.backends import get_backend  # needs numpy

        attend, plan = get_backend(name, DEVICE).frame_attention, problem.plan()
    except Exception as fault:  # not installed, or not for this machine
        return " ".join(str(fault).split())[:200]
    pages = problem.keys, problem.values
    call = lambda: attend(problem.query, *pages, plan)
    return Provider(call=call, result=problem.sample, everything=lambda out: out, **LIBRARY)


def case_of(kernel: str, problem: Problem, providers: dict[str, Provider | str]) -> Case:
    shape = problem.shape
    return Case(
        kernel=kernel, shape=str(shape), bytes=shape.bytes, flops=shape.flops, bound="matmul",
        providers=providers, truth=problem.truth(problem.turn),
    )  # fmt: skip


def build(shape: Shape, names: tuple[str, ...] = PROVIDERS) -> Case:
    """Our attention, that of libraries, whose keys come gathered and turned at no charge, and backends over them."""
    problem = Problem(shape, DEVICE)
    special = {"triton": ours, "portable": lambda problem: ours(problem, path="portable"), "hopper": hopper}
    made: dict[str, Provider | str] = {}
    for name in names:
        if name in BACKENDS:
            made[name] = backend(problem, BACKENDS[name])
        else:
            made[name] = special[name](problem) if name in special else library(problem, name)
    return case_of("frame_attention", problem, made)


def best_library(rows: list[Row]) -> str | None:
    """The fastest library that computes in bf16, among rows of one shape."""
    timed = [row for row in rows if row.provider in PEERS and not PEERS[row.provider].quantised and row.ms > 0]
    return min(timed, key=lambda row: row.ms).provider if timed else None


def build_designs(shape: Shape, best: str) -> Case:
    """Ways to bring the turn to the keys; all but the research code's with the best library attention."""
    problem = Problem(shape, DEVICE)
    attend, theirs = get_peer(best, DEVICE), get_peer("sdpa flash" if DEVICE == "cuda" else "sdpa math", DEVICE)
    still = problem.arguments(problem.no_turn)
    judged = {"result": problem.sample, **LIBRARY}
    return case_of("designs", problem, {
        "fused": ours(problem),
        "fused, no turn": Provider(
            call=lambda: frame_attention(*still)[0], result=problem.sample, truth=problem.truth(problem.no_turn),
            path=path_of(problem),
        ),
        "keys turned beforehand": Provider(call=lambda: attend(*problem.ready), **judged),
        "turned once a chunk": Provider(call=problem.turned_once_a_chunk(attend), calls=PASSES, **judged),
        "turned every pass": Provider(call=problem.turned_every_pass(attend), **judged),
        "research": Provider(call=problem.research(theirs), **judged),
    })  # fmt: skip


def tiles(shape: Shape) -> dict[str, Config]:
    """Tiles worth a try, by name, the one in use first."""
    device = torch.empty(0, device=DEVICE).device
    chosen, arch = portable_tile(device, shape.head_dim, torch.bfloat16), arch_of(device)
    if arch == 0:
        return {"tuned": chosen, "16x16": replace(chosen, block_m=16, block_n=16)}
    return {"tuned": chosen} | {str(config): config for config in candidates(arch, chosen)[1:]}


def build_tiles(shape: Shape) -> Case:
    problem = Problem(shape, DEVICE)
    made = {name: ours(problem, config=config) for name, config in tiles(shape).items()}
    return case_of("frame_attention tiles", problem, made)


def compile_tiles(shape: Shape, start: int) -> None:
    """Compile every COMPILERS-th tile into Triton's cache; the bench itself names those that do not compile."""
    problem = Problem(shape, DEVICE)
    for config in list(tiles(shape).values())[start::COMPILERS]:
        with contextlib.suppress(Exception):
            ours(problem, config=config).call()


def warm_tiles() -> None:
    """Compile all tiles side by side: one after the other takes longer than timing them."""
    if DEVICE == "cuda":
        command = [sys.executable, __file__, "--what", "compile", "--start"]
        children = [subprocess.Popen([*command, str(start)]) for start in range(COMPILERS)]
        for child in children:
            child.wait()


def try_variant(name: str, shapes: Sequence[Shape]) -> None:
    """A variant is in Triton's cache, and has come back from every shape."""
    for shape in shapes:
        hopper(Problem(shape, DEVICE), name).call()
        torch.cuda.synchronize()


def try_variants(names: Sequence[str], *options: str) -> dict[str, str]:
    """Try all side by side, each in a process of its own: by name, why one must not be timed ("" where it may).

    A fault in a protocol of barriers hangs, and would take the whole bench with it.
    """
    if absent := without_hopper():
        return dict.fromkeys(names, absent)
    faults, end = {}, time.monotonic() + TRIAL
    command = [sys.executable, __file__, *options, "--what", "try", "--variant"]
    with contextlib.ExitStack() as files:
        logs = {name: files.enter_context(tempfile.TemporaryFile()) for name in names}
        children = {name: subprocess.Popen([*command, name], stdout=log, stderr=log) for name, log in logs.items()}
        for name, child in children.items():
            faults[name] = ""
            try:
                code = child.wait(timeout=max(end - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                faults[name] = f"did not come back in {TRIAL:.0f} s"
            else:
                logs[name].seek(0)
                said = logs[name].read().decode(errors="replace").split("\n")
                faults[name] = f"exit code {code}: {' '.join(said[-4:])[:300]}" if code else ""
    return faults


def build_variants(shape: Shape, faults: dict[str, str]) -> Case:
    """Every loop of the Hopper kernel, and what it is written to beat. One whose repeats differ is not timed."""
    problem = Problem(shape, DEVICE)
    ours = {f"hopper {name}": fault or hopper(problem, name) for name, fault in faults.items()}
    case = case_of("frame_attention variants", problem, ours | {name: library(problem, name) for name in RIVALS})
    for name in ours:
        if isinstance(case.providers[name], Provider) and not harness.judge(case, case.providers[name])[1]:
            differing = count_differing(case, name, REPEATS)
            case.providers[name] = f"{differing} of {REPEATS} repeats differ" if differing else case.providers[name]
    return case


def run_peers(args: argparse.Namespace, shapes: list[Shape]) -> None:
    """Time libraries and designs, shape by shape, so that a run that is cut off has whole shapes."""
    out, roof = harness.folder(args), measure_roofs()
    for shape in shapes:
        rows = harness.compare(build(shape), roof, budget_ms=args.budget_ms, as_json=args.json)
        best = best_library(rows)
        designs = []
        if best:
            case = build_designs(shape, best)
            designs = harness.compare(case, roof, budget_ms=args.budget_ms, note=f"library: {best}", as_json=args.json)
        if out:
            harness.save(rows, out / "frame_attention.csv")
        if out and designs:
            harness.save(designs, out / "designs.csv")


CHOICES = ("ours", "hopper", "peers", "tiles", "variants", "once", "compile", "try")


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--what", choices=CHOICES, default="ours")
    parser.add_argument("--start", type=int, default=0, help=f"of every {COMPILERS}th tile to compile")
    parser.add_argument("--variant", choices=VARIANTS, default=SELECTED, help="of --what try")
    args = parser.parse_args()
    shapes, decisive = (harness.shapes_for(args, short, EVERY, TINY) for short in (SHORT, DECISIVE))
    if args.what == "peers":
        run_peers(args, shapes)
    elif args.what == "tiles":
        warm_tiles()
        harness.run(args, "tiles", [shape for shape in shapes if shape.frames != 1][:2], build_tiles)
    elif args.what == "variants":
        faults = try_variants(list(VARIANTS), *(["--tiny"] if args.tiny else []))
        harness.run(args, "variants", decisive, lambda shape: build_variants(shape, faults))
    elif args.what == "try":
        try_variant(args.variant, decisive)
    elif args.what == "once":
        call = ours(Problem(shapes[0], DEVICE)).call
        print(call().shape, call().shape)
    elif args.what == "compile":
        compile_tiles(shapes[0], args.start)
    else:
        names = ("triton",) if args.what == "ours" else ("portable", args.what)
        harness.run(args, "frame_attention", shapes, lambda shape: build(shape, names))


test_speed = harness.speed_test(SHORT, TINY, PROVIDERS, build)

if __name__ == "__main__":
    main()
