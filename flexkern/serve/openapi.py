"""The description of the API, as it is: what the handlers read by themselves, and errors of one form."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from flexkern.serve.forms import FORM, JSON, form_schema
from flexkern.serve.shapes import Failure, VideoRequest

REF = "#/components/schemas/{model}"
WHY = {
    400: "Something in the request will not do; error.param names it",
    401: "The token is missing, or another one",
    403: "The request is for another host, or from a page of another origin",
    404: "There is no such video, or it has no such file yet",
    408: "The body did not come in time",
    409: "The video is over already",
    413: "The body is too large",
    415: "The body is neither JSON nor a form",
    416: "The range is not in the file",
    429: "As many wait as may; Retry-After says when to come again",
    503: "The server is being stopped",
    507: "The disk has no room",
}
CREATE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
            FORM: {"schema": {"$ref": "#/components/schemas/VideoForm"}},
        },
    }
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a handler that are no success."""
    return {status: {"model": Failure, "description": WHY[status]} for status in (*statuses, 401, 403)}


def finished_schema(app: FastAPI, *, needs_token: bool) -> dict[str, Any]:
    """The OpenAPI description of the application.

    Args:
        app: With its routes.
        needs_token: Whether requests need one.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = found["components"]["schemas"]
    request = VideoRequest.model_json_schema(ref_template=REF)
    schemas |= request.pop("$defs", {})
    schemas["VideoRequest"], schemas["VideoForm"] = request, form_schema(request)
    for methods in found["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # of FastAPI; what is wrong gets 400 here
            if needs_token and not operation.get("x-open"):
                operation["security"] = [{"token": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if needs_token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = found
    return found
