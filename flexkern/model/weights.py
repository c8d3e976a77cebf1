"""Published checkpoints of causal Wan 2.1, whatever their container, as one state dict with the original Wan keys.

    file or folder -> the chosen group of tensors -> wrapper names removed -> diffusers names renamed -> bare keys

Source: the loaders of Wan-Video/Wan2.1, Self-Forcing, LongLive, CausVid, Rolling Forcing, Krea and ComfyUI; diffusers
scripts/convert_wan_to_diffusers.py; PEFT and kohya for the names in a LoRA.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkern.model.files import find_files, finished, read_files, read_json, select_group, some_of, validate_fit
from flexkern.model.wan import CausalWan, WanConfig

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # removed anywhere in a key
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")  # one of them is removed from the front
LORA_PREFIXES = ("base_model.model.", "transformer.")
FOLDER_FILES = ("diffusion_pytorch_model*.safetensors", "model.pt")
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "lora.pt")
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
CONFIG_NAMES = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
CONFIG_FIELDS = {field.name for field in fields(WanConfig)}
SIZES = {  # field: (key, axis) that shows it
    "dim": ("patch_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0),
    "text_dim": ("text_embedding.0.weight", 1),
    "freq_dim": ("time_embedding.0.weight", 1),
}
HEAD_DIM = 128  # of every published Wan; the shapes do not show it
LowRank = tuple[Tensor, Tensor, float]  # up [out, rank], down [rank, in], scale: the update scale * up @ down


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """The tensors of a transformer under bare Wan keys, and how its files hold them."""

    tensors: dict[str, Tensor]
    container: str
    """in words: file type, group and naming of the keys"""
    config: WanConfig | None
    """None where neither file nor shapes tell it"""
    groups: tuple[str, ...] = ()
    """those at the top level of the file, the chosen one first"""
    wrappers: tuple[str, ...] = ()
    """what was removed from the names"""


def read_state_dict(path: str | Path, *, ema: bool | None = None, headers: bool = False) -> StateDict:
    """The tensors of a transformer as stored: in their dtype, mapped to the files where that can be.

    Args:
        path: A weight file, an original Wan folder, or a diffusers folder (its root or ``transformer``).
        ema: None takes the EMA where there is one, True insists on it, False takes the raw generator.
        headers: Read tensors of safetensors without their data, on the device "meta".

    Raises:
        FileNotFoundError: No weights are there.
        ValueError: They cannot be read, or are no plain floating-point tensors.
        NotImplementedError: The checkpoint takes images.
    """
    path = Path(path)
    files = _find_files(path, FOLDER_FILES)
    content, metadata = read_files(files, headers=headers)
    groups = ["generator_ema"] * (ema is not False) + ["generator", "model"] * (not ema)
    group, state = select_group(content, groups, path, flat=not ema)
    diffusers = _is_diffusers(state)
    wrappers = [mark for mark in WRAPPERS if any(mark in key for key in state)]
    wrappers += [mark for mark in PREFIXES if any(clean_name(key, ()).startswith(mark) for key in state)][:1]
    state = _rename({key: value for key, value in state.items() if isinstance(value, Tensor)}, path, diffusers)
    declared = _declared_config(files[0], metadata, beside=path.is_dir() or files[0].match(FOLDER_FILES[0]))
    _refuse_image_models(state, declared, path)
    container = f"{files[0].suffix[1:]}, {group}, {'diffusers' if diffusers else 'Wan'} keys"
    others = (name for name, value in content.items() if isinstance(value, Mapping) and name != group)
    config = _config(state, declared, path)
    return StateDict(
        tensors=state, container=container, config=config, groups=(group, *others), wrappers=tuple(wrappers)
    )


def validate_transformer(
    path: str | Path, *, config: WanConfig | None = None, ema: bool | None = None, lora: str | Path | None = None
) -> tuple[StateDict, CausalWan]:
    """What ``load_transformer`` would load, and the model that it fits, both without data.

    Args and Raises: those of ``load_transformer``; names and shapes are compared before any data is read.
    """
    read, model, _ = _prepare(path, config, ema, lora, 1.0, headers=True)
    return read, model


def load_transformer(
    path: str | Path,
    *,
    config: WanConfig | None = None,
    ema: bool | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> CausalWan:
    """A CausalWan with every weight of the checkpoint, in eval mode, without gradients.

    Numerics: the LoRA is merged in float32; each weight is rounded once, to dtype.
    Bytes: the model plus one tensor, where the file can be mapped.

    Args:
        path: As in ``read_state_dict``.
        config: Overrides what the checkpoint says.
        ema: As in ``read_state_dict``.
        lora: A PEFT, LongLive or kohya file, or a PEFT folder; adds lora_scale * alpha / rank * B @ A, where
            alpha = rank if the files do not say it.
        lora_scale: Times alpha / rank.
        dtype: Of the weights.
        device: Where they go.

    Raises:
        ValueError: Lists the missing, unexpected and wrongly shaped keys; and what ``read_state_dict`` raises.
    """
    read, model, updates = _prepare(path, config, ema, lora, lora_scale)
    state = read.tensors
    # popped one by one: what was read can go as soon as it is converted
    placed = {key: _convert(state.pop(key), updates.get(key), dtype, device) for key in list(state)}
    model.load_state_dict(placed, assign=True)
    return finished(model, f"{path} ({read.container})")


def _prepare(
    path: str | Path, config: WanConfig | None, ema: bool | None, lora: str | Path | None, lora_scale: float,
    headers: bool = False,
) -> tuple[StateDict, CausalWan, dict[str, LowRank]]:  # fmt: skip
    """The state dict, a model without data that it fits, and the updates of the LoRA, which fit as well."""
    read = read_state_dict(path, ema=ema, headers=headers)
    where, state = f"{path} ({read.container})", read.tensors
    config = config or read.config
    if config is None:
        unknown = "does not show dim, ffn_dim, num_heads and num_layers of a Wan transformer, and no config was given"
        raise ValueError(f"{where} {unknown}; it holds {some_of(state)}")
    with torch.device("meta"):
        model = CausalWan(config)
    validate_fit(state, model.state_dict(), where)
    updates = {} if lora is None else read_lora(lora, lora_scale)
    _validate_lora(updates, state, f"{lora} does not fit {where}")
    return read, model, updates


def _find_files(path: Path, patterns: Iterable[str]) -> list[Path]:
    """The weight files of the transformer, or of a LoRA, that a path stands for."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir() and (read_json(path / "model_index.json").get("transformer_2") or [None])[0]:
        raise NotImplementedError(f"{path} has two transformers (Wan 2.2 A14B); supported: one, as in Wan 2.1")
    return find_files(path, "transformer", patterns)


def _is_diffusers(keys: Iterable[str]) -> bool:
    return any(mark in key for key in keys for mark in (".attn1.", ".attn2.", ".ffn.net.", "condition_embedder."))


def clean_name(name: str, prefixes: Iterable[str]) -> str:
    """A tensor's name without wrappers (FSDP, compile, ...) and without the first of the prefixes that it has."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))


def _original_name(name: str) -> str:
    """The original Wan name of a diffusers parameter; a name that the table lacks comes back as it is."""
    block = re.match(r"blocks\.(\d+)\.", name)
    pattern = f"blocks.*.{name[block.end() :]}" if block else name
    module, dot, leaf = pattern.rpartition(".")
    found = DIFFUSERS_NAMES.get(pattern) or DIFFUSERS_NAMES.get(module, module) + dot + leaf
    return found.replace("*", block[1]) if block else found


def _rename(state: Mapping[str, Tensor], path: Path, diffusers: bool) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        name = clean_name(key, PREFIXES)
        name = _original_name(name) if diffusers else name
        if name in renamed:
            raise ValueError(f"{path} holds {name} twice, the second time as {key}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} is {tensor.dtype}; expected floating point, not quantised weights")
        renamed[name] = tensor
    return renamed


def _declared_config(file: Path, metadata: Mapping[str, str], *, beside: bool) -> dict[str, Any]:
    """What the file's own metadata, else the config.json beside it, says; ``{}`` where neither is there."""
    if "flexkern_config" in metadata:
        declared: dict[str, Any] = json.loads(metadata["flexkern_config"])
        if unknown := sorted(declared.keys() - CONFIG_FIELDS):
            raise ValueError(f"{file}: flexkern_config has unknown fields {unknown}")
        return declared
    found = read_json(file.parent / "config.json") if beside else {}
    declared = {CONFIG_NAMES.get(name, name): value for name, value in found.items() if value is not None}
    return declared | {"qk_norm": declared.get("qk_norm", True) in (True, "rms_norm_across_heads")}


def _refuse_image_models(state: Mapping[str, Tensor], declared: Mapping[str, Any], path: Path) -> None:
    signs = [key for key in state if re.search(r"k_img\.|img_emb\.|\.add_k_proj\.|image_embedder\.", key)][:1]
    if declared.get("model_type", "t2v") != "t2v":
        signs.append(f"model_type {declared['model_type']}")
    if "patch_embedding.weight" in state and state["patch_embedding.weight"].shape[1:2] == (36,):
        signs.append("36 input channels")
    if signs:
        raise NotImplementedError(f"{path} takes images ({', '.join(signs)}); supported: text-to-video Wan 2.1")


def _config(state: Mapping[str, Tensor], declared: Mapping[str, Any], path: Path) -> WanConfig | None:
    """The configuration: what is declared wins over what the shapes show."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    shown: dict[str, Any] = {
        name: shapes[key][axis] for name, (key, axis) in SIZES.items() if len(shapes.get(key, ())) > axis
    }
    if blocks := [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]:
        shown["num_layers"] = max(blocks) + 1
    if shown.get("dim", 1) % HEAD_DIM == 0:
        shown["num_heads"] = shown["dim"] // HEAD_DIM
    _, _, *patch = shapes.get("patch_embedding.weight", (0, 0))
    if len(patch) == 3 and "head.head.weight" in shapes:
        shown["patch_size"] = tuple(patch)
        shown["out_dim"] = shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2])
    known = shown | {name: value for name, value in declared.items() if name in CONFIG_FIELDS}
    if not known.keys() >= {"dim", "ffn_dim", "num_heads", "num_layers"}:
        return None
    try:
        return WanConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has an unusable configuration: {error}") from error


def read_lora(path: str | Path, lora_scale: float = 1.0) -> dict[str, LowRank]:
    """The updates of a LoRA by the key of the weight that they change.

    Args:
        path: As ``lora`` in ``load_transformer``.
        lora_scale: Times alpha / rank.

    Returns:
        For each key up [out, rank], down [rank, in] and the scale lora_scale * alpha / rank.

    Raises:
        FileNotFoundError: No LoRA is there.
        ValueError: It is not a plain LoRA.
        NotImplementedError: It is a variant (rsLoRA, DoRA, several alphas).
    """
    path = Path(path)
    files = _find_files(path, LORA_FILES)
    content, metadata = read_files(files)
    _, state = select_group(content, ("generator_lora",), path, flat=True)
    adapter = _adapter_config(files[0], content, metadata)
    if special := [name for name in ("use_rslora", "use_dora", "alpha_pattern") if adapter.get(name)]:
        raise NotImplementedError(f"{path} sets {', '.join(special)}; supported: plain LoRA with one alpha")
    diffusers = _is_diffusers(state)
    halves: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in state.items():
        name = clean_name(clean_name(key, LORA_PREFIXES), PREFIXES)
        match = re.fullmatch(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))", name)
        if match is None:
            strange += [key] * isinstance(value, Tensor)
            continue
        target = _original_name(f"{match[1]}.weight") if diffusers else f"{match[1]}.weight"
        role = match[3] or {"A": "down", "B": "up"}.get(match[2], match[2])
        if role in halves.setdefault(target, {}):
            raise ValueError(f"{path} holds {role} of {target} twice, the second time as {key}")
        halves[target][role] = value
    strange += [f"half of {target}" for target, pair in halves.items() if not pair.keys() >= {"down", "up"}]
    if strange or not halves:
        raise ValueError(f"{path} is not a plain LoRA; beside its {len(halves)} targets it holds {some_of(strange)}")
    updates: dict[str, LowRank] = {}
    for target, pair in halves.items():
        rank = pair["down"].shape[0]
        alpha = float(pair.get("alpha", adapter.get("lora_alpha", rank)))
        updates[target] = pair["up"], pair["down"], lora_scale * alpha / rank
    return updates


def _adapter_config(file: Path, content: Mapping[Any, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT (a file beside), diffusers (metadata) or a training script (a top level number) says of the LoRA."""
    adapter = {"lora_alpha": content["alpha"]} if "alpha" in content else {}
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    adapter |= {name.rpartition(".")[2]: value for name, value in said.items()}
    return adapter | (read_json(file.with_name("adapter_config.json")) if file.stem == "adapter_model" else {})


def _validate_lora(updates: Mapping[str, LowRank], state: Mapping[str, Tensor], what: str) -> None:
    unknown = [target for target in updates if target not in state]
    wrong = []
    for target in sorted(updates.keys() & state.keys()):
        weight, up, down = (list(tensor.shape) for tensor in (state[target], *updates[target][:2]))
        if up[1:] != down[:1] or up[:1] + down[1:] != weight:
            wrong.append(f"{target} {weight} from {up} @ {down}")
    if unknown or wrong:
        raise ValueError(f"{what}: unknown targets {some_of(unknown)}; wrongly shaped {some_of(wrong)}")


def _convert(tensor: Tensor, update: LowRank | None, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous copy in dtype on the device, which never aliases the file, with the update merged in float32."""
    if update is not None:
        tensor, up, down = (given.to(device, torch.float32) for given in (tensor, *update[:2]))
        tensor = torch.addmm(tensor, up, down, alpha=update[2])
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
