"""Compile what a kernel launcher would launch, for any NVIDIA chip and with no GPU, and report what ptxas and SASS say.

The launcher itself runs, on CPU tensors and under a stand-in driver: it chooses its configuration, Triton specialises
on its real arguments, and everything stops before the launch. So what is checked is what is shipped.
Needs TRITON_INTERPRET unset before Triton is imported. Works with Triton 3.6 to 3.9.
"""

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MATRIX = ("HGMMA", "UTCHMMA", "HMMA")  # matrix instructions of sm_90, of sm_100, of the others
MEMORY = ("LDS", "STS", "LDL", "STL", "LDSM", "STSM", "LDGSTS", "UTMALDG")
COUNTED = (*MATRIX, "MUFU.EX2", *MEMORY, "BAR", "BAR.SYNC", "SHFL")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.MULTILINE)
Instruction = tuple[int, str, str]  # address, operation, operands
Counts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the compiler says about one kernel. Sizes in bytes; counts as ``count`` gives them."""

    function: str
    arch: int
    triton: str = triton.__version__
    seconds: float = 0.0  # of processor time to compile it
    num_warps: int = 4
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    length: int = 0  # SASS instructions
    warnings: tuple[str, ...] = ()
    counts: Counts = field(default_factory=dict)
    meetings: tuple[
        str, ...
    ] = ()  # operands of BAR instructions that name their barrier: "number" or "number, threads"
    loops: tuple[Counts, ...] = ()  # innermost loops that hold matrix instructions, longest first


def count(instructions: list[Instruction]) -> Counts:
    """How many instructions of each counted operation, LDS.128 counting as LDS; "length" counts them all.

    "covered": exponentials issued, in this order, while a wgmma is under way.
    """
    found = {"length": len(instructions), "covered": 0}
    under_way = False
    for _, op, operands in instructions:
        under_way |= op.startswith("HGMMA")
        under_way &= not (op.startswith("WARPGROUP.DEPBAR") and operands.rstrip().endswith("0x0"))
        found["covered"] += under_way and op == "MUFU.EX2"
    for name in COUNTED:
        if number := sum(f"{op}.".startswith(f"{name}.") for _, op, _ in instructions):
            found[name] = number
    return found


def is_matrix(op: str) -> bool:
    return op.split(".")[0] in MATRIX


def matrix_loops(instructions: list[Instruction]) -> tuple[Counts, ...]:
    """Counts of each innermost loop that holds matrix instructions, the longest first.

    A loop is a backward branch. The stubs that spin on a barrier come after the last EXIT and jump back as well; they
    are no loops.
    """
    end = max((address for address, op, _ in instructions if op.startswith("EXIT")), default=0)
    spans = set()
    for address, op, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") and address < end else None
        if target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    bodies = {span: [i for i in instructions if span[0] <= i[0] <= span[1]] for span in spans}
    working = [span for span, body in bodies.items() if any(is_matrix(op) for _, op, _ in body)]
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    inner = [span for span in working if not any(inside(other, span) for other in working)]
    return tuple(sorted((count(bodies[span]) for span in inner), key=lambda body: -body["length"]))


def disassemble(cubin: bytes) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(int(address, 16), op, rest) for address, op, rest in INSTRUCTION.findall(sass)]


def facts_of(kernel: triton.compiler.CompiledKernel, log: str, seconds: float) -> Facts:
    """The facts of a compiled kernel; `log` is what `ptxas -v` said of it."""
    number = lambda pattern: int(found[1]) if (found := re.search(pattern, log)) else 0
    instructions = disassemble(kernel.asm["cubin"])
    return Facts(
        function=kernel.metadata.name,
        arch=kernel.metadata.target.arch,
        seconds=seconds,
        num_warps=kernel.metadata.num_warps,
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=kernel.metadata.shared,
        length=len(instructions),
        warnings=tuple(line.strip() for line in log.splitlines() if "wgmma" in line.lower() or "C75" in line),
        counts=count(instructions),
        meetings=tuple(
            sorted({at for _, op, rest in instructions if op[:3] == "BAR" and (at := rest.strip())[:2] == "0x"})
        ),
        loops=matrix_loops(instructions),
    )


class StandInDriver:
    """Answers what Triton asks before a launch. Device number N is a chip of compute capability N / 10."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels by device number

    def get_current_stream(self, device: int) -> int:
        return 0


# by kernel hash: Triton compiles a specialisation once per process, and ptxas reports once
_known: dict[str, Facts] = {}


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Facts]]:
    """Inside, a launch compiles for `arch` and appends to the list; nothing runs, so outputs stay as they were."""
    run, facts = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        started, log = sum(os.times()[:4]), io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in _known:
            _known[kernel.hash] = facts_of(kernel, log.getvalue(), sum(os.times()[:4]) - started)
        facts.append(_known[kernel.hash])

    JITFunction.run = compile_only
    driver.set_active(StandInDriver(arch))
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = cache  # a cached kernel comes without the log of ptxas
        knobs.nvidia.dump_ptxas_log = True
        try:
            yield facts
        finally:
            JITFunction.run = run


def compile_launch(launch: Callable[[], object], arch: int) -> list[Facts]:
    """Facts of every kernel that calling `launch` would launch on a chip of this architecture, in order."""
    with compiling_for(arch) as facts:
        launch()
    return facts
