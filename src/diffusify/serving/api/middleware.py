"""ASGI middleware: API keys, limits on a request's size and arrival time, security headers, and the request log."""

import asyncio
import json
import logging
import secrets
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusify.serving.api.errors import ErrorResponse, to_error_response
from diffusify.serving.api.service import Service
from diffusify.serving.limits import Limits

log = logging.getLogger("diffusify.serving")
PUBLIC_PATHS = ("/", "/health", "/ready")  # answered without a key
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class RequestMiddleware:
    """Checks, limits and logs every request.

    The whole body is read here, up to `limits.body_bytes` and within `limits.receive_timeout`, so that an incomplete
    request holds no resources.
    """

    def __init__(
        self, app: ASGIApp, *, service: Service, limits: Limits, keys: tuple[str, ...], log_prompts: bool
    ) -> None:
        self.app, self.service, self.limits, self.keys, self.log_prompts = app, service, limits, keys, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = monotonic(), 0
        body = b""

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            refused = self._check(scope)
            if refused is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                body, refused = await self._read_body(receive)
            if refused is not None:
                await refused.response(scope, receive, send_with_headers)
            else:
                await self.app(scope, _replay(body, receive), send_with_headers)
        except Exception as error:
            if not status:
                await to_error_response(error).response(scope, receive, send_with_headers)
            raise  # to the log
        finally:
            self._log(scope, body, status, monotonic() - started)

    def _check(self, scope: Scope) -> ErrorResponse | None:
        """The error for a request that is refused by its headers alone, else None."""
        path, headers = scope["path"], dict(scope["headers"])
        if self.keys and path not in PUBLIC_PATHS and not path.startswith("/playground/"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not any([secrets.compare_digest(given, key.encode()) for key in self.keys]):
                message = "this server requires an API key; send one as `Authorization: Bearer KEY`"
                return ErrorResponse(401, message, code="invalid_api_key")
        size = headers.get(b"content-length", b"0")
        if not size.isdigit() or int(size) > self.limits.body_bytes:
            return self._too_large()
        if not self.service.ready and path.startswith("/v1/"):
            return ErrorResponse(503, "the server is shutting down", "server_error", headers={"Retry-After": "1"})
        return None

    def _too_large(self) -> ErrorResponse:
        message = f"the request body is longer than {self.limits.body_bytes} bytes"
        return ErrorResponse(413, message, headers={"Connection": "close"})

    async def _read_body(self, receive: Receive) -> tuple[bytes, ErrorResponse | None]:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.limits.receive_timeout):
                while True:
                    message = await receive()
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.limits.body_bytes:
                        return b"", self._too_large()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return b"".join(chunks), None
        except TimeoutError:
            message = f"the request did not arrive within {self.limits.receive_timeout:g} s"
            return b"", ErrorResponse(408, message, "timeout_error", headers={"Connection": "close"})

    def _log(self, scope: Scope, body: bytes, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path_format", "other")
        self.service.metrics.observe_request(path, status, seconds)
        job = scope.get("state", {}).get("job")
        line: dict[str, Any] = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 3),
            "model": getattr(job, "model", None),
            "forwards": getattr(getattr(job, "work", None), "forwards", None),
        }
        if self.log_prompts:
            line["body"] = body.decode(errors="replace")
        log.info(json.dumps({key: value for key, value in line.items() if value is not None}))


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body, which has been read already, and then later messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
