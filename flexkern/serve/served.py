"""What a server makes: one model at one size, within limits; and how a request becomes a job of it.

A request fills fields of the job that say what is shown. Which files are read and written is the server's business: no
field of a request becomes a path.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.checks import check_bounds, check_fields, require
from flexkern.policies import get_preset
from flexkern.render.encoding import Encoding
from flexkern.render.script import PromptSwitch, parse_script, seconds_needed
from flexkern.render.spec import JobSpec, SpecError
from flexkern.serve.errors import ApiError
from flexkern.serve.shapes import VideoRequest

if TYPE_CHECKING:
    from flexkern.model.families import Family

SECONDS = 4.0  # of a video whose length is not given, as in the API
EACH = 4.0  # of each of several prompts without times
IN_WINDOW = (  # overrides that count frames in memory
    "retention.sink", "retention.window", "retention.budget", "retention.recent",
    "noise.window", "noise.stride", "switch.recent",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on."""

    seconds: float = field(default=120.0, metadata={"exclusiveMinimum": 0})
    """longest video, in seconds of the model's time"""
    queued: int = field(default=16, metadata={"minimum": 1})
    """videos that may wait; a further one is told to come again"""
    window: int = field(default=48, metadata={"minimum": 1})
    """most latent frames that a request may have kept in memory"""
    body: int = field(default=1 << 20, metadata={"minimum": 1024})
    """bytes of a request"""
    streams: int = field(default=64, metadata={"minimum": 1})
    """connections that follow events or a growing video at a time"""
    tries: int = field(default=3, metadata={"minimum": 1})
    """times that a video is tried whose worker ends with it, or has no room, before it counts as failed"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model of a server.

    Raises:
        ValueError: The job names what to show or where it goes, which are a request's and the server's.
    """

    base: JobSpec
    """model, weights, and how they are run"""
    family: "Family"
    """how its latents become pictures"""
    limits: Limits = Limits()
    example: str | None = None
    """a prompt that it follows"""

    def __post_init__(self) -> None:
        for name in ("prompt", "prompts", "seconds", "frames", "num_output_frames", "out", "latents", "image"):
            require(not getattr(self.base, name), f"the job of a server says nothing of {name}")

    @property
    def name(self) -> str:
        """Of the model, as requests name it."""
        return self.family.name

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of its pictures, as the API has it."""
        height, width = self.family.picture_size
        return f"{width}x{height}"

    @property
    def preset(self) -> str:
        """The method where none is asked for."""
        return self.base.preset or self.family.preset

    def spec(self, request: VideoRequest, out: Path) -> JobSpec:
        """The job of a request, its length in pictures.

        Args:
            request: Valid in itself.
            out: The file that the server gives it.

        Raises:
            ApiError: Names the field that this server cannot or does not do.
        """
        self._validate(request)
        prompts, texts = self._prompts(request)
        given = {name: value for name in ("prompt", "seed", "preset") if (value := getattr(request, name)) is not None}
        encoding = {name: value for name in ("fps", "crf") if (value := getattr(request, name)) is not None}
        preset = request.preset or self.preset
        overrides = self.base.overrides if preset == self.preset else {}
        overrides = dict(overrides) | (request.overrides or {})
        with _told():
            spec = replace(
                self.base,
                **given | {"preset": preset},
                prompts=prompts or texts,
                overrides=overrides,
                frames=self._pictures(request, prompts, texts),
                encoding=Encoding(**encoding),
                out=out,
            )
            held, most = get_preset(preset).override(overrides).retention.pages, self.limits.window
        if (request.overrides or request.preset) and held > most:
            told = f"a video may keep at most {most} latent frames in memory on this server, got {held}"
            raise ApiError(400, "too_large", told, param="overrides" if request.overrides else "preset")
        return spec

    def trial(self, out: Path) -> JobSpec:
        """A job that tells whether the model can be run at all. Raises ValueError where its own settings exclude it.

        Args:
            out: A file that is not there, in a folder that is.
        """
        return replace(self.base, prompt=self.example or "a cat", frames=1, preset=self.preset, out=out)

    def _validate(self, request: VideoRequest) -> None:
        if request.model not in (None, self.name):
            told = f"this server has {self.name}, got another one"
            raise ApiError(400, "model_not_found", told, param="model")
        if request.size not in (None, self.size):
            told = f"this server makes {self.size} (width x height), got {request.size}"
            raise ApiError(400, "invalid_value", told, param="size")
        if (request.prompt is None) == (request.prompts is None):
            told = "give prompt or prompts" + ("" if request.prompt is None else ", not both")
            raise ApiError(400, "missing_value" if request.prompt is None else "invalid_value", told, param="prompt")
        lengths = [name for name in ("seconds", "frames", "num_frames") if getattr(request, name) is not None]
        if len(lengths) > 1:
            raise ApiError(400, "invalid_value", f"give one of {' and '.join(lengths)}", param=lengths[1])
        for name, value in (request.overrides or {}).items():
            for one in value if isinstance(value, list) else [value]:
                most = self.limits.window
                if name.startswith(IN_WINDOW) and isinstance(one, int | float) and one > most:
                    told = f"{name} may be at most {most} frames on this server, got {one}"
                    raise ApiError(400, "too_large", told, param="overrides")

    def _prompts(self, request: VideoRequest) -> tuple[tuple[PromptSwitch, ...], tuple[str, ...]]:
        """The prompts that have times, and those that have none."""
        listed = request.prompts or []
        texts = tuple(one for one in listed if isinstance(one, str))
        timed = [one.model_dump() for one in listed if not isinstance(one, str)]
        if not timed:
            return (), texts
        try:
            return parse_script(timed), ()
        except ValueError as error:
            raise ApiError(400, "invalid_value", f"prompts: {error}", param="prompts") from None

    def _pictures(self, request: VideoRequest, prompts: tuple[PromptSwitch, ...], texts: tuple[str, ...]) -> int:
        """The length of the video. Raises ApiError for one that is too long."""
        from flexkern.engine import frames_for

        asked = request.frames or request.num_frames
        if asked is None:
            usual = max(SECONDS, EACH * len(texts), seconds_needed(prompts))
            seconds = usual if request.seconds is None else float(request.seconds)
            if seconds <= 0:
                raise ApiError(400, "invalid_value", "seconds must be more than 0", param="seconds")
            asked = frames_for(seconds, self.family.fps)
        length, most = asked / self.family.fps, self.limits.seconds
        if length > most:
            told = f"a video may have at most {most:g} seconds on this server, got {length:g}"
            param = next((name for name in ("frames", "num_frames") if getattr(request, name)), "seconds")
            raise ApiError(400, "too_long", told, param=param)
        return asked


def as_script(spec: Mapping[str, Any]) -> list[Any]:
    """The prompts of a job as it is kept, each with its time or as a text."""
    if "prompt" in spec:
        return [{"at": 0.0, "prompt": spec["prompt"], "cut": False}]
    return [one if isinstance(one, str) else {"cut": False, **one} for one in spec["prompts"]]


def problem_of(error: Exception) -> ApiError:
    """What is wrong with a job, for whoever asked for it: no path of this machine is told."""
    name = error.field if isinstance(error, SpecError) else None
    return ApiError(400, "invalid_value", str(error), param=name)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the block that lie in the request become answers."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise problem_of(error) from None
