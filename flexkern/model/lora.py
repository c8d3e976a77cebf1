"""LoRAs as trainers write them, as updates of named tensors: PEFT, diffusers, LongLive, kohya and musubi, LightX2V.

    load_transformer("self_forcing_dmd.pt", lora=["style.safetensors", ("motion.safetensors", 0.5)])

Source: PEFT's state dicts; kohya-ss/musubi-tuner networks/lora_wan.py; ComfyUI comfy/lora.py and comfy/weight_adapter;
ModelTC/LightX2V tools/extract (``diff``, ``diff_b``, ``diff_m``).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from flexkern.checks import is_float32, require
from flexkern.model.files import find_files, read_files, read_json, select_group, some_of
from flexkern.model.intact import require_there
from flexkern.model.merge import Update
from flexkern.model.names import clean_lora_name, is_diffusers, original_name, unflattened

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "lora.pt")
_HALF = r"lora_(?P<half>A|B|down|up)(\.(?!weight$|bias$)[\w-]+)?(\.(?P<leaf>weight|bias))?"
_OLD_HALF = r"lora\.(?P<old>down|up)\.weight"  # of diffusers' first LoRAs
TENSOR = re.compile(rf"(?P<module>.+)\.({_HALF}|{_OLD_HALF}|(?P<other>alpha|diff|diff_b|diff_m))")
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
HALVES = {"A": "down", "B": "up"}
FORMS = {  # what only the tensors of another form are called
    "DoRA": r".*\.(dora_scale|lora_magnitude_vector.*)",
    "LoHa": r".*\.hada_w[12].*",
    "LoKr": r".*\.lokr_(w[12]|t2).*",
    "OFT": r".*\.(oft_\w+|boft_\w+)(\..*)?",
    "LoCon with a core": r".*\.lora_mid\.weight",
    "GLoRA": r".*\.[ab][12]\.weight",
    "IA3": r".*\.(ia3_l.*|on_input)",
    "VeRA": r".*\.vera_.*",
}
DAMAGED = "the file is damaged, or its training diverged"
SUPPORTED = "supported: LoRA (down, up, alpha) and differences (diff, diff_b, diff_m)"

LoraPath: TypeAlias = str | Path
Loras: TypeAlias = LoraPath | Sequence[LoraPath | tuple[LoraPath, float]]
"""One LoRA or several; each a path, or a path and its scale."""


class Lora(NamedTuple):
    """Which LoRA, and how strongly."""

    path: Path
    scale: float = 1.0
    """times alpha / rank"""


def listed(loras: Loras | None, scale: float = 1.0) -> tuple[Lora, ...]:
    """The LoRAs one by one.

    Args:
        loras: A path, or a sequence of paths and pairs of path and scale; None for none.
        scale: Times the scale of each.

    Raises:
        TypeError: Says what an entry must be.
        ValueError: A scale is not finite in float32, in which LoRAs are added, or one LoRA is there twice.
    """
    if loras is None:
        return ()
    entries: list[Any] = [loras] if isinstance(loras, str | Path) or _is_pair(loras) else list(loras)
    found, seen = [], set()
    for entry in entries:
        if not isinstance(entry, str | Path) and not _is_pair(entry):
            raise TypeError(f"a LoRA must be a path, or a path and a finite scale, got {entry!r}")
        path, own = (entry, 1.0) if isinstance(entry, str | Path) else entry
        fine = is_float32(scale) and is_float32(float(own) * scale)
        require(fine, f"the scale of the LoRA {path} must be finite in float32, got {own:g} times {scale:g}")
        require(Path(path).resolve() not in seen, f"the LoRA {path} is given twice: give it once, with the scales' sum")
        seen.add(Path(path).resolve())
        found.append(Lora(Path(path), float(own) * scale))
    return tuple(found)


def _is_pair(entry: Any) -> bool:
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        return False
    path, scale = entry
    number = isinstance(scale, Real) and not isinstance(scale, bool) and math.isfinite(scale)
    return isinstance(path, str | Path) and number


def read_loras(loras: Loras | None, scale: float = 1.0) -> dict[str, list[Update]]:
    """The updates of all LoRAs, in their order, by the tensor that they change. Args and Raises: ``read_lora``'s."""
    updates: dict[str, list[Update]] = {}
    for lora in listed(loras, scale):
        for target, changes in read_lora(lora.path, lora.scale).items():
            updates.setdefault(target, []).extend(changes)
    return updates


def read_lora(path: str | Path, lora_scale: float = 1.0) -> dict[str, list[Update]]:
    """The updates of one LoRA by the name of the tensor that they change.

    Args:
        path: A file, or a folder of PEFT.
        lora_scale: Times alpha / rank, where alpha = rank if the files do not say it; times a difference.

    Raises:
        FileNotFoundError: No LoRA is there.
        ValueError: It holds something else as well, half of a pair, or an alpha or a scale that is not finite.
        NotImplementedError: It is another form (rsLoRA, DoRA, LoHa, LoKr, ...).
    """
    path = Path(path)
    require_there(path, "LoRA")
    files = find_files(path, "transformer", LORA_FILES)
    content, metadata = read_files(files)
    _, held, _ = select_group(content, ("generator_lora", "state_dict", "model"), path, flat=True)
    state = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    adapter = _adapter_config(files[0], content, metadata)
    _refuse_other_forms(map(clean_lora_name, state), adapter, path)
    return _updates(_pieces(state, path), adapter, path, lora_scale)


def _refuse_other_forms(names: Iterable[str], adapter: Mapping[str, Any], path: Path) -> None:
    names = list(names)
    for form, sign in FORMS.items():
        if found := next((name for name in names if re.fullmatch(sign, name)), None):
            raise NotImplementedError(f"{path} is a {form} ({found}); {SUPPORTED}")
    if special := [name for name in ("use_rslora", "use_dora", "alpha_pattern") if adapter.get(name)]:
        raise NotImplementedError(f"{path} sets {', '.join(special)}; supported: plain LoRA with one alpha")


def _pieces(state: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """down, up, up_bias, alpha, diff, diff_b, diff_m of every module, by Wan's name. Raises for all else."""
    diffusers = is_diffusers(state)
    modules: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in state.items():
        match = TENSOR.fullmatch(clean_lora_name(key))
        half = match is not None and (match["half"] or match["old"]) and match["leaf"] != "bias"
        hollow = half and (tensor.dim() < 2 or not tensor.numel())  # of no rank
        if match is None or hollow or (not tensor.is_floating_point() and match["other"] != "alpha"):
            strange.append(key)
            continue
        if match["other"] == "alpha" and not (tensor.numel() == 1 and is_float32(tensor.item())):
            got = f"{tensor.item():g}" if tensor.numel() == 1 else f"{list(tensor.shape)}"
            raise ValueError(f"{path}: {key} must be one finite number, got {got}; {DAMAGED}")
        role = match["other"] or HALVES.get(match["half"], match["half"]) or match["old"]
        role = "up_bias" if match["leaf"] == "bias" else role
        module = unflattened(match["module"])
        module = original_name(f"{module}.weight").removesuffix(".weight") if diffusers else module
        if role in modules.setdefault(module, {}):
            raise ValueError(f"{path} holds {role} of {module}.weight twice, the second time as {key}")
        modules[module][role] = tensor
    for module, held in modules.items():
        if "down" in held and "up" in held and held["down"].shape[0] != held["up"].shape[1]:
            down, up = list(held["down"].shape), list(held["up"].shape)
            raise ValueError(f"{path}: the halves of {module}.weight do not fit each other: {up} @ {down}; {DAMAGED}")
    strange += [f"half of {module}.weight" for module, held in modules.items() if ("down" in held) != ("up" in held)]
    if strange or not modules:
        raise ValueError(f"{path} is not a plain LoRA; beside its {len(modules)} targets it holds {some_of(strange)}")
    return modules


def _updates(
    modules: Mapping[str, Mapping[str, Tensor]], adapter: Mapping[str, Any], path: Path, lora_scale: float
) -> dict[str, list[Update]]:
    updates: dict[str, list[Update]] = {}
    general = adapter.get("lora_alpha")
    if general is not None and not is_float32(general):
        raise ValueError(f"{path}: lora_alpha must be a finite number, got {general!r}; {DAMAGED}")

    def add(target: str, up: Tensor, down: Tensor | None, scale: float) -> None:
        if not is_float32(scale):
            of = "" if down is None else f": {lora_scale:g} times alpha over the rank {down.shape[0]}"
            raise ValueError(f"{path}: the scale of {target} is {scale:g}{of}; expected one that is finite in float32")
        updates.setdefault(target, []).append(Update(up, down, scale, str(path)))

    for module, held in modules.items():
        if "down" in held:
            rank = held["down"].shape[0]
            scale = lora_scale * float(held.get("alpha", rank if general is None else general)) / rank
            add(f"{module}.weight", held["up"], held["down"], scale)
            if "up_bias" in held:
                add(f"{module}.bias", held["up_bias"], None, scale)
        for role, leaf in DIFFERENCES.items():
            if role in held:
                itself = module.endswith("modulation")  # a parameter, not a module
                add(module if itself else f"{module}.{leaf}", held[role], None, lora_scale)
    return updates


def _adapter_config(file: Path, content: Mapping[Any, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT (a file beside), diffusers (metadata) or a training script (a top level number) says of the LoRA."""
    alpha = content.get("alpha")
    adapter = {} if alpha is None else {"lora_alpha": alpha.item() if isinstance(alpha, Tensor) else alpha}
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    adapter |= {name.rpartition(".")[2]: value for name, value in said.items()}
    return adapter | (read_json(file.with_name("adapter_config.json")) if file.stem == "adapter_model" else {})


def validate_updates(updates: Mapping[str, Sequence[Update]], state: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError that lists the targets that are not in the state, or of another shape, one LoRA at a time."""
    every = [(target, update) for target, changes in updates.items() for update in changes]
    for source in dict.fromkeys(update.source for _, update in every):
        of_source = [(target, update) for target, update in every if update.source == source]
        unknown = [target for target, _ in of_source if target not in state]
        wrong = [
            f"{target} {list(state[target].shape)} from {_formula(update)}"
            for target, update in sorted(of_source, key=lambda pair: pair[0])
            if target in state and not update.fits(state[target])
        ]
        if unknown or wrong:
            found = f"unknown targets {some_of(unknown)}; wrongly shaped {some_of(wrong)}"
            raise ValueError(f"{source} does not fit {where}: {found}")


def _formula(update: Update) -> str:
    up = list(update.up.shape)
    return f"{up}" if update.down is None else f"{up} @ {list(update.down.shape)}"
