"""Errors of the API, in the one form that every answer has: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

TYPES = {  # by status; the rest of 4xx are invalid requests
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: Of HTTP.
        code: For programs.
        message: For people: what was expected, and what came.
        param: The field that is wrong.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """What the client reads."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def not_found(identity: str) -> ApiError:
    """There is no such video. What was asked for is not repeated."""
    del identity
    return ApiError(404, "not_found", "there is no video of that id", param="video_id")
