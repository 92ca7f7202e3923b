"""The HTTP server process: a header timeout, and a shutdown that answers all accepted requests."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


class Server(uvicorn.Server):
    """A uvicorn server. On SIGTERM or SIGINT it answers the requests it has accepted, then ends.

    A connection is closed if a request's headers have not arrived within `receive_timeout` seconds.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        receive_timeout: float = 30.0,
        on_listening: Callable[[str], None] = lambda address: None,
    ) -> None:
        """`on_listening` is called with the server's address once it listens; port 0 is any free port."""
        self.app, self.on_listening = app, on_listening
        settings: dict[str, Any] = {"http": _timeout_protocol(receive_timeout), "timeout_keep_alive": receive_timeout}
        logs: dict[str, Any] = {"access_log": False, "server_header": False, "log_config": _log_config()}
        super().__init__(uvicorn.Config(app, host, port, **settings, **logs))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            self.on_listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.app.state.service.ready = False
        super().handle_exit(sig, frame)


def _timeout_protocol(seconds: float) -> type[H11Protocol]:
    class TimeoutProtocol(H11Protocol):
        """HTTP/1.1 that closes a connection whose request line and headers do not arrive in time."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._start_timer()
            super().data_received(data)
            if self._timer is not None and self.cycle is not None and not self.cycle.response_complete:
                self._timer.cancel()
                self._timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._close)

        def _close(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimeoutProtocol


def _log_config() -> dict[str, Any]:
    """Logging to standard error: uvicorn's warnings as plain lines, the server's own lines as JSON."""
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
