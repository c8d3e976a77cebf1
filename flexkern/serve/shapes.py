"""What the Videos API takes and gives: field names and values as SGLang, vLLM-Omni and FastVideo have them.

Extensions of ours, beside those fields: ``prompts``, ``frames``, ``preset``, ``overrides``, ``crf``; in a video also
``made``, ``position`` and ``started_at``.

Source: the Videos API as OpenAI documented it until 2026; vllm_omni/entrypoints/openai/protocol/videos.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed")
LONGEST = 4000  # characters of a prompt
MOST = 100  # prompts of a video
TEXT = r"^[^\x00-\x08\x0b-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x08\x0b-\x1f\x7f]*$"  # no control characters, not blank

Text = Annotated[str, Field(min_length=1, max_length=LONGEST, pattern=TEXT)]
SecondsText = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6})?$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Value = bool | int | Number | Annotated[str, Field(max_length=100)] | None
Values = Annotated[list[Value], Field(max_length=1000)]


class Switch(BaseModel):
    """A prompt and when it begins."""

    model_config = ConfigDict(extra="forbid")
    at: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    """seconds from the beginning of the video; 0 for the first"""
    prompt: Text
    cut: bool = False
    """whether a new scene begins, with nothing of the one before"""


class VideoRequest(BaseModel):
    """What to make. One of prompt and prompts is needed; every other field has a default."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    prompt: Text | None = None
    """what the video shows"""
    prompts: (
        Annotated[list[Switch], Field(min_length=1, max_length=MOST)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST)]
        | None
    ) = None
    """what it shows over time: entries with a time each, or texts that follow each other evenly"""
    model: Annotated[str, Field(max_length=200)] | None = None
    """the model that the server has; another one is refused"""
    seconds: SecondsText | Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """length of the video; default: 4, or what the prompts need"""
    frames: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """length of the video in pictures, in place of seconds"""
    num_frames: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """the same as frames, as other servers call it"""
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")] | None = None
    """WIDTHxHEIGHT in pixels; the server makes one size, and refuses others"""
    fps: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] | None = None
    """pictures per second of the file; another rate than the model's shows the same pictures faster or slower"""
    crf: Annotated[int, Field(ge=0, le=51)] | None = None
    """quality of H.264, 0 (lossless) to 51; default: 18"""
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    """of the noise; equal seeds give equal videos. Default: 0"""
    preset: Annotated[str, Field(max_length=100)] | None = None
    """method of horizon extension; default: the server's"""
    overrides: Annotated[dict[Annotated[str, Field(max_length=100)], Value | Values], Field(max_length=100)] | None = (
        None
    )
    """fields of the preset by dotted name, such as retention.sink, to their values"""


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Video(BaseModel):
    """A video that is waiting, being made, or over."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    quality: str = "standard"
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    prompts: list[Switch] | list[str] = []
    preset: str
    overrides: dict[str, Any] = {}
    seed: int
    fps: float
    frames: int
    made: int
    position: int | None = None
    started_at: int | None = None
    render_seconds: float | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class VideoDeleted(BaseModel):
    """A video is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Problem(BaseModel):
    """What was wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str


class Failure(BaseModel):
    """The body of every answer that is no success."""

    error: Problem


class ModelCard(BaseModel):
    """The model that is served, and what may be asked of it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "flexkern"
    preset: str
    presets: list[str]
    size: str
    fps: int
    max_seconds: float
    example: str | None = None


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether videos are being made."""

    status: Literal["ok", "degraded"]
    queued: int
    in_progress: int
    workers: list[str]
