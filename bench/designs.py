"""An attention to be measured: its inputs, what is right, and three ways to bring the temporal turn to the keys.

Every page is listed, in a shuffled order, so that a library reads keys and values where they are, in page order:
softmax does not depend on the order, and nobody pays for a gather. A library's queries come turned, at no charge.

    fused                 ``frame_attention``: the query tile is turned once per key frame, keys are read as they are
    turned once a chunk   old keys are turned into scratch once for the PASSES passes of a chunk, new ones at every pass
    turned every pass     all keys are turned into scratch, then a library's attention
    research              query and all keys are turned in complex128, then flash attention, as published code does
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from harness import Truth
from torch import Tensor

from flexkern.kernels import reference

PASSES = 5  # four denoising steps and the clean one
SAMPLE = 32  # queries of a frame that are judged; the first and the last are among them
HEADS = {"1.3B": 12, "5B": 24, "14B": 40}
TOKENS = {"480p": 1560, "720p": 3600}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Wan's self-attention: a chunk of ``frames`` against ``read`` frames, the chunk's own included."""

    model: str
    size: str
    frames: int
    read: int
    tokens: int
    heads: int
    head_dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        b, f, r, s, h, d = self.batch, self.frames, self.read, self.tokens, self.heads, self.head_dim
        return f"{self.model} {self.size} B={b} F={f} R={r} S={s} H={h} D={d} {str(self.dtype)[6:]}"

    @property
    def bands(self) -> int:
        """Channel pairs that turn with time: 22 of 64 (``flexkern.plan.band_split``, which needs numpy)."""
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs // 3)

    @property
    def flops(self) -> int:
        """Two products: 4 * F * S * R * S * C."""
        return 4 * self.batch * self.frames * self.read * self.tokens**2 * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Keys and values of the window once, query and output: 2 bytes each."""
        return 2 * 2 * self.batch * (self.read + self.frames) * self.tokens * self.heads * self.head_dim


def shape(model: str, size: str, frames: int, read: int) -> Shape:
    return Shape(model=model, size=size, frames=frames, read=read, tokens=TOKENS[size], heads=HEADS[model])


# float16: the interpreter rounds it, but truncates bfloat16
TINY = Shape(model="tiny", size="test", frames=2, read=4, tokens=24, heads=2, head_dim=64, dtype=torch.float16)
# in order of value: a run that is cut off loses the last ones
SHORT = [
    *(shape("1.3B", "480p", frames, read) for read in (21, 12) for frames in (3, 1)),
    shape("14B", "480p", 3, 21),
    shape("5B", "720p", 3, 21),
    *(shape("1.3B", "480p", frames, read) for read in (9, 6) for frames in (3, 1)),
    shape("1.3B", "720p", 3, 21),
    shape("14B", "720p", 3, 12),
]
EVERY = [shape(m, size, f, r) for m in HEADS for size in TOKENS for f in (3, 1) for r in (21, 12, 9, 6)]


@triton.jit
def _turn_pages(
    page_ptr, out_ptr, slot_ptr, turn_ptr, rows, pages,
    T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program turns BLOCK (token, head) rows of one page
    frame = tl.program_id(1)
    page = tl.program_id(2) * pages + tl.load(slot_ptr + frame)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, D // 2)
    at = (page.to(tl.int64) * rows + offs)[:, None] * D + pair[None, :]
    mask = (offs < rows)[:, None]
    cos = tl.load(turn_ptr + (frame * T + pair) * 2, mask=pair < T, other=1.0)[None, :]
    sin = tl.load(turn_ptr + (frame * T + pair) * 2 + 1, mask=pair < T, other=0.0)[None, :]
    real = tl.load(page_ptr + at, mask=mask, other=0.0).to(tl.float32)
    imag = tl.load(page_ptr + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (real * cos - imag * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at + D // 2, (real * sin + imag * cos).to(out_ptr.dtype.element_ty), mask=mask)


def turn_pages(pages: Tensor, slots: Tensor, turn: Tensor, out: Tensor) -> None:
    """Write the listed pages, turned, to the same pages of ``out``: pages and out [B, P, S, H, D], turn [R, T, 2]."""
    batch, count, tokens, heads, dim = pages.shape
    rows, block = tokens * heads, 64
    _turn_pages[(triton.cdiv(rows, block), len(slots), batch)](
        pages, out, slots, turn, rows, count, T=turn.shape[1], D=dim, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )


def turns(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def interleave(x: Tensor) -> Tensor:
    """Channels from [all real | all imaginary] to the interleaved pairs of published code."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def research_turn(x: Tensor, time: Tensor, place: Tensor) -> Tensor:
    """x [B, N * S, H, D], interleaved, turned by time [N, T] and place [S, D / 2 - T], both complex128.

    Source: causal_rope_apply of Self-Forcing's wan/modules/causal_model.py; its table is built at every call too.
    """
    frames, tokens, heads = len(time), len(place), x.shape[2]
    turned = []
    for video in x:
        pairs = torch.view_as_complex(video.to(torch.float64).reshape(frames * tokens, heads, -1, 2))
        grids = time[:, None].expand(-1, tokens, -1), place[None].expand(frames, -1, -1)
        table = torch.cat(grids, dim=-1).reshape(frames * tokens, 1, -1)
        turned.append(torch.view_as_real(pairs * table).flatten(2))
    return torch.stack(turned).type_as(x)


class Problem:
    """Random inputs of one shape, all pages listed in a shuffled order, angles of an ordinary rotary embedding."""

    def __init__(self, shape: Shape, device: str):
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        pages = shape.batch, shape.read, shape.tokens, shape.heads, shape.head_dim
        chunk = shape.batch, shape.frames, *pages[2:]
        self.query = (2 * torch.randn(chunk, device=device)).to(shape.dtype)
        self.keys, self.values = (torch.randn(pages, device=device).to(shape.dtype) for _ in range(2))
        self.slots = torch.randperm(shape.read).int().to(device)
        theta = 10000.0 ** (-torch.arange(shape.bands, dtype=torch.float64, device=device) / shape.bands)
        self.key_angle = torch.arange(shape.read, device=device)[:, None] * theta
        self.query_angle = self.key_angle[-shape.frames :]
        self.logit_scale = torch.ones(shape.frames, device=device)
        kept = torch.linspace(0, shape.tokens - 1, min(SAMPLE, shape.tokens), device=device)
        self.kept = kept.round().long()

    @cached_property
    def turn(self) -> Tensor:
        return turns(self.query_angle[:, None] - self.key_angle)[:, :, None].contiguous()

    @cached_property
    def no_turn(self) -> Tensor:
        return turns(torch.zeros_like(self.query_angle[:, None] - self.key_angle))[:, :, None].contiguous()

    def arguments(self, turn: Tensor) -> tuple[Tensor, ...]:
        """The arguments of ``frame_attention``."""
        return self.query, self.keys, self.values, self.slots, turn, self.logit_scale

    def plan(self):
        """What a backend of flexkern needs beside query and pages, to gather and turn them itself."""
        from flexkern.plan import ChunkPlan  # needs numpy

        shape = self.shape
        return ChunkPlan(
            write_slots=self.slots[-shape.frames :], read_slots=self.slots, turn=self.turn,
            query_turn=turns(self.query_angle)[:, None].contiguous(),
            key_turn=turns(self.key_angle)[None, :, None].contiguous(),
            place_turn=torch.empty(shape.tokens, shape.head_dim // 2 - shape.bands, 2, device=self.device),
            logit_scale=self.logit_scale,
        )  # fmt: skip

    def sample(self, out: Tensor) -> Tensor:
        """The judged queries of an output; a fault anywhere else must at least not be infinite."""
        assert torch.isfinite(out).all(), "non-finite values"
        return out.view(self.query.shape)[:, :, self.kept]

    def truth(self, turn: Tensor) -> Truth:
        """The oracle at the sampled queries. Entitled: query turned and rounded once, P rounded as the values."""
        query = self.query[:, :, self.kept]
        wide = (x.double() for x in (query, self.keys, self.values))
        exact, _ = reference.frame_attention(*wide, self.slots, turn, self.logit_scale)
        outputs = []
        for f in range(self.shape.frames):
            scores = [self._scores(query[:, f], turn[f, r], slot) for r, slot in enumerate(self.slots.tolist())]
            scores = torch.cat(scores, dim=-1)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            values = self.values[:, self.slots.long()].flatten(1, 2).float()
            product = torch.einsum("bhqk,bkhd->bqhd", weights.to(self.values.dtype).float(), values)
            outputs.append(product / weights.sum(-1).transpose(1, 2).unsqueeze(-1))
        return Truth(exact=exact, entitled=torch.stack(outputs, dim=1).to(query.dtype))

    def _scores(self, query: Tensor, turn: Tensor, slot: int) -> Tensor:
        padded = reference.pad_turn(turn, self.shape.head_dim // 2)
        turned = reference.rotate(query.float(), padded).to(query.dtype).float()
        return torch.einsum("bqhd,bkhd->bhqk", turned, self.keys[:, slot].float()) / self.shape.head_dim**0.5

    @cached_property
    def ready(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as a library wants them, [B, tokens, H, D]: gathered and turned."""
        query, key = torch.empty_like(self.query), torch.empty_like(self.keys)
        every = torch.arange(self.shape.frames, dtype=torch.int32, device=self.device)
        turn_pages(self.query, every, turns(self.query_angle), query)
        turn_pages(self.keys, self.slots, turns(self.key_angle), key)
        return query.flatten(1, 2), key.flatten(1, 2), self.values.flatten(1, 2)

    def turned_every_pass(self, attend: Callable) -> Callable[[], Tensor]:
        query, _, value = self.ready
        scratch, turn = torch.empty_like(self.keys), turns(self.key_angle)

        def run() -> Tensor:
            turn_pages(self.keys, self.slots, turn, scratch)
            return attend(query, scratch.flatten(1, 2), value)

        return run

    def turned_once_a_chunk(self, attend: Callable) -> Callable[[], Tensor]:
        """One call is a chunk: PASSES attentions."""
        query, _, value = self.ready
        scratch, turn = torch.empty_like(self.keys), turns(self.key_angle)
        old = self.shape.read - self.shape.frames

        def run() -> Tensor:
            turn_pages(self.keys, self.slots[:old], turn[:old], scratch)
            for _ in range(PASSES):
                turn_pages(self.keys, self.slots[old:], turn[old:], scratch)
                out = attend(query, scratch.flatten(1, 2), value)
            return out

        return run

    def research(self, attend: Callable) -> Callable[[], Tensor]:
        query, key = interleave(self.query).flatten(1, 2), interleave(self.keys).flatten(1, 2)
        value = self.values.flatten(1, 2)
        one = torch.ones(self.shape.tokens, self.shape.head_dim // 2 - self.shape.bands, device=self.device)
        place = torch.polar(one.double(), torch.zeros_like(one.double()))
        by_page = torch.empty_like(self.key_angle)
        by_page[self.slots.long()] = self.key_angle
        times = [torch.polar(torch.ones_like(angle), angle) for angle in (self.query_angle, by_page)]
        return lambda: attend(research_turn(query, times[0], place), research_turn(key, times[1], place), value)
