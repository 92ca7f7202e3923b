"""Errors as HTTP responses in the format of OpenAI's API."""

import re
from dataclasses import dataclass, field
from typing import Any

from diffusify.serving.engine.engine import QueueFull
from diffusify.serving.engine.model_pool import UnknownModel


class ClientDisconnected(Exception):
    """The client closed the connection before its response was ready."""


@dataclass(frozen=True)
class ErrorResponse:
    """An HTTP status with an error object; `param` is the request field that caused it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def to_error_response(error: BaseException) -> ErrorResponse:
    """The response for an exception. An unexpected one becomes status 500 without details."""
    if isinstance(error, QueueFull):
        return ErrorResponse(429, str(error), "rate_limit_error", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ClientDisconnected):
        return ErrorResponse(499, "the client closed the connection")
    if isinstance(error, UnknownModel):
        return ErrorResponse(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TimeoutError):
        return ErrorResponse(408, str(error), "timeout_error")
    if isinstance(error, ValueError):
        field_name = re.match(r"(\w+)(=|: )", str(error))  # messages about one field start with its name
        return ErrorResponse(400, str(error), param=field_name[1] if field_name else None)
    return ErrorResponse(500, "internal server error; see the server's log for details", "server_error")
