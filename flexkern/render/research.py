"""The research repositories' configuration files, as what they mean here.

    num_frame_per_block      chunk, and the first chunk      local_attn_size     retention.window; -1: the preset's
    independent_first_frame  first chunk of 1 frame          sink_size           retention.sink
    denoising_step_list      steps of the schedule           global_sink         switch.keep_sink
    ..._first_chunk          steps of the first chunk        use_infinite_attention  the preset longlive-infinite
    warp_denoising_step      warp of the schedule            timestep_shift      shift of the schedule
    context_noise            context timestep of the schedule
    compression_method       ema: the preset memrope; eviction: longlive-infinite
    ema_alpha_long, _short   retention.slow_rate, retention.fast_rate

``model_kwargs`` may hold them as well, and then wins. What a file does not name stays the family's and the preset's.
``FLAGS`` are keys that stand in for options. All other keys are told apart: those of training, those that would change
the video and cannot be followed, and the unknown.
Source: configs/ of Self-Forcing, LongLive, CausVid, Rolling Forcing, Reward-Forcing and MemRoPE.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flexkern.checks import require
from flexkern.model.schedule import Schedule

INFINITE = "longlive-infinite"
COMPRESSIONS = {"ema": "memrope", "eviction": INFINITE}  # MemRoPE's compression_method: the preset that does the same
LENGTHS = ("seconds", "frames", "num_output_frames")  # options of which one is given at most
SHOWN = ("prompt", "prompts", "data_path")
FAMILY = {  # key: field of Family or Schedule
    "num_frame_per_block": "chunk",
    "denoising_step_list": "steps",
    "denoising_step_list_first_chunk": "first_steps",
    "warp_denoising_step": "warp",
    "timestep_shift": "shift",
    "context_noise": "context_timestep",
}
POLICY = {
    "local_attn_size": "retention.window",
    "sink_size": "retention.sink",
    "global_sink": "switch.keep_sink",
    "ema_alpha_long": "retention.slow_rate",
    "ema_alpha_short": "retention.fast_rate",
}
FLAGS = {  # key: the option that it stands in for
    "generator_ckpt": "weights",
    "lora_ckpt": "lora",
    "data_path": "data_path",
    "prompt_file_path": "data_path",
    "extended_prompt_path": "extended_prompt_path",
    "output_folder": "output_folder",
    "num_output_frames": "num_output_frames",
    "num_frames": "num_output_frames",
    "num_samples": "num_samples",
    "seed": "seed",
}
OTHERS = (
    "adapter", "compression_method", "ema_adaptive", "image_or_video_shape", "inference_iter", "save_with_index",
    "switch_frame_indices", "use_ema",
    "recent_size", "use_block_rope",  # MemRoPE's, whose code does not use them either
)  # fmt: skip
INT, BOOL, NUMBER, TEXT = (int, "a whole number"), (bool, "true or false"), (int | float, "a number"), (str, "a text")
FORMS: dict[str, tuple[Any, str]] = {  # key: what it must be
    **dict.fromkeys(("num_frame_per_block", "local_attn_size", "sink_size", "num_output_frames", "num_frames"), INT),
    **dict.fromkeys(("num_samples", "seed", "inference_iter"), INT),
    **dict.fromkeys(("denoising_step_list", "denoising_step_list_first_chunk"), (list, "a list of numbers")),
    **dict.fromkeys(("warp_denoising_step", "independent_first_frame", "global_sink", "use_ema"), BOOL),
    **dict.fromkeys(("use_infinite_attention", "save_with_index", "ema_adaptive"), BOOL),
    **dict.fromkeys(("timestep_shift", "context_noise", "ema_alpha_long", "ema_alpha_short"), NUMBER),
    **dict.fromkeys(
        ("compression_method", "generator_ckpt", "lora_ckpt", "data_path", "prompt_file_path", "output_folder"), TEXT
    ),
    "extended_prompt_path": TEXT,
    "adapter": (dict, "a mapping with rank and alpha"),
    "image_or_video_shape": (list, "a list of 5 whole numbers"),
    "switch_frame_indices": (int | str | list, "latent frames, separated by commas"),
}
TRAINING = (  # patterns of keys that only training reads; a distilled model runs without guidance
    "*_fsdp_wrap_strategy", "*batch_size", "*guidance_scale", "*_iters", "*_interval", "*_loss*", "*_task_type",
    "lr*", "*_lr*", "beta?", "beta?_*", "weight_decay*", "ema_*", "gan_*", "r?_*", "wandb*", "disable_wandb", "real_*",
    "fake_*", "critic_*", "discriminator_*", "dfake_*", "dmd_*", "streaming_*", "val_*", "vis*", "ts_schedule*",
    "min_score_*", "max_score_*", "max_step*", "min_step*", "*num_training_frames", "num_train_timestep",
    "last_step_only", "same_step_across_blocks", "slice_last_frames", "train_*", "negative_prompt", "trainer",
    "mixed_precision", "sharding_strategy", "gradient_*", "load_raw_video", "generator_task*", "logdir", "log_*",
    "no_save", "no_visualize", "save_*", "distribution_*", "diffusion_gan", "concat_time_embeddings", "max_grad_norm*",
    "dtype", "teacher_forcing", "backward_simulation", "warmup*", "num_workers", "resume*", "auto_resume", "is_causal",
    "config_name", "config_path", "profile*", "debug", "global_rank", "distributed", "world_size",
)  # fmt: skip
ABSENT = "???"  # in OmegaConf's files, for what a command line is to say
MATTER = (  # patterns of keys that would change the video
    "*relative_rope*", "rope_*", "*attn*", "*attention*", "*sink*", "*cache*", "*window*", "*overlap*", "*rollout*",
    "*quant*", "*fp8*", "*fp4*", "*solver*", "*sampler*", "*sampling*", "*step*", "*noise*", "*cfg*", "i2v", "*image*",
    "*video*", "*scale*", "*tae*", "*vae*", "*shift*", "fps", "height", "width", "*context*", "*frame*", "*block*",
    "*chunk*", "*prompt*", "*switch*", "*cut*",
)  # fmt: skip
KNOWN_MODELS = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B")  # their sizes are read from the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Research:
    """What a configuration changes."""

    path: Path
    family: Mapping[str, Any]
    """fields of ``Family`` and ``Schedule``"""
    policies: Mapping[str, Any]
    """dotted names of a preset"""
    preset: str | None
    """the method that it asks for"""
    preset_key: str | None
    """the key that asks for it"""
    flags: Mapping[str, Any]
    """what it says in place of options, by their names"""
    switches: tuple[int, ...] | None
    """latent frames at which the prompts of one video change"""
    most: int | None
    """how many prompts of its list are rendered"""
    lora_scale: float
    """of its LoRA: alpha / rank of the adapter"""
    unsupported: tuple[str, ...]
    """keys that would change the video and cannot be followed"""
    training: tuple[str, ...]
    """keys that only training reads"""
    unknown: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """The keys that are not used, in one line; None where all are."""
        parts = []
        if self.unsupported:
            parts.append(f"not supported, though the video would differ: {', '.join(self.unsupported)}")
        if self.unknown:
            parts.append(f"unknown: {', '.join(self.unknown)}")
        if self.training:
            few = ", ".join(self.training) if len(self.training) <= 3 else f"{len(self.training)} keys"
            parts.append(f"for training only: {few}")
        return f"{self.path}: {'; '.join(parts)}" if parts else None

    def key(self, field: str) -> str:
        """The key of the file that stands for a field of a preset."""
        return f"{next(key for key, ours in POLICY.items() if ours == field)} of {self.path}"

    def file(self, flag: str) -> Path:
        """The file that it names for an option: as seen from here, else from the configuration or the folder above.

        Raises:
            FileNotFoundError: It is in none of these.
        """
        named = Path(self.flags[flag])
        folders = (Path(), self.path.parent, self.path.parent.parent)
        for path in (folder / named for folder in folders):
            if path.exists():
                return path
        key = next(key for key, name in FLAGS.items() if name == flag)
        option = f"--{flag.replace('_', '-')}"
        where = "neither here nor beside it"
        raise FileNotFoundError(f"{self.path} names {key} {named}, which is {where}: give {option}, or take it out")

    def stand_ins(self, given: Callable[[str], bool]) -> dict[str, Any]:
        """Values for options that are not given, by their names; files as paths, of a LoRA one.

        Args:
            given: Whether an option is.

        Raises:
            FileNotFoundError: A file that it names is not there.
        """
        said = dict(self.flags)
        for group in (LENGTHS, SHOWN, ("ema", "no_ema")):
            if any(map(given, group)):
                said = {name: value for name, value in said.items() if name not in group}
        if given("out") or given("latents"):
            said.pop("output_folder", None)
        if "data_path" not in said:
            said.pop("extended_prompt_path", None)
        files = ("weights", "lora", "data_path", "extended_prompt_path")
        return {
            name: self.file(name) if name in files else Path(value) if name == "output_folder" else value
            for name, value in said.items()
            if not given(name)
        }


def read_research(path: str | Path) -> Research:
    """The configuration of a YAML file. Raises FileNotFoundError, or ValueError that names the file and the key."""
    from flexkern.render.texts import read_data

    path = Path(path)
    content = read_data(path, "configuration")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    nested = content.pop("model_kwargs", None) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: model_kwargs must be a mapping, got {nested!r}")
    said = {str(key): value for key, value in (content | nested).items() if value not in (None, ABSENT)}
    try:
        return _research(path, said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _research(path: Path, said: Mapping[str, Any]) -> Research:
    for key in FORMS.keys() & said.keys():
        kind, words = FORMS[key]
        _validate_values(key, said[key])
        fits = isinstance(said[key], kind) and (kind is bool or not isinstance(said[key], bool))
        require(fits, f"{key} must be {words}, got {said[key]!r}")
    policies = {ours: said[key] for key, ours in POLICY.items() if key in said}
    if policies.get("retention.window") == -1:  # all frames of the training length, which the preset knows
        del policies["retention.window"]
    preset, preset_key = _method(said)
    unsupported, training, unknown = _unused(said)
    most = said.get("inference_iter", -1)
    return Research(
        path=path,
        family=_family(said),
        policies=policies,
        preset=preset,
        preset_key=preset_key,
        flags=_flags(said),
        switches=_switches(said.get("switch_frame_indices")),
        most=None if most < 0 else max(1, most),
        lora_scale=_lora_scale(said.get("adapter")),
        unsupported=unsupported,
        training=training,
        unknown=unknown,
    )


def _validate_values(key: str, value: Any) -> None:
    """Raises ValueError for numbers that are not finite, and for what OmegaConf would put another value in place of."""
    if isinstance(value, dict):
        for name, one in value.items():
            _validate_values(f"{key}.{name}", one)
    for one in value if isinstance(value, list) else (value,):
        require(not isinstance(one, float) or math.isfinite(one), f"{key} must be finite, got {value}")
        told = f"{key} is {value!r}, in which OmegaConf would fill in ${{...}}; that is not done here: write it out"
        require(not isinstance(one, str) or "${" not in one, told)


def _validate_schedule(family: Mapping[str, Any]) -> None:
    """Raises ValueError, with the file's own keys, for what no schedule takes."""
    names = {ours: key for key, ours in FAMILY.items() if ours != "chunk"}
    try:
        Schedule(**{"warp": False} | {ours: family[ours] for ours in names if ours in family})
    except (ValueError, TypeError) as error:
        ours, _, rest = str(error).removeprefix("Schedule.").partition(" ")
        raise ValueError(f"{names.get(ours, ours)} {rest}") from None


def _family(said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``Family`` and ``Schedule``."""
    family = {ours: said[key] for key, ours in FAMILY.items() if key in said}
    for key in ("denoising_step_list", "denoising_step_list_first_chunk"):
        if (steps := family.get(FAMILY[key])) is not None:
            numbers = all(isinstance(step, int | float) and not isinstance(step, bool) for step in steps)
            require(numbers, f"{key} must be a list of numbers, got {steps!r}")
            family[FAMILY[key]] = tuple(steps)
    _validate_schedule(family)
    if said.get("independent_first_frame"):
        family["first_chunk"] = 1
    if (shape := said.get("image_or_video_shape")) is not None:
        whole = len(shape) == 5 and all(isinstance(size, int) and size > 0 for size in shape)
        require(whole, f"image_or_video_shape must be 5 whole numbers [B, F, C, h, w], got {shape!r}")
        require(shape[2] == 16, f"image_or_video_shape has {shape[2]} channels; expected 16, as Wan 2.1 has")
        family["size"] = (shape[3], shape[4])
    return family


def _method(said: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The preset that a configuration asks for, and by which key."""
    if said.get("use_infinite_attention"):
        return INFINITE, "use_infinite_attention"
    if (name := said.get("compression_method")) is None:
        return None, None
    require(name in COMPRESSIONS, f"compression_method must be {' or '.join(COMPRESSIONS)}, got {name!r}")
    return COMPRESSIONS[name], "compression_method"


def _flags(said: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in for options; where two keys mean one, the first of ``FLAGS`` wins."""
    flags = {}
    for key, name in reversed(FLAGS.items()):
        if key in said:
            flags[name] = said[key]
    for name in ("num_output_frames", "num_samples"):
        require(flags.get(name, 1) >= 1, f"{name} must be at least 1, got {flags.get(name)}")
    require(flags.get("seed", 0) >= 0, f"seed must be a whole number >= 0, got {flags.get('seed')}")
    if "use_ema" in said:
        flags["ema" if said["use_ema"] else "no_ema"] = True
    return flags


def _switches(said: Any) -> tuple[int, ...] | None:
    """The latent frames of switch_frame_indices: a number, a list of them, or text with commas."""
    if said is None:
        return None
    words = said.split(",") if isinstance(said, str) else said if isinstance(said, list) else [said]
    told = f"switch_frame_indices must be latent frames that ascend from at least 1, got {said!r}"
    require(all(str(word).strip().isdigit() for word in words), told)
    frames = tuple(int(word) for word in words)
    require(all(a < b for a, b in zip((0, *frames), frames, strict=False)), told)
    return frames or None


def _lora_scale(adapter: Mapping[str, Any] | None) -> float:
    """alpha / rank, as far as an adapter says it."""
    if adapter is None:
        return 1.0
    kind, rank = adapter.get("type", "lora"), adapter.get("rank")
    require(kind == "lora", f"adapter.type must be lora, got {kind!r}")
    alpha = adapter.get("alpha", rank)
    fine = all(isinstance(value, int | float) and value > 0 for value in (rank, alpha) if value is not None)
    require(fine, f"adapter.rank and adapter.alpha must be numbers above 0, got {rank!r} and {alpha!r}")
    return 1.0 if rank is None or alpha is None else alpha / rank


def _unused(said: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The keys that are not used: unsupported, those of training, unknown; what is off is not named."""
    known = {*FORMS, *FAMILY, *POLICY, *FLAGS, *OTHERS}
    rest = sorted(key for key in said if key not in known)
    fits = lambda key, patterns: any(fnmatchcase(key, pattern) for pattern in patterns)
    models = [key for key in ("model_name", "generator_name") if key in rest]
    training = tuple(key for key in rest if key not in models and fits(key, TRAINING))
    unsupported = [key for key in rest if key not in (*models, *training) and fits(key, MATTER) and said[key]]
    off = [key for key in rest if key not in (*models, *training) and fits(key, MATTER) and not said[key]]
    unknown = tuple(key for key in rest if key not in (*models, *training, *unsupported, *off))
    unsupported += [f"{key} {said[key]}" for key in models if said[key] not in KNOWN_MODELS]
    if said.get("ema_adaptive"):
        unsupported.append("ema_adaptive")
    if said.get("save_with_index") is False:
        unsupported.append("save_with_index: false (videos are named by number)")
    if "adapter" in said and "lora_ckpt" not in said:
        unsupported.append("adapter without lora_ckpt")
    return tuple(unsupported), training, unknown
