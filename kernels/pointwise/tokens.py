"""What the kernels that norm whole tokens share: the tile of a program, a frame's parameters, the modulated norm."""

import triton
import triton.language as tl


@triton.jit
def token_tile(frames, tokens, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's batch and frame, its channels and their mask, and offsets and mask of its BLOCK_S tokens of one
    frame in [B, F, S, C].
    """
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_s < tokens)[:, None] & mask_c[None, :]
    offs = ((batch * frames + frame) * tokens + offs_s)[:, None] * CHANNELS + offs_c[None, :]
    return batch, frame, offs_c, mask_c, offs, mask


@triton.jit
def load_row(ptr, batch, frame, stride_b, stride_f, offs_c, mask_c):
    """A frame's row of a tensor [B, F, C], in float32."""
    return tl.load(ptr + batch * stride_b + frame * stride_f + offs_c, mask=mask_c, other=0.0).to(tl.float32)


@triton.jit
def modulated_norm(x, factor, shift, mask_c, eps, CHANNELS: tl.constexpr):
    """Layer norm of rows x, times a factor and plus a shift for each channel; x is zero beyond CHANNELS."""
    # padding must not count as deviation from the mean
    x = tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
    return x * inverse[:, None] * factor[None, :] + shift[None, :]
