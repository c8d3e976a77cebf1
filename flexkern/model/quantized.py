"""Weights in 8 bits or fewer: float8 is read, with or without scales; every other form is refused by its name.

    weight = float8 * scale, the scale one number for the tensor, or one for each of its rows

Source: ComfyUI comfy/quant_ops.py and its older scaled_fp8 files; LightX2V's fp8 files; bitsandbytes, nunchaku,
AutoGPTQ, optimum-quanto and HQQ for the names that give the others away.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flexkern.model.files import some_of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = re.compile(r"(.+)\.(scale_weight|weight_scale)")
UNUSED = re.compile(r"(.+\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")  # markers, and scales of activations
SPIECE = "spiece_model"  # the tensor of bytes that holds a tokenizer in ComfyUI's files
SIGNS = {  # what only the tensors of a quantised form are called
    "svdq (nunchaku)": r".+\.(wscales|smooth_factor|smooth_factor_orig|proj_down|wcscales)",
    "nf4 or fp4 (bitsandbytes)": r".+\.(quant_map|nested_absmax|quant_state\.bitsandbytes__\w+|absmax)",
    "int8 (bitsandbytes)": r".+\.SCB",
    "GPTQ or AWQ": r".+\.(qweight|qzeros|g_idx)",
    "quanto": r".+\.weight\._(data|scale)",
    "HQQ": r".+\.W_q",
    "nvfp4": r".+\.weight_scale_2",
}
SUPPORTED = "supported: float32, bfloat16, float16, and float8 with a scale per tensor or row, or without"


def refuse_quantized(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises for weights that are not floating point: NotImplementedError where their form is known by name.

    ValueError: Names the tensor.
    """
    found = form_of(state)
    integers = [key for key, tensor in state.items() if key.endswith("weight") and tensor.dtype == torch.int8]
    if found is None and integers and any(SCALES.fullmatch(key) for key in state):
        found = "int8 with scales", integers[0]
    if found is not None:
        raise NotImplementedError(f"{path} is quantised as {found[0]} ({found[1]}); {SUPPORTED}")
    for key, tensor in state.items():
        if not tensor.is_floating_point() and not UNUSED.fullmatch(key) and key != SPIECE:
            raise ValueError(f"{path}: {key} is {tensor.dtype}; expected floating point, not quantised weights")


def form_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The form of quantisation that gives itself away by a tensor's name, and that name."""
    names = list(names)
    matches = ((form, name) for form, sign in SIGNS.items() for name in names if re.fullmatch(sign, name))
    return next(matches, None)


def split_scales(state: Mapping[str, Tensor], where: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights alone, and the scale of each that has one, by the weight's name.

    Raises:
        ValueError: A scale is that of no tensor, a weight has two scales or lacks the one that it should have, or is
            not floating point.
        NotImplementedError: Weights are quantised otherwise.
    """
    refuse_quantized(state, where)
    weights = {key: tensor for key, tensor in state.items() if not UNUSED.fullmatch(key)}
    named: dict[str, str] = {}
    for key in [key for key in weights if SCALES.fullmatch(key)]:
        of = SCALES.sub(r"\1.weight", key)
        if of in named:
            raise ValueError(f"{where} holds two scales of {of}, {named[of]} and {key}; expected one")
        named[of] = key
    scales = {of: weights.pop(key) for of, key in named.items()}
    _validate_scaled(weights, scales, (*named.values(), *(key for key in state if UNUSED.fullmatch(key))), where)
    for key, scale in scales.items():
        if key not in weights:
            raise ValueError(f"{where} holds a scale of {key}, and no such tensor")
        rows = list(weights[key].shape[:1])
        if scale.numel() != 1 and list(scale.flatten().shape) != rows:
            got = f"{list(scale.shape)} for a weight {list(weights[key].shape)}"
            raise NotImplementedError(f"{where} is quantised in blocks: the scale of {key} is {got}; {SUPPORTED}")
    return weights, scales


def _validate_scaled(
    weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], signs: tuple[str, ...], where: str | Path
) -> None:
    """Raises ValueError for float8 matrices without a scale in a file that has scales, as its ``signs`` tell.

    A plain cast to float8 has no such tensors. Norms and biases, which no form scales, are what they say.
    """
    bare = [key for key, tensor in weights.items() if tensor.dtype in FLOAT8 and tensor.dim() > 1 and key not in scales]
    lacking = [key for key in bare if key.endswith(".weight")]
    if signs and lacking:
        told = f"holds float8 with scales, as {signs[0]} tells, and lacks the scales of {some_of(lacking)}"
        raise ValueError(f"{where} {told}; get the file again, or convert it anew")


def dequantized(weight: Tensor, scale: Tensor, device: str | torch.device) -> Tensor:
    """float32 on the device: the weight times its scale, a number or one for each row."""
    factor = scale.to(device, torch.float32).flatten()
    return weight.to(device, torch.float32) * factor.view(-1, *[1] * (weight.dim() - 1))
