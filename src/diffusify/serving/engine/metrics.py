"""Prometheus metrics of a server."""

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry, "namespace": "diffusify"}
        by_model = {"labelnames": ["model"], **shared}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **shared)
        self.refused = Counter("refused", "Requests refused because too many were waiting.", **shared)
        self.tokens = Counter("tokens", "Generated tokens.", **by_model)
        self.forwards = Counter("forwards", "Forward passes, each shared by all running requests.", **by_model)
        self.rows = Histogram("batch_rows", "Texts that shared a step.", buckets=(1, 2, 4, 8, 16, 32, 64), **by_model)
        self.tokens_per_forward = Histogram(
            "tokens_per_forward",
            "Tokens of a text per forward pass.",
            buckets=(1, 1.25, 1.5, 2, 3, 4, 8),
            **by_model,
        )
        self.latency = Histogram("request_seconds", "Seconds per request.", ["path"], buckets=_SECONDS, **shared)
        self._waiting = Gauge("waiting", "Requests that wait.", **shared)
        self._running_rows = Gauge("working_rows", "Texts that are being generated.", **shared)
        self._request_count, self._request_seconds = 0, 0.0

    def set_gauges(self, waiting: Callable[[], int], rows: Callable[[], int]) -> None:
        """Set the functions that give the gauges' values."""
        self._waiting.set_function(waiting)
        self._running_rows.set_function(rows)

    def observe_step(self, model: str, rows: int, passes: int) -> None:
        """Count one step of all running requests."""
        self.rows.labels(model).observe(rows)
        self.forwards.labels(model).inc(passes)

    def observe_text(self, model: str, tokens: int, forwards: int) -> None:
        """Count one finished text."""
        self.tokens.labels(model).inc(tokens)
        self.tokens_per_forward.labels(model).observe(tokens / max(1, forwards))

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self.requests.labels(path, str(status)).inc()
        self.latency.labels(path).observe(seconds)
        self._request_count, self._request_seconds = self._request_count + 1, self._request_seconds + seconds

    @property
    def retry_after(self) -> int:
        """After how many seconds a refused client should retry: the mean duration of a request, at least 1."""
        return max(1, math.ceil(self._request_seconds / max(1, self._request_count)))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
