"""Errors as HTTP responses in the format of OpenAI's API."""

import re
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError

from diffusify.config import nearest
from diffusify.serving.api.chat_schemas import ChatBody
from diffusify.serving.api.openai_schemas import CompletionBody
from diffusify.serving.api.schemas import UNSUPPORTED_FIELDS, InfillBody
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
    if isinstance(error, RecursionError):
        return ErrorResponse(400, "the request is nested too deeply")
    if isinstance(error, ValueError):
        field_name = re.match(r"(\w+)(=|: )", str(error))  # messages about one field start with its name
        return ErrorResponse(400, str(error), param=field_name[1] if field_name else None)
    return ErrorResponse(500, "internal server error; see the server's log for details", "server_error")


def invalid_body(error: RequestValidationError, content_type: str | None) -> ErrorResponse:
    """The response for a body that does not fit its schema: one line about the first field that is wrong."""
    first = error.errors()[0]
    # Pydantic also names the alternatives of a type, such as `str` and `list[str]`.
    path = [str(part) for part in first["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    param = ".".join(part for part in path if part not in ("str", "int", "float", "bool", "dict"))
    if first["type"] == "extra_forbidden":
        return ErrorResponse(400, _unknown_field(path[-1]), param=param)
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ErrorResponse(400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}")
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if not param and "json" not in (content_type or ""):
        message = f"the request has Content-Type {content_type or 'of no kind'}; send JSON as application/json"
    return ErrorResponse(400, f"{param or 'body'}: {message}", param=param or None)


_FIELDS = sorted({name for body in (CompletionBody, ChatBody, InfillBody) for name in body.model_fields})


def _unknown_field(name: str) -> str:
    """The error message for an unknown field, with the most similar known one."""
    reason = UNSUPPORTED_FIELDS.get(name)
    return f'"{name}" is not supported; {reason}' if reason else f'"{name}" is not known{nearest(name, _FIELDS)}'
