"""What every kernel of frame_attention shares around its work: sizes and buffers of a call, rows, parts, their merging.

A tile that several programs computed lies in the workspace in parts: accumulator, pivot and sum of each row, float32,
not yet divided. ``_merge`` adds them in the order of their key frames and writes the output, so that results repeat bit
for bit. Bytes: (D + 2) * 4 a row, written and read once, at most two parts a program.
Numerics: float32, one rounding at the store. Oracle: ``reference.frame_attention``, of which this is the last step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cast
from .tiles import multiprocessors
from .work import Sizes, find_rows, owner, share


@triton.jit
def store_rows(
    out_ptr, lse_ptr, acc, m_i, l_i, batch, head, offs_m, mask_m, frames, heads,
    S: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Divide by the sum and leave a tile's rows in the output; rows that saw no key become 0 and -inf."""
    seen = tl.where(l_i > 0, l_i, 1.0)
    rows = (batch.to(tl.int64) * frames * S + offs_m) * heads + head
    out = cast(acc / seen[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * D + tl.arange(0, D)[None, :], out, mask=mask_m[:, None])
    if HAS_LSE:
        rows = ((batch.to(tl.int64) * frames + offs_m // S) * heads + head) * S + offs_m % S
        tl.store(lse_ptr + rows, (m_i + tl.math.log2(seen)) * 0.6931471805599453, mask=mask_m)


@triton.jit
def store_part(acc_ptr, sums_ptr, acc, m_i, l_i, part, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Leave the rows of a cut tile's part in the workspace, for ``_merge``."""
    rows = part.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(acc_ptr + rows[:, None] * D + tl.arange(0, D)[None, :], acc)
    tl.store(sums_ptr + 2 * rows, m_i)
    tl.store(sums_ptr + 2 * rows + 1, l_i)


@triton.jit
def close_item(
    item, sizes, out_ptr, lse_ptr, acc_ptr, sums_ptr, acc, m_i, l_i,
    S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Rows that met every key frame go to the output, those of a cut tile to the workspace."""
    if item.end - item.begin == sizes.read:
        offs_m = item.row + tl.arange(0, BLOCK_M)
        store_rows(
            out_ptr, lse_ptr, acc, m_i, l_i, item.batch, item.head, offs_m, offs_m < item.stop,
            sizes.frames, sizes.heads, S, D, HAS_LSE,
        )  # fmt: skip
    else:
        store_part(acc_ptr, sums_ptr, acc, m_i, l_i, item.part, D, BLOCK_M)


@triton.jit
def _merge(
    out_ptr, lse_ptr, acc_ptr, sums_ptr, tiles, spans, frames, read, programs, heads,
    S: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    # one program per ROWS rows of a tile that was left over; adds its parts in the order of their key frames
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
                m_part, l_part = tl.load(sums_ptr + 2 * rows), tl.load(sums_ptr + 2 * rows + 1)
                m_new = tl.maximum(m_i, m_part)
                pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
                alpha, beta = tl.math.exp2(m_i - pivot), tl.math.exp2(m_part - pivot)
                part = tl.load(acc_ptr + rows[:, None] * D + tl.arange(0, D)[None, :])
                acc = acc * alpha[:, None] + part * beta[:, None]
                l_i = l_i * alpha + l_part * beta
                m_i = m_new
        offs_m = row + offs
        store_rows(out_ptr, lse_ptr, acc, m_i, l_i, batch, head, offs_m, offs_m < stop, frames, heads, S, D, HAS_LSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One call: its sizes, outputs and workspace, as the kernels take them.

    out: [B, F, S, H, D]. lse: float32 [B, F, H, S] or None. acc, sums: float32, parts of cut tiles, two a program.
    sizes: tiles, spans, F, R, P, H, G. last_n: keys of a frame's last tile, 0 where whole tiles fill a frame.
    """

    out: Tensor
    lse: Tensor | None
    acc: Tensor
    sums: Tensor
    programs: int
    block_m: int
    last_n: int
    sizes: Sizes
    constants: dict

    def merge(self) -> None:
        """Add the parts of the tiles that were cut, if any were."""
        sizes = self.sizes
        if sizes.tiles % self.programs == 0:
            return
        rows = min(self.block_m, 32)
        taken = {name: self.constants[name] for name in ("S", "D", "SPAN", "HAS_LSE")}
        _merge[(sizes.tiles % self.programs, self.block_m // rows)](
            self.out, self.lse, self.acc, self.sums,
            sizes.tiles, sizes.spans, sizes.frames, sizes.read, self.programs, sizes.heads,
            **taken, BLOCK_M=self.block_m, ROWS=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def prepare_launch(
    query: Tensor, turn: Tensor, bias: Tensor | None, pages: int, *,
    block_m: int, block_n: int, least_m: int = 16, least_n: int = 16, want_lse: bool, programs: int | None,
) -> Launch:  # fmt: skip
    """Cut a call into tiles of at most block_m rows and block_n keys, least_m and least_n being what the kernel can do.

    Rows of one head go through all its frames, in one span, where a tile then meets two frames at most. With a bias no
    tile may cross a frame's edge, so that a hidden frame is hidden for a whole tile.
    """
    batch, frames, tokens, heads, dim = query.shape
    read, groups, time = turn.shape[1:4]
    is_one_span = bias is None and (frames == 1 or block_m <= tokens + 1)
    span = frames * tokens if is_one_span else tokens
    block_m = min(block_m, max(least_m, triton.next_power_of_2(span)))
    last_n = max(least_n, triton.next_power_of_2(tokens % block_n)) if tokens % block_n else 0
    spans = frames * tokens // span
    tiles = batch * heads * spans * triton.cdiv(span, block_m)
    programs = min(programs or multiprocessors(query.device), tiles * read)
    parts = 2 * programs * block_m if tiles % programs else 1
    float32 = dict(dtype=torch.float32, device=query.device)
    return Launch(
        out=torch.empty_like(query),
        lse=torch.empty(batch, frames, heads, tokens, **float32) if want_lse else None,
        acc=torch.empty(parts, dim, **float32),
        sums=torch.empty(parts, 2, **float32),
        programs=programs,
        block_m=block_m,
        last_n=last_n,
        sizes=Sizes(tiles, spans, frames, read, pages, heads, groups),
        constants=dict(
            S=tokens,
            T=time,
            D=dim,
            SPAN=span,
            CROSSES=is_one_span and frames > 1,
            BLOCK_N=block_n,
            LAST_N=last_n,
            HAS_BIAS=bias is not None,
            HAS_LSE=want_lse,
        ),  # fmt: skip
    )
