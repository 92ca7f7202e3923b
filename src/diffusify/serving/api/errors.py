"""What went wrong, as OpenAI's clients expect to be told."""

import re
from dataclasses import dataclass, field
from typing import Any

from diffusify.serving.engine.engine import Busy
from diffusify.serving.engine.model_pool import UnknownModel


class ClientDisconnected(Exception):
    """The client did not wait for its answer."""


@dataclass(frozen=True)
class Problem:
    """A status and a message."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def problem(error: BaseException) -> Problem:
    """What a client is told of an error; of a fault of ours, no more than that."""
    if isinstance(error, Busy):
        return Problem(429, str(error), "rate_limit_error", headers={"Retry-After": str(error.seconds)})
    if isinstance(error, ClientDisconnected):
        return Problem(499, "the client has gone")
    if isinstance(error, UnknownModel):
        return Problem(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TimeoutError):
        return Problem(408, str(error), "timeout_error")
    if isinstance(error, ValueError):
        named = re.match(r"(\w+)(=|: )", str(error))  # as errors begin that are about one setting
        return Problem(400, str(error), param=named[1] if named else None)
    return Problem(500, "the server made a mistake; its log has the details", "server_error")
