"""The body of a request to make a video: JSON, or the fields of a form as the other engines take them.

A form is read from memory, which its size bounds; nothing of it reaches the disk.
"""

import json
from collections.abc import Mapping
from email import policy
from email.message import Message
from email.parser import BytesParser
from typing import Any

from pydantic import ValidationError

from flexkern.checks import did_you_mean
from flexkern.serve.errors import ApiError
from flexkern.serve.shapes import VideoRequest

JSON, FORM = "application/json", "multipart/form-data"
AS_JSON = ("prompts", "overrides", "extra_body")  # fields of a form that hold JSON
FOREIGN = {  # fields of other servers: what to do here
    "input_reference": "this server makes videos from text alone",
    "image_reference": "this server makes videos from text alone",
    "reference_url": "this server makes videos from text alone",
    "negative_prompt": "a few-step model takes no negative prompt",
    "guidance_scale": "a few-step model takes no guidance",
    "guidance_scale_2": "a few-step model takes no guidance",
    "num_inference_steps": "the steps are those of the model's schedule",
    "n": "a request makes one video",
    "num_outputs_per_prompt": "a request makes one video",
    "width": "give size as WIDTHxHEIGHT",
    "height": "give size as WIDTHxHEIGHT",
    "output_path": "the server alone says where a file goes",
}


def read_request(body: bytes, content_type: str) -> VideoRequest:
    """What a body asks for, each field valid in itself.

    Args:
        body: All of it.
        content_type: As the request has it.

    Raises:
        ApiError: It is of another kind, or names the first field that will not do.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == JSON:
            return VideoRequest.model_validate_json(body, strict=True)
        if kind == FORM:
            return VideoRequest.model_validate(_fields(body, content_type))
    except ValidationError as error:
        raise _told(error) from None
    got = f"{kind!r:.60}" if kind else "none"
    raise ApiError(415, "unsupported_media_type", f"the body must be {JSON} or {FORM}, got {got}")


def _fields(body: bytes, content_type: str) -> dict[str, Any]:
    """The fields of a form. Raises ApiError where it is none."""
    try:
        head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode("latin-1")
        form = BytesParser(policy=policy.HTTP).parsebytes(head + body)
        if form.defects or not form.is_multipart():
            raise ValueError("it has no boundary, or no end")
        given = [_field(part) for part in form.iter_parts()]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ApiError(400, "invalid_form", f"the body is not a form of {FORM}: {error!s:.200}") from None
    found: dict[str, Any] = {}
    for name, text in given:
        if name in found:
            raise ApiError(400, "invalid_value", "a field of the form comes twice", param=name[:100])
        if text == "":  # what a form sends for a field that was left empty
            continue
        found[name] = _json(name, text) if name in AS_JSON else text
    more = found.pop("extra_body", None)
    if more is not None and not isinstance(more, dict):
        raise ApiError(400, "invalid_value", "extra_body must be a mapping of fields", param="extra_body")
    return found | (more or {})


def _field(part: Message) -> tuple[str, str]:
    """Name and text of a part. Raises ValueError."""
    name = part.get_param("name", header="content-disposition")
    if not isinstance(name, str) or not name:
        raise ValueError("a part has no name")
    if part.get_filename() is not None:
        raise ApiError(400, "unsupported_field", FOREIGN.get(name, "files are not taken"), param=name[:100])
    content = part.get_payload(decode=True)
    if part.is_multipart() or not isinstance(content, bytes):
        raise ValueError("a part is a form itself")
    return name, content.decode("utf-8")


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_value", f"{name} of a form must be JSON", param=name) from None


def _told(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in the API's words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where: tuple[Any, ...] = first["loc"]
    name = str(where[0])[:100] if where else None
    if first["type"] == "extra_forbidden" and len(where) == 1 and name is not None:
        why = FOREIGN.get(name) or f"there is no such field{did_you_mean(name, VideoRequest.model_fields)}"
        return ApiError(400, "unknown_field", f"{name}: {why}", param=name)
    if name is None:
        return ApiError(400, "invalid_json", f"the body must be an object of JSON: {first['msg']}")
    inside = [str(part) for part in where[1:] if isinstance(part, int) or part in ("at", "prompt", "cut")]
    spot = ".".join([name, *inside])
    return ApiError(400, "invalid_value", f"{spot}: {first['msg']}", param=name)


def form_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a form, made from that of JSON."""
    properties = dict(schema["properties"])
    properties["prompts"] = {"type": "string", "description": "as JSON"}
    properties["overrides"] = {"type": "string", "description": "as JSON"}
    properties["extra_body"] = {"type": "string", "description": "further fields, as an object of JSON"}
    return {**schema, "properties": properties, "title": "VideoForm"}
