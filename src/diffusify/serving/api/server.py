"""The server as a process: it listens, is patient but not too patient, and ends without losing an answer."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


class Server(uvicorn.Server):
    """Listens until SIGTERM or SIGINT; requests that have been taken in are answered first.

    A client that needs longer than `patience` seconds to say what it wants is hung up on.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        patience: float = 30.0,
        announce: Callable[[str], None] = lambda address: None,
    ) -> None:
        """`announce` is told the address once the server listens; port 0 is any that is free."""
        self.app, self.announce = app, announce
        settings: dict[str, Any] = {"http": _protocol(patience), "timeout_keep_alive": 30}
        logs: dict[str, Any] = {"access_log": False, "server_header": False, "log_config": _log_config()}
        super().__init__(uvicorn.Config(app, host, port, **settings, **logs))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            self.announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.app.state.service.ready = False
        super().handle_exit(sig, frame)


def _protocol(patience: float) -> type[H11Protocol]:
    class Patient(H11Protocol):
        """HTTP that hangs up on clients whose request line and headers do not come to an end."""

        _slow: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self._slow is None and (self.cycle is None or self.cycle.response_complete):
                self._await_headers()
            super().data_received(data)
            if self._slow is not None and self.cycle is not None and not self.cycle.response_complete:
                self._slow.cancel()
                self._slow = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._slow is not None:
                self._slow.cancel()
            super().connection_lost(exc)

        def _await_headers(self) -> None:
            self._slow = asyncio.get_running_loop().call_later(patience, self._hang_up)

        def _hang_up(self) -> None:
            self._slow = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Patient


def _log_config() -> dict[str, Any]:
    """Plain lines on standard error: uvicorn's as they are, ours as JSON."""
    handler = {"class": "logging.StreamHandler", "formatter": "plain"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(message)s"}},
        "handlers": {"plain": handler},
        "loggers": {
            "uvicorn.error": {"handlers": ["plain"], "level": "WARNING", "propagate": False},
            "diffusify.serving": {"handlers": ["plain"], "level": "INFO", "propagate": False},
        },
    }
