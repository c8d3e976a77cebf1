"""What both attention kernels share around the work: sizes and buffers of a call, stored rows, merged fragments.

If several programs computed a tile, each leaves a fragment of it in the workspace: accumulator, pivot and sum of every
row, float32, not yet divided. ``_merge`` adds them in the order of their key frames and writes the output, so that
results repeat bit for bit. Bytes: (D + 2) * 4 a row, written and read once, at most two fragments a program.
Numerics: float32, one rounding at the store. Oracle: ``reference.frame_attention``, of which this is the last step.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LN_2, LOG2_E, cast, require_contiguous
from ..gpus import multiprocessors
from ..prepared import Prepared
from .work import Outputs, Sizes, find_rows, owner, share


@triton.jit
def store_rows(
    outputs, acc, m_i, l_i, batch, head, offs_m, mask_m, frames, heads,
    S: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Divide by the sum and store a tile's rows in the output; rows that saw no key become 0 and -inf."""
    seen = tl.where(l_i > 0, l_i, 1.0)
    rows = (batch.to(tl.int64) * frames * S + offs_m) * heads + head
    out = cast(acc / seen[:, None], outputs.out_ptr.dtype.element_ty)
    tl.store(outputs.out_ptr + rows[:, None] * D + tl.arange(0, D)[None, :], out, mask=mask_m[:, None])
    if HAS_LSE:
        rows = ((batch.to(tl.int64) * frames + offs_m // S) * heads + head) * S + offs_m % S
        tl.store(outputs.lse_ptr + rows, (m_i + tl.math.log2(seen)) * LN_2, mask=mask_m)


@triton.jit
def store_fragment(outputs, acc, m_i, l_i, fragment, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Store the rows of a cut tile's fragment in the workspace, for ``_merge``."""
    rows = fragment.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(outputs.acc_ptr + rows[:, None] * D + tl.arange(0, D)[None, :], acc)
    tl.store(outputs.sums_ptr + 2 * rows, m_i)
    tl.store(outputs.sums_ptr + 2 * rows + 1, l_i)


@triton.jit
def store_item(
    item, sizes, outputs, acc, m_i, l_i,
    S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Store rows that met every key frame in the output, those of a cut tile in the workspace."""
    if item.end - item.begin == sizes.read:
        offs_m = item.row + tl.arange(0, BLOCK_M)
        store_rows(
            outputs, acc, m_i, l_i, item.batch, item.head, offs_m, offs_m < item.stop,
            sizes.frames, sizes.heads, S, D, HAS_LSE,
        )  # fmt: skip
    else:
        store_fragment(outputs, acc, m_i, l_i, item.fragment, D, BLOCK_M)


@triton.jit
def _merge(
    out_ptr, lse_ptr, acc_ptr, sums_ptr, tiles, spans, frames, read, programs, heads,
    S: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    # one program per ROWS rows of a tile that was cut; adds its fragments in the order of their key frames
    outputs = Outputs(out_ptr, lse_ptr, acc_ptr, sums_ptr)
    cut = tl.program_id(0)
    waves, units = tiles // programs, tiles % programs * read
    first, last = owner(cut * read, programs, units), owner(cut * read + read - 1, programs, units)
    if first < last:
        batch, head, row, stop = find_rows(waves * programs + cut, heads, spans, SPAN, BLOCK_M)
        offs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
        l_i = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for program in range(first, last + 1):
            begin, end = share(program, programs, units), share(program + 1, programs, units)
            if begin < end:
                rows = (2 * program + cut - begin // read).to(tl.int64) * BLOCK_M + offs
                m_next, l_next = tl.load(sums_ptr + 2 * rows), tl.load(sums_ptr + 2 * rows + 1)
                m_new = tl.maximum(m_i, m_next)
                pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
                alpha, beta = tl.math.exp2(m_i - pivot), tl.math.exp2(m_next - pivot)
                acc_next = tl.load(acc_ptr + rows[:, None] * D + tl.arange(0, D)[None, :])
                acc = acc * alpha[:, None] + acc_next * beta[:, None]
                l_i = l_i * alpha + l_next * beta
                m_i = m_new
        offs_m = row + offs
        store_rows(outputs, acc, m_i, l_i, batch, head, offs_m, offs_m < stop, frames, heads, S, D, HAS_LSE)


class Constants(TypedDict):
    """The constexpr arguments that all attention kernels take."""

    S: int
    T: int
    D: int
    SPAN: int
    CROSSES: bool  # a tile may hold rows of two frames
    HAS_BIAS: bool
    HAS_LSE: bool


class Shapes(NamedTuple):
    """What a launch of attention follows from, beside its tile: the key under which launches are kept."""

    query: torch.Size  # [B, F, S, H, D]
    turn: torch.Size  # [F, R, G, T, 2]
    pages: int  # of a layer, per video
    has_bias: bool
    want_lse: bool
    programs: int  # that run side by side
    dtypes: tuple[torch.dtype, ...]  # of query and pages, slots, turn, logit_scale


class Results(NamedTuple):
    """What one call writes, allocated for it. acc, sums: float32, fragments of cut tiles, two a program."""

    out: Tensor  # [B, F, S, H, D]
    lse: Tensor | None  # float32 [B, F, H, S]
    acc: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What all calls of the same shapes have in common: sizes, constants, and how fragments are merged.

    fragment_rows: of the workspace.
    numbers: arguments of the attention kernels between pointers and constants.
    """

    shapes: Shapes
    programs: int
    block_m: int
    fragment_rows: int
    numbers: tuple[float, ...]
    constants: Constants
    merging: Prepared | None

    def allocate(self, query: Tensor) -> Results:
        """Results and workspace of one call, from the allocator of the current stream."""
        batch, frames, tokens, heads, dim = self.shapes.query
        rows, lse = self.fragment_rows, None
        if self.shapes.want_lse:
            lse = query.new_empty((batch, frames, heads, tokens), dtype=torch.float32)
        acc = query.new_empty((rows, dim), dtype=torch.float32)
        return Results(torch.empty_like(query), lse, acc, query.new_empty((rows, 2), dtype=torch.float32))

    def merge(self, results: Results) -> None:
        """Add the fragments of the tiles that were cut, if any were."""
        if self.merging is not None:
            self.merging(*results)


def validate_inputs(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError if a tensor is not contiguous, or if query and pages differ in dtype."""
    require_contiguous(
        query=query, key_pages=key_pages, value_pages=value_pages, slots=slots, turn=turn, logit_scale=logit_scale,
        bias=bias,
    )  # fmt: skip
    if not query.dtype == key_pages.dtype == value_pages.dtype:
        found = f"{query.dtype}, {key_pages.dtype}, {value_pages.dtype}"
        raise ValueError(f"query, key_pages and value_pages must have one dtype, got {found}")


def shapes_of(
    query: Tensor, key_pages: Tensor, slots: Tensor, turn: Tensor, logit_scale: Tensor, bias: Tensor | None, *,
    want_lse: bool, programs: int | None,
) -> Shapes:  # fmt: skip
    """The key of a call; one program per multiprocessor where ``programs`` is None."""
    dtypes = query.dtype, slots.dtype, turn.dtype, logit_scale.dtype, *(() if bias is None else (bias.dtype,))
    programs = programs or multiprocessors(query.device)
    return Shapes(query.shape, turn.shape, key_pages.shape[1], bias is not None, want_lse, programs, dtypes)


def product_rows(keys: int) -> int:
    """Rows of a product with so many keys: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(keys))


def prepare_launch(shapes: Shapes, *, block_m: int, least_m: int = 16) -> Launch:
    """Choose the rows of a tile and the grid.

    A span is a run of query rows that no tile crosses: all F * S rows of a head, or one frame's S rows if there is a
    bias (a hidden frame must be hidden for the whole tile). A tile meets two frames at most.

    Args:
        shapes: Of the call.
        block_m: rows of a tile at most; fewer where a span is shorter.
        least_m: the fewest rows that the kernel can do.
    """
    batch, frames, tokens, heads, dim = shapes.query
    read, groups, time = shapes.turn[1:4]
    is_one_span = not shapes.has_bias and (frames == 1 or block_m <= tokens + 1)
    span = frames * tokens if is_one_span else tokens
    block_m = min(block_m, max(least_m, triton.next_power_of_2(span)))
    spans = frames * tokens // span
    tiles = batch * heads * spans * triton.cdiv(span, block_m)
    programs = min(shapes.programs, tiles * read)
    cut, rows = tiles % programs, min(block_m, 32)
    merging = None
    if cut:
        constants = {"S": tokens, "D": dim, "SPAN": span, "BLOCK_M": block_m, "ROWS": rows, "HAS_LSE": shapes.want_lse}
        merging = Prepared(
            _merge, (cut, block_m // rows), (tiles, spans, frames, read, programs, heads), constants,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return Launch(
        shapes=shapes,
        programs=programs,
        block_m=block_m,
        fragment_rows=2 * programs * block_m if cut else 1,
        numbers=(LOG2_E.value / dim**0.5, *Sizes(tiles, spans, frames, read, shapes.pages, heads, groups)),
        constants=Constants(
            S=tokens, T=time, D=dim, SPAN=span, CROSSES=is_one_span and frames > 1,
            HAS_BIAS=shapes.has_bias, HAS_LSE=shapes.want_lse,
        ),
        merging=merging,
    )  # fmt: skip
