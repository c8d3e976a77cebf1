"""Attention over listed pages of the cache, every key frame at its own temporal distance, in one pass.

    logit[q, k] = logit_scale[f] * <R(turn[f, r]) q, k> / sqrt(D) + bias[f, r]    q in frame f, k in the page of frame r
    out = softmax(logit) v

The query tile is turned once per key frame instead of every key tile: 2 * D * BLOCK_M multiplications and additions
against 4 * S * D * BLOCK_M, and outside the loop over keys. Each program reads the pages of its own query tile only.

Bytes: keys and values 2 * R * S * C * itemsize, query and output 2 * F * S * C * itemsize; fragments of cut tiles,
float32. Flops: 4 * F * S * R * S * C.
Numerics: q is turned and scaled in float32, from the unturned query each time, and rounded once; scores, base-2 softmax
and accumulation in float32; P rounded to the value's dtype. Shapes and number of programs fix the order of every sum.
Oracle: ``reference.frame_attention``. Source: Wan 2.1 self-attention; the online softmax of FlashAttention-2.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import INTERPRETED, LOG2_E, cast
from ..gpus import multiprocessors
from ..prepared import Blocks, Prepared, keep
from .launch import Launch, Shapes, prepare_launch, product_rows, shapes_of, store_item, validate_inputs
from .select import PathName, choose_tile
from .tiles import Config
from .work import Outputs, Sizes, Tables, count_items, take_item


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_turn(tables, frame, key_frame, item, sizes, T: tl.constexpr, PAIRS: tl.constexpr):
    """(cos, sin) [1, PAIRS] for a query frame that meets a key frame, times the query frame's logit_scale."""
    pair = tl.arange(0, PAIRS)
    turn_ptr = tables.turn_ptr
    turn_ptr += ((frame * sizes.read + key_frame) * sizes.groups + item.head % sizes.groups) * (2 * T)
    scale = tl.load(tables.scale_ptr + frame)
    cos = tl.load(turn_ptr + 2 * pair, mask=pair < T, other=1.0)
    sin = tl.load(turn_ptr + 2 * pair + 1, mask=pair < T, other=0.0)
    return (cos * scale)[None, :], (sin * scale)[None, :]


@triton.jit
def load_query(query_ptr, item, sizes, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Real and imaginary channels of the item's rows [BLOCK_M, D / 2], zeros after its last row."""
    channels = sizes.heads * D
    rows = query_ptr + (item.batch.to(tl.int64) * sizes.frames * S + item.row) * channels + item.head * D
    offs_m = tl.arange(0, BLOCK_M)
    ptr = rows + offs_m[:, None] * channels + tl.arange(0, D // 2)[None, :]
    mask_m = (item.row + offs_m < item.stop)[:, None]
    real = tl.load(ptr, mask=mask_m, other=0.0).to(tl.float32)
    imag = tl.load(ptr + D // 2, mask=mask_m, other=0.0).to(tl.float32)
    return real, imag


@triton.jit
def load_turns(
    tables, key_frame, item, sizes,
    S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """(cos, sin) [BLOCK_M or 1, D / 2] by which the item's rows turn before they meet a key frame."""
    cos, sin = load_turn(tables, item.frame, key_frame, item, sizes, T, D // 2)
    if CROSSES:  # rows past the frame's end belong to the next one
        next_frame = tl.minimum(item.frame + 1, sizes.frames - 1)
        next_cos, next_sin = load_turn(tables, next_frame, key_frame, item, sizes, T, D // 2)
        is_next = (item.row + tl.arange(0, BLOCK_M) >= (item.frame + 1) * S)[:, None]
        cos, sin = tl.where(is_next, next_cos, cos), tl.where(is_next, next_sin, sin)
    return cos, sin


@triton.jit
def turned_query(
    query_ptr, tables, key_frame, item, sizes,
    S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """The item's query [BLOCK_M, D], turned for one key frame and rounded once."""
    real, imag = load_query(query_ptr, item, sizes, S, D, BLOCK_M)
    cos, sin = load_turns(tables, key_frame, item, sizes, S, T, D, BLOCK_M, CROSSES)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    turned = tl.join(cast(real * cos - imag * sin, dtype), cast(real * sin + imag * cos, dtype))
    return turned.permute(0, 2, 1).reshape(BLOCK_M, D)


@triton.jit
def load_page(
    pages, page, start, column, channels, S: tl.constexpr, D: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr
):
    """N tokens of a page [N, D] from ``start``, zeros after the frame's end: a neighbour's NaN cannot leak in."""
    if TMA:
        return pages.load([page, start, column]).reshape(N, D)
    else:
        offs_n = start + tl.arange(0, N)
        rows = pages + page.to(tl.int64) * (S * channels) + offs_n[:, None] * channels
        return tl.load(rows + (column + tl.arange(0, D))[None, :], mask=(offs_n < S)[:, None], other=0.0)


@triton.jit
def softmax_step(score, value, acc, m_i, l_i, log2_scale):
    """Add one tile of keys to the running softmax: accumulator, pivot and sum, in base 2."""
    m_new = tl.maximum(m_i, tl.max(score, 1) * log2_scale)
    p = tl.math.exp2(score * log2_scale - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    acc = dot(cast(p, value.dtype), value, acc * alpha[:, None])
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _frame_attention(
    query_ptr, out_ptr, lse_ptr, acc_ptr, sums_ptr, turn_ptr, scale_ptr, bias_ptr, slot_ptr,
    keys, values, last_keys, last_values,
    log2_scale, tiles, spans, frames, read, pages, heads, groups,
    S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, CROSSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # one program per SM goes through its items: a tile of query rows and a range of key frames each
    sizes = Sizes(tiles, spans, frames, read, pages, heads, groups)
    tables = Tables(turn_ptr, scale_ptr, bias_ptr, slot_ptr)
    outputs = Outputs(out_ptr, lse_ptr, acc_ptr, sums_ptr)
    channels = heads * D
    FULL: tl.constexpr = S // BLOCK_N * BLOCK_N
    for index in range(0, count_items(tl.program_id(0), tl.num_programs(0), sizes.tiles, sizes.read)):
        item = take_item(index, sizes, S, SPAN, BLOCK_M)
        column = item.head * D
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        # carried through the loop over frames: only so does the compiler keep it in shared memory, where wgmma reads it
        q = turned_query(query_ptr, tables, item.begin, item, sizes, S, T, D, BLOCK_M, CROSSES)
        for key_frame in tl.range(item.begin, item.end):
            page = item.batch * sizes.pages + tl.load(tables.slot_ptr + key_frame)
            tokens = S
            if HAS_BIAS:  # the same for the whole frame: the pivot moves instead of the scores
                bias = tl.load(tables.bias_ptr + item.frame * sizes.read + key_frame) * LOG2_E
                tokens = tl.where(bias > float("-inf"), S, 0)
                bias = tl.where(bias > float("-inf"), bias, 0.0)
                m_i -= bias
            for start in tl.range(0, tokens // BLOCK_N * BLOCK_N, BLOCK_N, num_stages=STAGES):
                k = load_page(keys, page, start, column, channels, S, D, BLOCK_N, TMA)
                score = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                v = load_page(values, page, start, column, channels, S, D, BLOCK_N, TMA)
                acc, m_i, l_i = softmax_step(score, v, acc, m_i, l_i, log2_scale)
            if LAST_N > 0 and tokens > 0:
                k = load_page(last_keys, page, FULL, column, channels, S, D, LAST_N, TMA)
                score = dot(q, k.T, tl.zeros([BLOCK_M, LAST_N], tl.float32))
                score = tl.where((FULL + tl.arange(0, LAST_N) < S)[None, :], score, float("-inf"))
                v = load_page(last_values, page, FULL, column, channels, S, D, LAST_N, TMA)
                acc, m_i, l_i = softmax_step(score, v, acc, m_i, l_i, log2_scale)
            if HAS_BIAS:
                m_i += bias
            following = tl.minimum(key_frame + 1, sizes.read - 1)
            q = turned_query(query_ptr, tables, following, item, sizes, S, T, D, BLOCK_M, CROSSES)

        store_item(item, sizes, outputs, acc, m_i, l_i, S, D, BLOCK_M, HAS_LSE)


def frame_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    turn: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None = None,
    *,
    want_lse: bool = False,
    config: Config | None = None,
    path: PathName | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the listed pages. Enqueues the kernels on the current stream; nothing waits for the GPU.

    Args:
        query: [B, F, S, H, D] in float32, bfloat16 or float16, as ``norm_rope_write`` returns it.
        key_pages, value_pages: [B, P, S, H, D] in the query's dtype.
        slots: [R] int32, the pages to read.
        turn: [F, R, G, T, 2] float32, cosine and sine of the phase of the query frame minus that of the key frame.
        logit_scale: [F] float32, a factor on the logits.
        bias: [F, R] float32, added to the logits; -inf hides a frame, which is then not read.
        want_lse: return the log-sum-exp of the logits too.
        config: a tile of the portable kernel other than the selected one.
        path: "portable" or "hopper", where it must be that kernel; the one that select.py names if None.
        programs: how many run side by side; as many as the tile wants on each multiprocessor if None.

    Returns:
        The output [B, F, S, H, D], and the log-sum-exp [B, F, H, S] in float32, or None if it is not wanted.

    Raises:
        ValueError: if a tensor is not contiguous, dtypes differ, or the kernel that is asked for cannot run there.
        NotImplementedError: if no kernel takes that GPU, head dim or dtype.
    """
    inputs = query, key_pages, value_pages, slots, turn, logit_scale, bias
    config = choose_tile(query, config, path)
    if config is None:
        from .hopper import frame_attention_hopper  # Gluon, which only this path needs

        return frame_attention_hopper(*inputs, want_lse=want_lse, programs=programs)
    validate_inputs(*inputs)
    programs = programs or config.per_sm * multiprocessors(query.device)
    shapes = shapes_of(query, key_pages, slots, turn, logit_scale, bias, want_lse=want_lse, programs=programs)
    launch, attend, blocks = prepare(shapes, config)
    results = launch.allocate(query)
    described = [of.of(pages) if of else pages for of in blocks for pages in (key_pages, value_pages)]
    attend(query, *results, turn, logit_scale, bias, slots, *described)
    launch.merge(results)
    return results.out, results.lse


@keep
def prepare(shapes: Shapes, config: Config) -> tuple[Launch, Prepared, tuple[Blocks | None, Blocks | None]]:
    """The launch, the kernel, and how whole and last tiles of pages are read: None by pointers."""
    launch = prepare_launch(shapes, block_m=config.block_m)
    batch, _, tokens, heads, dim = shapes.query
    left = tokens % config.block_n
    last_n = product_rows(left) if left else 0
    constants = {
        **launch.constants, "BLOCK_M": launch.block_m, "BLOCK_N": config.block_n, "LAST_N": last_n,
        "STAGES": config.num_stages, "TMA": config.tma,
    }  # fmt: skip
    attend = Prepared(
        _frame_attention, (launch.programs,), launch.numbers, constants,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip

    def blocks(rows: int) -> Blocks | None:
        if not (config.tma and rows):
            return None
        described = batch * shapes.pages, tokens, heads * dim
        return Blocks(TensorDescriptor, shapes.dtypes[0], described, [1, rows, dim])

    return launch, attend, (blocks(config.block_n), blocks(last_n))
