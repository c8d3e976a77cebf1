"""What a job file says of one video, before anything is looked at: the options of ``flexkern render``, as data.

    {"model": "demo", "prompt": "a red disc and a blue square on dark green, fast", "seconds": 15, "out": "disc.mp4"}

``flexkern.render.Order`` is what becomes of it once model, length and targets are known.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flexkern.checks import check_bounds, check_fields, did_you_mean, hints_of, require
from flexkern.policies import get_preset
from flexkern.render.encoding import STDOUT, Encoding, read_encoding
from flexkern.render.script import PromptSwitch, parse_script, validate_prompt, validate_script
from flexkern.render.texts import parse_time

COUNT = {"minimum": 1}
EXCLUSIVE = (
    ("prompt", "prompts"), ("seconds", "frames"), ("seconds", "num_output_frames"), ("frames", "num_output_frames"),
    ("out", "latents"),
)  # fmt: skip


class SpecError(ValueError):
    """A field of a job that will not do."""

    def __init__(self, field: str, message: str, entry: int | None = None):
        super().__init__(message)
        self.field, self.entry = field, entry


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One video, as a job file says it. Each field is the option of ``flexkern render`` of the same name.

    Raises:
        SpecError: A ValueError that names the field: its type, its range, or another one that excludes it.
    """

    model: str = "demo"
    """demo, a safetensors file of its form, or the family of the weights: self-forcing, longlive, causvid,
    rolling-forcing, reward-forcing, wan-diffusers"""
    weights: Path | None = None
    """weight file or folder, in any published layout; a VAE and a text encoder beside the weights are found"""
    vae: Path | None = None
    """Wan2.1_VAE.pth, a diffusers vae folder, or a tiny decoder (taew2_1)"""
    text_encoder: Path | None = None
    """models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of UMT5"""
    tokenizer: Path | None = None
    """folder of the tokenizer"""
    embeddings: Path | None = None
    """file of the prompts' embeddings, used instead of a text encoder; written if it does not exist yet"""
    lora: tuple[Path, ...] = ()
    """LoRAs to add to the transformer"""
    lora_scale: tuple[float, ...] = ()
    """factor on each LoRA's own scale; none or one for each"""
    ema: bool | None = None
    """true requires the averaged (EMA) weights, false takes the raw ones; without it they are used if there are any"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """dtype of the transformer's weights; default: bfloat16"""
    config_path: Path | None = None
    """configuration of a research repository, in place of what is not said here"""
    size: str | None = None
    """HEIGHTxWIDTH of the pictures in pixels, such as 480x832"""
    chunk: int | None = field(default=None, metadata=COUNT)
    """latent frames denoised together; default: as the checkpoint was trained"""
    first_chunk: int | None = field(default=None, metadata=COUNT)
    """latent frames of the first chunk"""
    preset: str | None = None
    """method of horizon extension, see `flexkern presets`; default: flex, or the one that the model brings"""
    overrides: Mapping[str, object] = field(default_factory=dict, hash=False)
    """fields of the preset by dotted name, such as retention.sink, to their values"""
    prompt: str | None = None
    """what the video shows"""
    prompts: tuple[PromptSwitch, ...] | tuple[str, ...] = ()
    """prompts over time: entries with a time each, or a mapping of times to prompts; or texts that follow each other
    evenly"""
    image: Path | None = None
    """picture to begin with"""
    seconds: float | None = field(default=None, metadata={"exclusiveMinimum": 0})
    """length of the video, a number or a time such as 1:30; default: 10, or what the prompts need"""
    frames: int | None = field(default=None, metadata=COUNT)
    """length of the video in pictures"""
    num_output_frames: int | None = field(default=None, metadata=COUNT)
    """length of the video in latent frames"""
    seed: int = field(default=0, metadata={"minimum": 0, "maximum": 2**64 - 1})
    """of the noise; equal seeds give equal videos"""
    out: Path | None = None
    """video to write: .mp4, .mov, FOLDER/%06d.png for a picture each, or - for stdout"""
    latents: Path | None = None
    """write latents to this safetensors file instead"""
    encoding: Encoding = Encoding()
    """how pictures become the video"""
    backend: str = "auto"
    """implementation of attention, one of those that `flexkern doctor` lists"""
    device: str | None = None
    """cpu, cuda or cuda:N; default: the first GPU, or the CPU if there is none"""
    threads: int | None = field(default=None, metadata=COUNT)
    """CPU threads that torch uses"""

    def __post_init__(self) -> None:
        try:
            check_fields(self)
            check_bounds(self)
        except (TypeError, ValueError) as error:
            name, _, said = str(error).removeprefix("JobSpec.").partition(" ")
            raise SpecError(name, f"{name} {said}") from None
        for one, other in EXCLUSIVE:
            if getattr(self, one) and getattr(self, other):
                raise SpecError(other, f"give {one} or {other}, not both")
        with said_of("prompt"):
            if self.prompt is not None:
                validate_prompt(self.prompt)
        if self.lora_scale and len(self.lora_scale) != len(self.lora):
            told = f"got {len(self.lora)} of lora and {len(self.lora_scale)} of lora_scale"
            raise SpecError("lora_scale", f"lora_scale has one number for each lora, or is left out: {told}")
        with said_of("prompts"):
            if script := self.script:
                validate_script(script)
            for text in self.texts:
                validate_prompt(text)
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in self.overrides.items()}
        object.__setattr__(self, "overrides", lists)
        with said_of("preset"):
            get_preset(self.preset or "flex")
        if self.preset is not None:
            with said_of("overrides"):
                get_preset(self.preset).override(self.overrides)

    @property
    def target(self) -> Path:
        """The file to write. Raises ValueError where none is said."""
        target = self.latents or self.out
        if target is None:
            raise ValueError("a job needs out or latents, the file to write")
        return target

    @property
    def script(self) -> tuple[PromptSwitch, ...]:
        """The prompts that have times."""
        return tuple(one for one in self.prompts if isinstance(one, PromptSwitch))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that follow each other, without times."""
        return tuple(one for one in self.prompts if isinstance(one, str))

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, in types that JSON knows; ``from_dict`` reads it back."""
        return {
            f.name: _plain(value)
            for f in fields(self)
            if (value := getattr(self, f.name)) != (f.default if f.default is not MISSING else {})
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], folder: Path = Path()) -> "JobSpec":
        """The job that YAML or JSON was read to.

        Args:
            content: The fields by name; what has a default may be left out.
            folder: What relative paths start from.

        Raises:
            SpecError: Names the field and what is wrong in it.
        """
        hints, given = hints_of(cls), {}
        for name, value in content.items():
            if name not in hints:
                raise SpecError(str(name), f"a job has no field {name!r}{did_you_mean(name, hints)}")
            with said_of(name):
                given[name] = _read(name, value, hints[name], folder)
        return cls(**given)


class said_of:
    """A ValueError of the block becomes a SpecError of this field."""

    def __init__(self, field: str):
        self.field = field

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError | TypeError) and not isinstance(error, SpecError):
            raise SpecError(self.field, str(error), getattr(error, "entry", None)) from None


def _read(name: str, value: Any, hint: Any, folder: Path) -> Any:
    """The value of a field from what YAML or JSON holds; of what does not fit it is returned, to be refused later."""
    if name == "prompts" and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if name == "prompts":
        return parse_script(value)
    if name == "seconds" and value is not None:
        return parse_time(value, "seconds")
    if name == "encoding":
        return read_encoding(value)
    if name == "overrides" and isinstance(value, dict):
        bad = [key for key in value if not isinstance(key, str)]
        require(not bad, f"overrides has names of fields, such as retention.sink, got {bad[0] if bad else None!r}")
    if name == "model" and isinstance(value, str) and Path(value).suffix and (folder / value).is_file():
        return str(folder / value)
    if name in ("lora", "lora_scale"):
        value = tuple(value) if isinstance(value, list) else (value,)
        return tuple(_path(one, folder) for one in value) if name == "lora" else value
    return _path(value, folder) if Path in (hint, *get_args(hint)) else value


def _path(value: Any, folder: Path) -> Any:
    """A path from text, seen from the folder; - stays what it is."""
    if not isinstance(value, str):
        return value
    require(bool(value), "a path must not be empty")
    return STDOUT if value == "-" else folder / Path(value).expanduser()


def _plain(value: Any) -> Any:
    """A value in types that JSON knows."""
    if isinstance(value, PromptSwitch):
        return {"at": value.at, "prompt": value.prompt} | ({"cut": True} if value.cut else {})
    if isinstance(value, Encoding):
        return {f.name: had for f in fields(value) if (had := getattr(value, f.name)) != f.default}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
