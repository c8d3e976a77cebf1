"""Published checkpoints of causal Wan 2.1, whatever their container, as one state dict with the original Wan keys.

    file or folder -> the chosen group of tensors -> wrapper names removed -> diffusers names renamed -> bare keys

Source: the loaders of Wan-Video/Wan2.1, Self-Forcing, LongLive, CausVid, Rolling Forcing, Krea and ComfyUI.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexkern.model.files import find_files, finished, read_files, read_json, select_group, some_of, validate_fit
from flexkern.model.intact import require_there
from flexkern.model.lora import Loras, read_loras, validate_updates
from flexkern.model.merge import Update, validate_finite
from flexkern.model.names import (
    COUNTERS,
    EMA_GROUPS,
    RAW_GROUPS,
    clean_name,
    is_diffusers,
    original_name,
    wrappers_of,
)
from flexkern.model.quantized import dequantized, split_scales
from flexkern.model.wan import CausalWan, WanConfig

FOLDER_FILES = ("diffusion_pytorch_model*.safetensors", "model*.safetensors", "model.pt")
HEADS = ({*EMA_GROUPS, *RAW_GROUPS} - {"model", "module"}) | {"critic"}  # may be the first word of flat names
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
    scales: dict[str, Tensor] = field(default_factory=dict)
    """of float8 tensors, by their names: a number, or one for each row"""

    @property
    def averaged(self) -> bool:
        """Whether these are the averaged (EMA) weights."""
        return self.groups[:1] != () and self.groups[0] in EMA_GROUPS


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
    files = _find_files(path)
    content, metadata = read_files(files, headers=headers)
    groups = [*EMA_GROUPS * (ema is not False), *RAW_GROUPS * (not ema)]
    group, held, others = select_group(content, groups, path, flat=not ema, heads=HEADS)
    diffusers, wrappers = is_diffusers(held), wrappers_of(held)
    state, scales = split_scales(_rename(held, path, diffusers), path)
    declared = _declared_config(files[0], metadata, beside=path.is_dir() or files[0].match(FOLDER_FILES[0]))
    _refuse_image_models(state, declared, path)
    form = "safetensors" if files[0].suffix.lower() == ".safetensors" else files[0].suffix[1:] or "no suffix"
    return StateDict(
        tensors=state,
        container=f"{form}, {group}, {'diffusers' if diffusers else 'Wan'} keys{', scaled float8' if scales else ''}",
        config=_config(state, declared, path),
        groups=(group, *others),
        wrappers=wrappers,
        scales=scales,
    )


def validate_transformer(
    path: str | Path, *, config: WanConfig | None = None, ema: bool | None = None, lora: Loras | None = None
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
    lora: Loras | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> CausalWan:
    """A CausalWan with every weight of the checkpoint, in eval mode, without gradients.

    Numerics: float8 times its scale, and every LoRA, are computed in float32; each weight is rounded once, to dtype.
    Bytes: the model plus one tensor, where the file can be mapped.

    Args:
        path: As in ``read_state_dict``.
        config: Overrides what the checkpoint says.
        ema: As in ``read_state_dict``.
        lora: One or several, each a path or a path and its scale, as ``read_loras`` takes them.
        lora_scale: Times the scale of each.
        dtype: Of the weights.
        device: Where they go.

    Raises:
        ValueError: Lists the missing, unexpected and wrongly shaped keys; or names the tensor that is not finite in
            the file, with the LoRA, or in dtype; and what ``read_state_dict`` raises.
        NotImplementedError: A kind of checkpoint, quantisation or LoRA that is not read.
    """
    read, model, updates = _prepare(path, config, ema, lora, lora_scale)
    state, where = read.tensors, f"{path} ({read.container})"
    placed = {}
    for key in list(state):  # popped one by one: what was read can go as soon as it is converted
        exact, changes = state.pop(key), updates.get(key, [])
        merged = dequantized(exact, read.scales[key], device) if key in read.scales else exact
        placed[key] = _convert(merged, changes, dtype, device)
        validate_finite(key, placed[key], merged, where, changes)
    model.load_state_dict(placed, assign=True)
    return finished(model, where)


def _prepare(
    path: str | Path, config: WanConfig | None, ema: bool | None, lora: Loras | None, lora_scale: float,
    headers: bool = False,
) -> tuple[StateDict, CausalWan, dict[str, list[Update]]]:  # fmt: skip
    """The state dict, a model without data that it fits, and the updates of the LoRAs, which fit as well."""
    read = read_state_dict(path, ema=ema, headers=headers)
    where, state = f"{path} ({read.container})", read.tensors
    config = config or read.config
    if config is None:
        unknown = "does not show dim, ffn_dim, num_heads and num_layers of a Wan transformer, and no config was given"
        raise ValueError(f"{where} {unknown}; it holds {some_of(state)}")
    with torch.device("meta"):
        model = CausalWan(config)
    validate_fit(state, model.state_dict(), where)
    updates = read_loras(lora, lora_scale)
    validate_updates(updates, state, where)
    return read, model, updates


def _find_files(path: Path) -> list[Path]:
    """The weight files of the transformer that a path stands for."""
    require_there(path, "checkpoint")
    if path.is_dir() and (read_json(path / "model_index.json").get("transformer_2") or [None])[0]:
        raise NotImplementedError(f"{path} has two transformers (Wan 2.2 A14B); supported: one, as in Wan 2.1")
    return find_files(path, "transformer", FOLDER_FILES)


def _rename(state: Mapping[str, Any], path: Path, diffusers: bool) -> dict[str, Tensor]:
    """The tensors under bare Wan names, without the numbers that averaging keeps beside them."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = clean_name(key)
        if not isinstance(tensor, Tensor) or name in COUNTERS:
            continue
        name = original_name(name) if diffusers else name
        if name in renamed:
            raise ValueError(f"{path} holds {name} twice, the second time as {key}")
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


def _convert(tensor: Tensor, updates: Iterable[Update], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous copy in dtype on the device, which never aliases the file, with the updates merged in float32."""
    for index, update in enumerate(updates):
        tensor = update.added_to(tensor.to(device, torch.float32) if index == 0 else tensor)
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
