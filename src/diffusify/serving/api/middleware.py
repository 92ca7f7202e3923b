"""Who and what may come in: keys, sizes and patience; and a line in the log for each who did."""

import asyncio
import json
import logging
import secrets
from time import monotonic
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusify.serving.api.errors import Problem
from diffusify.serving.api.service import Service
from diffusify.serving.limits import Limits

log = logging.getLogger("diffusify.serving")
OPEN = ("/", "/health", "/ready")
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class RequestMiddleware:
    """ASGI middleware around the whole server.

    A request's body is read here, up to a size and for a time, so that nobody can hold the server with half a request.
    """

    def __init__(
        self, app: ASGIApp, *, serving: Service, limits: Limits, keys: tuple[str, ...], log_prompts: bool
    ) -> None:
        self.app, self.serving, self.limits, self.keys, self.log_prompts = app, serving, limits, keys, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = monotonic(), 0
        body = b""

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                body, refusal = await self._body(receive)
            if refusal is not None:
                answer = JSONResponse(refusal.body, refusal.status, refusal.headers)
                await answer(scope, receive, told)
            else:
                await self.app(scope, _again(body, receive), told)
        finally:
            self._note(scope, body, status, monotonic() - began)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Why somebody has to stay outside."""
        path, headers = scope["path"], dict(scope["headers"])
        if self.keys and path not in OPEN and not path.startswith("/playground/"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not any([secrets.compare_digest(given, key.encode()) for key in self.keys]):
                way = "send one as `Authorization: Bearer KEY`"
                return Problem(401, f"this server asks for a key; {way}", code="invalid_api_key")
        size = headers.get(b"content-length", b"0")
        if not size.isdigit() or int(size) > self.limits.body:
            return self._too_large()
        if not self.serving.ready and path.startswith("/v1/"):
            return Problem(503, "the server is ending", "server_error", headers={"Retry-After": "1"})
        return None

    def _too_large(self) -> Problem:
        return Problem(413, f"the request is longer than {self.limits.body} bytes", headers={"Connection": "close"})

    async def _body(self, receive: Receive) -> tuple[bytes, Problem | None]:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.patience):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body:
                        return b"", self._too_large()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return b"".join(parts), None
        except TimeoutError:
            slow = f"the request did not arrive within {self.limits.patience:g} s"
            return b"", Problem(408, slow, "timeout_error", headers={"Connection": "close"})

    def _note(self, scope: Scope, body: bytes, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.serving.metrics.answered(path, status, seconds)
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


def _again(body: bytes, receive: Receive) -> Receive:
    """The body, which has been read, and then whatever else comes."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
