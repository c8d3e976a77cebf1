"""Play a warp-specialised Gluon kernel on the CPU: the functions of its source run as they are, each role in a thread.

Gluon has no interpreter. This one knows what kernels/attention/hopper.py and kernels/vae/causal_conv.py use, and
nothing of layouts. One role runs at a time; at every barrier, copy and product a random one goes on. What the hardware
leaves open is random too: a TMA copy poisons its target with NaN at once and fills it some time later; an asynchronous
product reads its operands anywhere between its issue and the wait that finishes it. A deadlock, a result that was not
waited for, a product that reads what no fence has published, an arrival too many and one that is left at a named
barrier raise; a buffer overwritten too early or read too soon shows in the numbers. What it does not see: how a role's
warps are kept together (by barriers of the four warps), and layouts.
"""

import inspect
import random
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import triton
from gluon_barriers import Barrier, Barriers, NamedBarrier
from gluon_memory import Descriptor, Pointer, Shared, load, store, value

ROOT = Path(__file__).parent.parent.parent


class Constant(int):
    """A whole number that gl.constexpr made."""

    @property
    def value(self) -> int:
        return int(self)


def constant(x: float) -> float:
    """gl.constexpr; as an annotation it means nothing."""
    return Constant(x) if isinstance(x, int) else x


class Product:
    """An asynchronous product: reads its operands when it likes, until it is waited for."""

    def __init__(self, left, right, acc, keep: bool):
        self.left, self.right, self.acc, self.keep = left, right, acc, keep
        self.result, self.done = None, False

    def run(self) -> None:
        if self.result is None:
            left = self.left.read() if isinstance(self.left, Shared) else self.left.float()
            acc = self.acc if self.keep else 0.0
            if isinstance(acc, Product):  # products of one accumulator follow on each other
                acc.run()
                acc = acc.result
            self.result = value(left @ self.right.read() + acc)


class Stage:
    """One program: its roles, the copies in flight, and who may go on."""

    def __init__(self, seed: int):
        self.random, self.turn = random.Random(seed), threading.Condition()
        self.roles, self.current, self.error = {}, None, None  # role -> what it waits for, None if nothing
        self.copies, self.products, self.dirty = [], {}, {}
        self.named: dict[int, NamedBarrier] = defaultdict(NamedBarrier)
        self.threads: dict[str, int] = {}  # of a role
        self.issued: list[str] = []  # which role began to add products to an accumulator, in order
        self.haste = self.random.choice((0.0, 0.1, 0.5))  # of the copies: 0 if they come only when all wait for them

    def me(self) -> str:
        return threading.current_thread().name

    def play(self, roles: list[tuple[Callable, tuple]], warps: list[int]) -> None:
        threads = [threading.Thread(target=self.act, args=role, name=f"role {i}") for i, role in enumerate(roles)]
        self.roles = {thread.name: None for thread in threads}
        self.products = {name: [] for name in self.roles}
        self.threads = {name: 32 * count for name, count in zip(self.roles, warps, strict=True)}
        for thread in threads:
            thread.start()
        with self.turn:
            self.choose()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        left = [number for number, barrier in self.named.items() if barrier.arrived]
        assert not left, f"arrivals left at named barriers {left}"

    def act(self, function: Callable, arguments: tuple) -> None:
        try:
            self.sleep()
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.turn:
            self.roles.pop(self.me())
            self.choose()

    def sleep(self) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.current == self.me() or self.error)
        if self.error:
            raise RuntimeError("another role failed")

    def choose(self) -> None:
        """Finish some copies, then hand on to a role that can go on."""
        ready = lambda: [name for name, until in self.roles.items() if until is None or until()]
        try:
            while self.copies and (not ready() or self.random.random() < self.haste):
                self.copies.pop(self.random.randrange(len(self.copies)))()
        except AssertionError as error:
            self.error = self.error or error
        if self.roles and not ready():
            self.error = self.error or RuntimeError(f"deadlock of {', '.join(self.roles)}")
        self.current = self.random.choice(ready() or [None])
        self.turn.notify_all()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others go on; return when ``until`` holds."""
        with self.turn:
            self.roles[self.me()] = until
            self.choose()
        self.sleep()
        self.roles[self.me()] = None


class Kernel:
    """A jitted function: called by another, or launched on a grid."""

    def __init__(self, player: "Player", function: Callable):
        self.player, self.function = player, function
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args, **options):
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args, num_warps: int, enable_fp_fusion: bool, **constants) -> None:
            args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            self.player.programs = value(grid[0])
            for program in range(grid[0]):
                self.player.program = value(program)
                self.player.stage = Stage(f"{self.player.seed} {program}")
                self.function(*args, **constants)
                self.player.issued.append(self.player.stage.issued)

        return launch


class Player:
    """Gluon's and Triton's functions, as far as the kernel uses them."""

    def __init__(self, seed: int):
        self.seed, self.stage, self.program, self.programs = seed, None, None, None
        self.issued: list[list[str]] = []  # of each program, as its stage has it

    def warp_specialize(self, roles, worker_num_warps, worker_num_regs) -> None:
        assert len(roles) == len(worker_num_warps) + 1 == len(worker_num_regs) + 1
        self.stage.play(roles, [4, *worker_num_warps])

    def allocate_shared_memory(self, dtype, shape, layout):
        if layout == "barriers":
            return Barriers(Barrier() for _ in range(shape[0]))
        storage = torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype)
        return Shared(storage, shape, self.stage.dirty, layout)

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.change(count, 0)
        self.stage.pause()

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.change(1, int(size))
        self.stage.pause()

    def wait(self, barrier: Barrier, parity, pred=True) -> None:
        if pred:
            self.stage.pause(lambda parity=int(parity): barrier.phase != parity)

    def asm(self, text: str, constraints: str, args: list, dtype, is_pure: bool, pack: int) -> None:
        """The inline PTX that the kernel uses: arrival and wait at a named barrier."""
        plain = r"bar\.(arrive|sync) \$1, \$2; mov\.u32 \$0, 0;"
        once = r"\{ \.reg \.pred p; setp\.gt\.u32 p, \$1, 15; again: bar\.(arrive) \$1, \$2; @p bra\.uni again; "
        found = re.fullmatch(plain, text) or re.fullmatch(once + r"mov\.u32 \$0, 0; \}", text)
        assert found and constraints == "=r,r,n" and not is_pure, f"unknown assembly: {text}"
        number, expected = (int(x) for x in args)
        assert 6 <= number < 16, f"named barrier {number} is Triton's or nobody's"
        barrier, stage = self.stage.named[number], self.stage
        before = barrier.round
        barrier.arrive(stage.me(), stage.threads[stage.me()], expected)
        stage.pause((lambda: barrier.round != before) if found[1] == "sync" else None)

    def copy(self, descriptor, corner, barrier: Barrier, target: Shared) -> None:
        block = descriptor.read([int(i) for i in corner])
        assert [size for size in target.shape if size > 1] == [size for size in block.shape if size > 1]
        target.storage.fill_(float("nan"))

        def finish():
            target.tensor.copy_(block.view(target.shape))
            barrier.change(0, -block.numel() * block.element_size())

        self.stage.copies.append(finish)
        self.stage.pause()

    def mma(self, left, right, acc, use_acc=True, is_async=False) -> Product:
        assert is_async
        product = Product(left, right, acc, use_acc)
        self.stage.products[self.stage.me()].append(product)
        self.stage.issued += [self.stage.me()] if use_acc and not isinstance(acc, Product) else []
        if self.stage.random.random() < 0.5:
            product.run()
        self.stage.pause()
        return product

    def mma_wait(self, num_outstanding: int, deps: tuple):
        self.stage.pause()
        mine = self.stage.products[self.stage.me()]
        while len(mine) > num_outstanding:
            product = mine.pop(0)
            product.run()
            product.done = True
        assert all(not isinstance(x, Product) or x.done for x in deps), "used before it was waited for"
        results = [x.result if isinstance(x, Product) else x for x in deps]
        return results[0] if len(results) == 1 else tuple(results)

    def fence(self) -> None:
        for storage in [storage for storage, role in self.stage.dirty.items() if role == self.stage.me()]:
            del self.stage.dirty[storage]

    def modules(self) -> dict[str, ModuleType | SimpleNamespace]:
        """What the kernel's files import, by name."""
        same = lambda x, layout: x
        nothing = lambda *args, **options: None
        language = SimpleNamespace(
            constexpr=constant, static_range=range, program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs, load=load, store=store,
            minimum=lambda a, b: torch.minimum(value(a), value(b)),
            maximum=lambda a, b: torch.maximum(value(a), value(b)),
            where=lambda mask, a, b: torch.where(mask, a, b), max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
            join=lambda a, b: torch.stack((a, b), dim=-1), convert_layout=same,
            arange=lambda begin, end, layout: value(torch.arange(begin, end)),
            full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
            zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
            barrier=lambda: self.stage.pause(), inline_asm_elementwise=self.asm,
            allocate_shared_memory=self.allocate_shared_memory, warp_specialize=self.warp_specialize,
            NVMMASharedLayout=nothing, NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing,
            BlockedLayout=nothing, int32=torch.int32, int64=torch.int64, float32=torch.float32,
        )  # fmt: skip
        barriers = SimpleNamespace(
            init=self.init, arrive=self.arrive, expect=self.expect, wait=self.wait, MBarrierLayout=lambda: "barriers"
        )
        hopper = SimpleNamespace(
            fence_async_shared=self.fence, mbarrier=barriers, warpgroup_mma=self.mma, warpgroup_mma_wait=self.mma_wait,
            tma=SimpleNamespace(async_copy_global_to_shared=self.copy),
        )  # fmt: skip
        jit = lambda function: Kernel(self, function)
        gluon = SimpleNamespace(jit=jit, constexpr_function=jit, language=language)
        return {
            "triton": SimpleNamespace(
                jit=jit,
                language=language,
                cdiv=triton.cdiv,
                next_power_of_2=triton.next_power_of_2,
                knobs=triton.knobs,
            ),
            "triton.language": language,
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
        }


def played(name: str, own: tuple[str, ...], shared: tuple[str, ...], seed: int, edit: Callable | None = None):
    """Module ``name`` of kernels/, such as "attention.hopper", run by a player.

    own: modules of kernels/ that it has copies of its own of. shared: those that it shares with everybody.
    edit: changes a source before it is executed, to see whether a test notices. The module's ``player`` has played it.
    """
    player = Player(seed)
    stand_ins = player.modules() | {f"played.{x}": import_module(f"flexkern.kernels.{x}") for x in shared}
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    try:
        for package in ("played", *{f"played.{x}".rpartition(".")[0] for x in (*own, name)}):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        for own_name in (*own, name):
            full = f"played.{own_name}"
            module = sys.modules[full] = ModuleType(full)
            module.__package__ = full.rpartition(".")[0]
            path = ROOT / "kernels" / f"{own_name.replace('.', '/')}.py"
            source = path.read_text()
            exec(compile(edit(source) if edit else source, path.name, "exec"), module.__dict__)
    finally:
        sys.modules.clear()
        sys.modules.update(before)
    module.player = player
    return module
