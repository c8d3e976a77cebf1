"""The 3x3x3 convolutions of the VAE's decoder as products on the tensor cores of sm_90 (an implicit GEMM).

    out[t, h, w, n] = bias[n] + sum of weight[n, c, i, j, k] * buffer[t + i, h + j - 1, w + k - 1, c]   over c, i, j, k

One warp fetches by TMA, which writes zeros for places outside of the frame; two warpgroups of 64 places each multiply.
A tile is 8 x 16 places of FRAMES frames, and WIDE + REST output channels: Triton's tiles are powers of two, so that 96
channels are 64 and 32. A step is one tap in space and 32 input channels. It brings FRAMES + 2 frames of the buffer and
the weights of three taps in time, and multiplies each fetched place by every tap that a frame of the tile has for it:
a place is fetched 9 (FRAMES + 2) times and not 27 FRAMES times. That is what this kernel is for, because a place serves
few output channels: at the tensor cores' rate 96 channels of one frame want 75 bytes a clock from the L2 cache, those
of four frames 29, and an SM is taken to get 32.

Left factors pass through registers, read once from shared memory for three products; read there by each, they alone
would take longer than the products of 96 channels. ptxas makes all products of a kernel wait for each other where such
registers are written while one is under way. So a warpgroup loads two or three frames, multiplies and waits; meanwhile
the other one multiplies.

Bytes: of a tile and step ((FRAMES + 2) * 128 + 3 * (WIDE + REST)) * 64 from the L2 cache; the output, written once.
Flops: 54 * C * N for a place. Numerics: products of bfloat16 or float16 added in float32, then the bias, one rounding.
Has not run on a GPU; bench/README.md says what is predicted. tests/kernels/test_causal_conv.py plays it on a CPU.
Oracle: ``reference.causal_conv``. Source: Chetlur et al., cuDNN (2014), section 3; Wan 2.1 wan/modules/vae.py.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common import require_contiguous
from ..gpus import multiprocessors
from ..prepared import Blocks, Prepared, keep
from ..warpgroup import load_block, operand_layout, product_layout

HEIGHT, WIDTH = gl.constexpr(8), gl.constexpr(16)  # places of a tile
ROWS = gl.constexpr(64)  # of them, a warpgroup's
DEPTH = gl.constexpr(32)  # input channels of a step
STAGES = gl.constexpr(3)
SUMS = 384  # most columns of a warpgroup's accumulators: 192 of a thread's 240 registers


class Tiling(NamedTuple):
    """The tile of a launch: output channels, in two powers of two of which the second may be 0, and frames."""

    wide: int
    rest: int
    frames: int


class Grid(NamedTuple):
    """How many tiles there are, and what they cut: each video's frames, height and width."""

    tiles: object
    frames: object
    height: object
    width: object


class Tile(NamedTuple):
    """Where a tile begins."""

    batch: object
    frame: object
    row: object
    column: object
    channel: object


class Ring(NamedTuple):
    """What STAGES steps bring, and the barriers of each step: one arrival and its bytes fill it, two free it."""

    buffer: object  # [STAGES * (FRAMES + 2)] tiles of one frame
    wide: object  # [STAGES * 3, WIDE, DEPTH] weights
    rest: object  # [STAGES * 3, REST, DEPTH]; ``wide`` again where there is none
    full: object
    free: object


class Descriptors(NamedTuple):
    """TMA descriptors of the buffer and, for WIDE and for REST channels, of the weights."""

    buffer: object
    wide: object
    rest: object


@gluon.jit
def find_tile(index, grid, N: gl.constexpr, FRAMES: gl.constexpr, COLUMNS: gl.constexpr):
    """The tiles of the same places follow on each other, then those beside them: they share what the L2 cache holds."""
    PARTS: gl.constexpr = N // COLUMNS
    rows, columns = (grid.height + HEIGHT - 1) // HEIGHT, (grid.width + WIDTH - 1) // WIDTH
    spans = (grid.frames + FRAMES - 1) // FRAMES
    part, index = index % PARTS, index // PARTS
    column, index = index % columns, index // columns
    row, index = index % rows, index // rows
    span, batch = index % spans, index // spans
    return Tile(batch, span * FRAMES, row * HEIGHT, column * WIDTH, part * COLUMNS)


@gluon.constexpr_function
def output_layout(columns):
    """How its registers hold 64 rows that are stored, 16 bytes of a row to a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def produce(
    descriptors, ring, grid,
    C: gl.constexpr, N: gl.constexpr, FRAMES: gl.constexpr, WIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """The fetching warp: all steps of all tiles of this program."""
    SEEN: gl.constexpr = FRAMES + 2
    n = 0
    for index in range(gl.program_id(0), grid.tiles, gl.num_programs(0)):
        tile = find_tile(index, grid, N, FRAMES, WIDE + REST)
        frame = tile.batch * (grid.frames + 2) + tile.frame  # the last tile's may be another video's: never stored
        for tap in range(9):
            row, column = tile.row + tap // 3 - 1, tile.column + tap % 3 - 1
            for channel in range(0, C, DEPTH):
                stage = n % STAGES
                full = ring.full.index(stage)
                mbarrier.wait(ring.free.index(stage), (n // STAGES & 1) ^ 1)
                mbarrier.expect(full, (SEEN * HEIGHT * WIDTH + 3 * (WIDE + REST)) * DEPTH * 2)
                for i in gl.static_range(SEEN):
                    place = [frame + i, row, column, channel]
                    load_block(descriptors.buffer, place, full, ring.buffer.index(stage * SEEN + i))
                for i in gl.static_range(3):
                    place = [tile.channel, 9 * i + tap, channel]
                    load_block(descriptors.wide, place, full, ring.wide.index(stage * 3 + i))
                    if REST > 0:
                        place = [tile.channel + WIDE, 9 * i + tap, channel]
                        load_block(descriptors.rest, place, full, ring.rest.index(stage * 3 + i))
                n += 1


@gluon.jit
def multiply(
    ring, stage, sums, FIRST: gl.constexpr, LAST: gl.constexpr,
    HALF: gl.constexpr, FRAMES: gl.constexpr, WIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Add the products of the step's frames FIRST to LAST - 1; sums: of each frame, WIDE and then REST channels."""
    SEEN: gl.constexpr = FRAMES + 2
    EACH: gl.constexpr = 2 if REST > 0 else 1
    left = ()
    for i in gl.static_range(FIRST, LAST):
        places = ring.buffer.index(stage * SEEN + i).reshape([HEIGHT * WIDTH, DEPTH])
        left = left + (places.slice(HALF * ROWS, ROWS).load(operand_layout(WIDE)),)  # type: ignore[assignment]
    for i in gl.static_range(FIRST, LAST):
        for t in gl.static_range(FRAMES):
            if t <= i and i <= t + 2:  # frame t of the tile sees it
                weight = ring.wide.index(stage * 3 + (i - t)).permute((1, 0))
                total = warpgroup_mma(left[i - FIRST], weight, sums[EACH * t], is_async=True)
                sums = sums[: EACH * t] + (total,) + sums[EACH * t + 1 :]
                if REST > 0:
                    weight = ring.rest.index(stage * 3 + (i - t)).permute((1, 0))
                    total = warpgroup_mma(left[i - FIRST], weight, sums[EACH * t + 1], is_async=True)
                    sums = sums[: EACH * t + 1] + (total,) + sums[EACH * t + 2 :]
    if EACH * FRAMES == 1:  # a wait for one thing returns it bare
        return (warpgroup_mma_wait(0, deps=sums),)
    else:
        return warpgroup_mma_wait(0, deps=sums)


@gluon.jit
def store(
    total, bias_ptr, out_ptr, grid, tile, t: gl.constexpr, CHANNEL: gl.constexpr, HALF: gl.constexpr,
    N: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Add the bias to an accumulator, round and store it: frame t of the tile, COLUMNS channels from CHANNEL on."""
    channel = tile.channel + CHANNEL + gl.arange(0, COLUMNS, gl.SliceLayout(0, product_layout(COLUMNS)))
    total += gl.load(bias_ptr + channel).to(gl.float32)[None, :]
    rounded = gl.convert_layout(total.to(out_ptr.dtype.element_ty), output_layout(COLUMNS))
    place = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, output_layout(COLUMNS)))
    channel = gl.arange(0, COLUMNS, gl.SliceLayout(0, output_layout(COLUMNS)))
    frame, row, column = tile.frame + t, tile.row + place // WIDTH, tile.column + place % WIDTH
    offs = ((tile.batch * grid.frames + frame) * grid.height + row).to(gl.int64) * grid.width + column
    mask = (frame < grid.frames) & (row < grid.height) & (column < grid.width)
    gl.store(out_ptr + tile.channel + CHANNEL + offs[:, None] * N + channel[None, :], rounded, mask=mask[:, None])


@gluon.jit
def consume(
    ring, bias_ptr, out_ptr, grid, HALF: gl.constexpr,
    C: gl.constexpr, N: gl.constexpr, FRAMES: gl.constexpr, WIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: the first (HALF 0) or last (1) 64 places of every tile of this program."""
    SEEN: gl.constexpr = FRAMES + 2
    EACH: gl.constexpr = 2 if REST > 0 else 1
    GROUP: gl.constexpr = 2 if FRAMES * (WIDE + REST) > 288 else 3  # frames whose left factors find registers
    begin = 0
    for index in range(gl.program_id(0), grid.tiles, gl.num_programs(0)):
        sums = ()
        for _ in gl.static_range(FRAMES):
            sums = sums + (gl.zeros([ROWS, WIDE], gl.float32, product_layout(WIDE)),)  # type: ignore[assignment]
            if REST > 0:
                rest = gl.zeros([ROWS, REST], gl.float32, product_layout(REST))
                sums = sums + (rest,)  # type: ignore[assignment]
        for n in range(begin, begin + 9 * C // DEPTH):
            stage = n % STAGES
            mbarrier.wait(ring.full.index(stage), n // STAGES & 1)
            for first in gl.static_range(0, SEEN, GROUP):
                sums = multiply(ring, stage, sums, first, min(first + GROUP, SEEN), HALF, FRAMES, WIDE, REST)
            mbarrier.arrive(ring.free.index(stage), count=1)
        begin += 9 * C // DEPTH
        tile = find_tile(index, grid, N, FRAMES, WIDE + REST)
        for t in gl.static_range(FRAMES):
            store(sums[EACH * t], bias_ptr, out_ptr, grid, tile, t, 0, HALF, N, WIDE)
            if REST > 0:
                store(sums[EACH * t + 1], bias_ptr, out_ptr, grid, tile, t, WIDE, HALF, N, REST)


@gluon.jit
def _causal_conv_hopper(
    bias_ptr, out_ptr, buffer, wide, rest,
    tiles, frames, height, width,
    C: gl.constexpr, N: gl.constexpr, FRAMES: gl.constexpr, WIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    # one program per SM, in three roles, goes through its tiles
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    deep: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=4)
    fetched = gl.allocate_shared_memory(dtype, [STAGES * (FRAMES + 2), 1, HEIGHT, WIDTH, DEPTH], deep)
    wide_weights = gl.allocate_shared_memory(dtype, [STAGES * 3, WIDE, DEPTH], flat)
    rest_weights = wide_weights
    if REST > 0:
        rest_weights = gl.allocate_shared_memory(dtype, [STAGES * 3, REST, DEPTH], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(STAGES):
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(free.index(b), count=2)
    fence_async_shared()  # TMA meets the barriers through the asynchronous proxy

    ring = Ring(fetched, wide_weights, rest_weights, full, free)
    grid = Grid(tiles, frames, height, width)
    gl.warp_specialize(
        [
            (consume, (ring, bias_ptr, out_ptr, grid, 0, C, N, FRAMES, WIDE, REST)),
            (consume, (ring, bias_ptr, out_ptr, grid, 1, C, N, FRAMES, WIDE, REST)),
            (produce, (Descriptors(buffer, wide, rest), ring, grid, C, N, FRAMES, WIDE, REST)),
        ],
        [4, 1],
        [240, 24],
    )


def causal_conv_hopper(buffer: Tensor, weight: Tensor, bias: Tensor, *, programs: int | None = None) -> Tensor:
    """Convolve over this frame and the two before, on a GPU of compute capability 9.0.

    Args:
        buffer: [B, T + 2, H, W, C], bfloat16 or float16: two frames of the past, then the frames to convolve.
        weight: [N, C, 3, 3, 3], of that dtype, channels last in memory. C and N are multiples of 32.
        bias: [N].
        programs: That run side by side. Default: one for each multiprocessor.

    Returns:
        [B, T, H, W, N]. Nothing waits for the GPU.

    Raises:
        ValueError: A tensor's shape, dtype or memory is another.
    """
    outputs, inputs, *kernel = weight.shape
    if why := unfit_channels(inputs, outputs, tuple(kernel)):
        raise ValueError(why)
    if buffer.dtype != weight.dtype or buffer.dtype.itemsize != 2:
        raise ValueError(f"buffer and weight must be bfloat16 or float16, got {buffer.dtype} and {weight.dtype}")
    if buffer.dim() != 5 or buffer.shape[1] < 3 or buffer.shape[-1] != weight.shape[1]:
        expected = f"[B, T + 2, H, W, {weight.shape[1]}] with T of 1 or more"
        raise ValueError(f"buffer must be {expected}, got {list(buffer.shape)}")
    taps = weight.movedim(1, -1)  # [N, 3, 3, 3, C]
    require_contiguous(buffer=buffer, weight=taps, bias=bias)
    batch, seen, height, width, _ = buffer.shape
    out = buffer.new_empty(batch, seen - 2, height, width, weight.shape[0])
    programs = programs or multiprocessors(buffer.device)
    launch, blocks, wide, rest = prepare(*buffer.shape, weight.shape[0], programs, buffer.dtype, bias.dtype)
    launch(bias, out, blocks.of(buffer), wide.of(taps), rest.of(taps))
    return out


@keep
def prepare(
    batch: int, seen: int, height: int, width: int, inputs: int, outputs: int, programs: int, dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Prepared, Blocks, Blocks, Blocks]:  # fmt: skip
    """The launch for a buffer of that shape, and how the buffer, WIDE and REST channels of weights are read."""
    count = seen - 2
    wide, rest, frames = choose_tiling(count, outputs)
    places = triton.cdiv(height, HEIGHT.value) * triton.cdiv(width, WIDTH.value)
    tiles = batch * triton.cdiv(count, frames) * places * (outputs // (wide + rest))
    launch = Prepared(
        _causal_conv_hopper, (min(programs, tiles),), (tiles, count, height, width),
        {"C": inputs, "N": outputs, "FRAMES": frames, "WIDE": wide, "REST": rest},
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    layout = lambda rank: gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=rank)
    block = [1, HEIGHT.value, WIDTH.value, DEPTH.value]
    blocks = Blocks(TensorDescriptor, dtype, (batch * seen, height, width, inputs), block, layout(4))

    def weights(columns: int) -> Blocks:
        return Blocks(TensorDescriptor, dtype, (outputs, 27, inputs), [columns, 1, DEPTH.value], layout(3))

    return launch, blocks, weights(wide), weights(rest or wide)


def choose_tiling(count: int, outputs: int) -> Tiling:
    """The tile for so many frames and output channels: the widest that divides them, then the cheapest in frames."""
    widths = ((128, 0), (128, 64), (64, 32), (64, 0), (32, 0))
    wide, rest = next(each for each in widths if outputs % sum(each) == 0)
    most = min(4, SUMS // (wide + rest))
    return Tiling(wide, rest, min(range(1, most + 1), key=lambda frames: (cost(count, frames, wide + rest), frames)))


def cost(count: int, frames: int, columns: int) -> float:
    """Clocks of a step of all tiles in time: of its products, or of its bytes at 32 a clock, whichever are more."""
    places = HEIGHT.value * WIDTH.value
    products = 3 * frames * places * columns * DEPTH.value / 2048
    fetched = ((frames + 2) * places + 3 * columns) * DEPTH.value * 2 / 32
    return triton.cdiv(count, frames) * max(products, fetched)


def unfit_channels(inputs: int, outputs: int, kernel: tuple[int, ...]) -> str | None:
    """Why the kernel does not take a convolution; None where it does."""
    if kernel != (3, 3, 3):
        return f"the kernel must be 3x3x3, got {'x'.join(map(str, kernel))}"
    if inputs % DEPTH.value or outputs % DEPTH.value:
        return f"channels must be multiples of {DEPTH.value}, got {inputs} in and {outputs} out"
    return None
