"""An order: one video to make, as a job file, a queue or an HTTP body carries it.

{"script": [{"at": 0, "prompt": "a cat walks on grass", "cut": false}], "pictures": 960, "target": "cat.mp4",
 "preset": "flex", "overrides": {"retention.sink": 6}, "seed": 0, "writes": "video", "image": null,
 "encoding": {"fps": null, "crf": 18, "format": null}}
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flexkern.checks import check_fields, did_you_mean, python_numbers, require
from flexkern.policies import Preset, get_preset, idle_fields
from flexkern.render.encoding import Encoding, read_encoding
from flexkern.render.latents import validate_latents_target
from flexkern.render.outputs import validate_output
from flexkern.render.script import PromptSwitch, parse_script, validate_cuts, validate_script


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One video to make: what it shows, how long, by which method, and where it goes.

    Which model makes it is not said here: orders are for whatever engine runs them.

    Raises:
        TypeError: A field is of another type.
        ValueError: A value is out of range, the script or the target's name will not do, the preset or a field of it
            is unknown, or the preset cannot follow a cut.
    """

    script: tuple[PromptSwitch, ...]
    """what is shown, in order of time; the first prompt holds from second 0"""
    pictures: int
    """length of the video"""
    target: Path
    """the file: .mp4, .mov or FOLDER/%06d.png for a video, - for stdout, .safetensors for latents"""
    preset: str
    """name of the method"""
    overrides: Mapping[str, object] = field(default_factory=dict, hash=False)
    """fields of the preset by dotted name, such as retention.sink, to their values"""
    seed: int = 0
    """of the noise, below 2^64; the same seed gives the same video"""
    writes: Literal["video", "latents"] = "video"
    """whether latents are decoded, or written as they are"""
    image: Path | None = None
    """the first picture; scaled and cut to the size of the video"""
    encoding: Encoding = Encoding()
    """rate and quality of the video"""

    def __post_init__(self) -> None:
        check_fields(self)
        validate_script(self.script)
        require(self.pictures >= 1, f"pictures must be at least 1, got {self.pictures}")
        require(self.seed >= 0, f"seed must be a whole number >= 0, got {self.seed}")
        require(self.seed < 2**64, f"seed must be below 2^64, got {self.seed}")
        if self.writes == "video":
            self.encoding.form(self.target)
        else:
            named = self.target.suffix.lower() == ".safetensors"
            require(named, f"latents must be named .safetensors, got {self.target.name!r}")
        given = {name: python_numbers(value) for name, value in self.overrides.items()}
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        object.__setattr__(self, "overrides", tuples)
        validate_cuts(self.method, self.script)

    @property
    def method(self) -> Preset:
        """The preset with its overrides."""
        return get_preset(self.preset).override(self.overrides)

    @property
    def idle(self) -> tuple[str, ...]:
        """The overrides that change nothing, such as noise.window where the noise has none."""
        return tuple(name for name in idle_fields(self.method) if name in self.overrides)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the script, each once."""
        return tuple(dict.fromkeys(switch.prompt for switch in self.script))

    def validate_files(self) -> None:
        """Raises ValueError, FileNotFoundError or PermissionError where the target cannot be written."""
        if self.writes == "latents":
            validate_latents_target(self.target)
        else:
            validate_output(self.target, self.encoding)

    def to_dict(self) -> dict[str, Any]:
        """The order in types that JSON knows; ``from_dict`` reads it back."""
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in self.overrides.items()}
        return {
            "script": [{"at": switch.at, "prompt": switch.prompt, "cut": switch.cut} for switch in self.script],
            "pictures": self.pictures,
            "target": str(self.target),
            "preset": self.preset,
            "overrides": lists,
            "seed": self.seed,
            "writes": self.writes,
            "image": None if self.image is None else str(self.image),
            "encoding": asdict(self.encoding),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Order":
        """The order that ``to_dict`` gave, or that someone wrote by hand; what has a default may be left out.

        Args:
            content: The fields by name, the script as a list of {at: seconds, prompt: text}, optionally cut.

        Raises:
            ValueError: Says what is missing, unknown or wrong.
        """
        names = [f.name for f in fields(cls)]
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        for name in content:
            require(name in names, f"an order has no field {name!r}{did_you_mean(name, names)}")
        for name in needed:
            require(name in content, f"an order needs {', '.join(needed)}, got no {name}")
        given = dict(content) | {"script": parse_script(content["script"])}
        if "encoding" in given:
            given["encoding"] = read_encoding(given["encoding"])
        for name in ("target", "image"):
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(str(error)) from None
