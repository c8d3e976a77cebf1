"""What the tensors of a transformer are called in published files, and the original Wan name of each.

    module._orig_mod.model.blocks.0.attn1.to_q.weight -> blocks.0.self_attn.q.weight

Source: the loaders of Wan-Video/Wan2.1, Self-Forcing, LongLive, CausVid, Rolling Forcing, Krea and ComfyUI; torch's DDP
and AveragedModel, Lightning; diffusers scripts/convert_wan_to_diffusers.py; kohya-ss/musubi-tuner for flat names.
"""

import re
from collections.abc import Iterable
from functools import cache

import torch

from flexkern.model.wan import CausalWan, WanConfig

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # removed anywhere in a name
PREFIXES = ("module.", "model.", "diffusion_model.")  # removed from the front, as often as they stand there
LORA_PREFIXES = ("base_model.", "transformer.")  # of a LoRA as well
FLAT_PREFIX = r"(lora_unet|lora_transformer|lycoris)_+"  # of names whose dots have become underscores
EMA_GROUPS = ("generator_ema", "model_ema", "ema_model", "ema_state_dict", "ema", "module_ema", "params_ema", "shadow")
RAW_GROUPS = ("generator", "model", "state_dict", "model_state_dict", "module", "transformer", "online_model", "params")
COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}  # that averaging keeps beside the weights
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
DIFFUSERS_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    "blocks.*.scale_shift_table": "blocks.*.modulation",
    "blocks.*.norm2": "blocks.*.norm3",  # the two projects number the three norms in another order
    "blocks.*.norm3": "blocks.*.norm2",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
    **{f"blocks.*.attn1.{theirs}": f"blocks.*.self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"blocks.*.attn2.{theirs}": f"blocks.*.cross_attn.{ours}" for theirs, ours in _ATTENTION.items()},
}


def clean_name(name: str, prefixes: Iterable[str] = PREFIXES) -> str:
    """A tensor's name without wrappers (FSDP, compile, ...) and without the prefixes in front of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def clean_lora_name(name: str) -> str:
    """The same for a tensor of a LoRA, which has prefixes of its own."""
    return clean_name(name, (*LORA_PREFIXES, *PREFIXES))


def wrappers_of(names: Iterable[str]) -> tuple[str, ...]:
    """What ``clean_name`` removes from these names, each once."""
    names = list(names)
    found = [mark for mark in WRAPPERS if any(mark in name for name in names)]
    fronts = {clean_name(name, ()).removesuffix(clean_name(name)) for name in names}
    return (*found, *sorted(fronts - {""}))


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names are those of diffusers."""
    marks = (".attn1.", ".attn2.", ".ffn.net.", "condition_embedder.")
    return any(mark in name for name in names for mark in marks)


def original_name(name: str) -> str:
    """The original Wan name of a diffusers parameter; a name that the table lacks comes back as it is."""
    block = re.match(r"blocks\.(\d+)\.", name)
    pattern = f"blocks.*.{name[block.end() :]}" if block else name
    module, dot, leaf = pattern.rpartition(".")
    found = DIFFUSERS_NAMES.get(pattern) or DIFFUSERS_NAMES.get(module, module) + dot + leaf
    return found.replace("*", block[1]) if block else found


def unflattened(module: str) -> str:
    """The module that a flat name of a LoRA means: lora_unet_blocks_0_self_attn_q is blocks.0.self_attn.q.

    Every module of the model is known, under Wan's name or diffusers'; another name comes back as it is.
    """
    front = re.match(FLAT_PREFIX, module)
    if front is None:
        return module
    flat = module[front.end() :]
    block = re.match(r"blocks_(\d+)(?=_|$)", flat)
    found = _flat_names().get(f"blocks_*{flat[block.end() :]}" if block else flat)
    return module if found is None else found.replace("*", block[1] if block else "")


def is_known(name: str) -> bool:
    """Whether a parameter of that name is in a Wan transformer of any number of layers."""
    known = {pattern for module in _flat_names().values() for pattern in (module, f"{module}.weight", f"{module}.bias")}
    return re.sub(r"^blocks\.\d+(?=\.)", "blocks.*", name) in known


@cache
def _flat_names() -> dict[str, str]:
    """Wan's name of every module, * for the number of its block, by that name and diffusers' with underscores."""
    with torch.device("meta"):
        model = CausalWan(WanConfig(dim=2, ffn_dim=1, num_heads=1, num_layers=1))
    held = [name for named in (model.named_modules(), model.named_parameters()) for name, _ in named]
    names = [re.sub(r"^blocks\.0(?=\.|$)", "blocks.*", name) for name in held]
    theirs = {ours: name for name, ours in DIFFUSERS_NAMES.items()}
    flat = {theirs[name].replace(".", "_"): name for name in names if name in theirs}
    return flat | {name.replace(".", "_"): name for name in names}
