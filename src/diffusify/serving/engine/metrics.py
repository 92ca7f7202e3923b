"""What the server tells Prometheus."""

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "diffusify"}
        each = {"labelnames": ["model"], **own}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **own)
        self.refused = Counter("refused", "Requests refused because too many were waiting.", **own)
        self.tokens = Counter("tokens", "Tokens written.", **each)
        self.forwards = Counter("forwards", "Passes through the network, shared by all at work.", **each)
        self.rows = Histogram("batch_rows", "Texts that shared a step.", buckets=(1, 2, 4, 8, 16, 32, 64), **each)
        paces = (1, 1.25, 1.5, 2, 3, 4, 8)
        self.pace = Histogram("tokens_per_forward", "Tokens of a text for each forward.", buckets=paces, **each)
        self.latency = Histogram("request_seconds", "From a request to its answer.", ["path"], buckets=_SECONDS, **own)
        self._waiting = Gauge("waiting", "Requests that wait.", **own)
        self._working = Gauge("working_rows", "Texts at work.", **own)
        self._answered, self._took = 0, 0.0

    def watch(self, waiting: Callable[[], int], rows: Callable[[], int]) -> None:
        """Read these when asked."""
        self._waiting.set_function(waiting)
        self._working.set_function(rows)

    def passed(self, model: str, rows: int, passes: int) -> None:
        """A step of all that is at work."""
        self.rows.labels(model).observe(rows)
        self.forwards.labels(model).inc(passes)

    def wrote(self, model: str, tokens: int, forwards: int) -> None:
        """A finished text."""
        self.tokens.labels(model).inc(tokens)
        self.pace.labels(model).observe(tokens / max(1, forwards))

    def answered(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.latency.labels(path).observe(seconds)
        self._answered, self._took = self._answered + 1, self._took + seconds

    @property
    def usual_seconds(self) -> int:
        """When it is worth while to come again: about as long as a request takes."""
        return max(1, math.ceil(self._took / max(1, self._answered)))

    def text(self) -> bytes:
        return generate_latest(self.registry)
