"""Errors as HTTP responses in the format of OpenAI's API."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from diffusify.config import nearest
from diffusify.serving.api.schemas import UNSUPPORTED_FIELDS
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

    @property
    def response(self) -> JSONResponse:
        """The response to a request."""
        return JSONResponse(self.body, self.status, self.headers)


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
    if isinstance(error, RecursionError):
        return ErrorResponse(400, "the request is nested too deeply")
    if isinstance(error, ValueError):
        field_name = re.match(r"(\w+)(=|: )", str(error))  # messages about one field start with its name
        return ErrorResponse(400, str(error), param=field_name[1] if field_name else None)
    return ErrorResponse(500, "internal server error; see the server's log for details", "server_error")


_TYPES = ("str", "int", "float", "bool", "dict")


def invalid_body(error: RequestValidationError, fields: Collection[str], content_type: str) -> ErrorResponse:
    """The response for a body that does not fit its schema of `fields`: one line about its first error."""
    first = error.errors()[0]
    loc, kind = first["loc"][1:], first["type"]
    # Pydantic also names the alternatives of a type, such as `str` and `list[str]`.
    path = [str(part) for part in loc if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    param = ".".join(path) or None
    if kind == "extra_forbidden":
        name = ".".join(map(str, loc))
        reason = UNSUPPORTED_FIELDS.get(name)
        unknown = f'"{name}" is not known{nearest(name, fields) if len(loc) == 1 else ""}'
        return ErrorResponse(400, f'"{name}" is not supported; {reason}' if reason else unknown, param=name)
    if kind == "json_invalid":
        return ErrorResponse(400, f"the body is not valid JSON: {first['ctx']['error']} at character {loc[-1]}")
    if param is None and "json" not in content_type:
        message = f'the request has the Content-Type "{content_type}"; send JSON as application/json'
        return ErrorResponse(400, message)
    message = str(first["ctx"]["error"]) if kind == "value_error" else first["msg"]
    return ErrorResponse(400, f"{param or 'body'}: {message}", param=param)
