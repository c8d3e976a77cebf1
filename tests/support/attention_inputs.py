"""Random inputs of frame_attention, the exact result, and the result that its declared numerics entitle it to."""

import math

import torch

from flexkern.kernels import reference


def make_inputs(b, f, s, h, d, r, g, dtype=torch.float32, bias=False) -> dict:
    """Arguments of frame_attention; pages that no slot names hold NaN."""
    time = 22 if d == 128 else 12
    slots = torch.randperm(r + 2)[:r].int()
    query = torch.randn(b, f, s, h, d) * torch.logspace(-1, 0.7, s)[:, None, None]
    pages = torch.full((2, b, r + 2, s, h, d), math.nan)
    pages[:, :, slots.long()] = torch.randn(2, b, r, s, h, d)
    angle = torch.rand(f, r, g, time, dtype=torch.float64) * 40
    inputs = dict(
        query=query.to(dtype), key_pages=pages[0].to(dtype), value_pages=pages[1].to(dtype), slots=slots,
        turn=torch.stack((angle.cos(), angle.sin()), dim=-1).float(), logit_scale=0.5 + torch.rand(f), bias=None,
    )  # fmt: skip
    if bias:
        inputs["bias"] = torch.randn(f, r) * 3
    return inputs


def exact(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.frame_attention(**{k: v.double() if is_real(v) else v for k, v in inputs.items()})


def is_real(x) -> bool:
    return x is not None and x.is_floating_point()


def declared(query, key_pages, value_pages, slots, turn, logit_scale, bias) -> torch.Tensor:
    """The kernel's declared numerics: turned query, P and output rounded, everything else in float32."""
    dtype, dim, frames = query.dtype, query.shape[-1], query.shape[1]
    keys, values = key_pages[:, slots.long()].float(), value_pages[:, slots.long()].float()
    outputs = []
    for f in range(frames):
        turned = reference.rotate(query[:, f, None].float(), reference.pad_turn(turn[f], dim // 2)[:, None])
        turned = (turned * logit_scale[f]).to(dtype).float()
        score = torch.einsum("brqhd,brkhd->bhqrk", turned, keys) / dim**0.5
        score = (score if bias is None else score + bias[f][:, None]).flatten(-2)
        weight = (score - score.amax(-1, keepdim=True)).exp()
        out = torch.einsum("bhqk,bkhd->bqhd", weight.to(dtype).float(), values.flatten(1, 2))
        outputs.append(out / weight.sum(-1).transpose(1, 2)[..., None])
    return torch.stack(outputs, dim=1).to(dtype)
