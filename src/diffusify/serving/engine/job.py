"""A generation on its way through the engine."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from diffusify.canvas import Canvas
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun


class Work(Protocol):
    """An iterator of steps on a canvas, such as a `GenerationRun`."""

    canvas: Canvas

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(eq=False)
class QueuedJob:
    """Work in the queue of a model.

    `prepare` makes the work. `on_step` is called with the work before its first step and with each step after it. After
    `timeout` seconds the job ends with a TimeoutError. `error` is what an ended job has raised.
    """

    model: str
    prepare: Callable[[DiffusionLM], Work]
    on_step: Callable[[Any], Any] | None = None
    timeout: float = math.inf
    work: Any = None
    started: float = field(default_factory=monotonic)
    cancelled: bool = False
    ended: bool = False
    error: BaseException | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows of the work, and the largest number of positions that they may get."""
        rows, n = self.work.canvas.tokens.shape
        return rows, self.work.width if isinstance(self.work, GenerationRun) else n

    def cancel(self) -> None:
        """Stop the work. Its rows are freed before the next forward pass."""
        self.cancelled = True

    @property
    def timed_out(self) -> bool:
        """Whether the job has taken longer than `timeout`."""
        return monotonic() - self.started > self.timeout

    def notify(self, step: Any) -> None:
        """Report a step."""
        if self.on_step is not None:
            self.on_step(step)

    def end(self, error: BaseException | None = None) -> None:
        """End the job, with an error if there is one."""
        self.ended, self.error = True, error


@dataclass(eq=False)
class Job(QueuedJob):
    """The work of one request. Iterating over a job yields what `on_step` returns, until `work` is finished.

    `prepare` and `on_step` run in the engine's thread; None is not passed on. Iterating raises ValueError for a request
    that cannot be served and TimeoutError after `timeout` seconds.
    """

    def __post_init__(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            ended, message = await self._messages.get()
            if isinstance(message, BaseException):
                raise message
            if ended:
                return
            yield message

    async def result(self) -> Any:
        """Wait for the finished work."""
        async for _ in self:
            pass
        return self.work

    def notify(self, step: Any) -> None:
        """Report a step to whoever iterates over the job."""
        message = None if self.on_step is None else self.on_step(step)
        if message is not None:
            self._post((False, message))

    def end(self, error: BaseException | None = None) -> None:
        """End the job, with an error if there is one."""
        super().end(error)
        self._post((True, error))

    def _post(self, item: tuple[bool, Any]) -> None:
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._messages.put_nowait, item)
