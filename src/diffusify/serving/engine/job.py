"""A request's generation on its way through the engine."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from diffusify.canvas import Canvas
from diffusify.sampling.diffusion_lm import DiffusionLM


class Work(Protocol):
    """Something to be done step by step on a canvas, such as a `GenerationRun`."""

    canvas: Canvas

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(eq=False)
class Job:
    """A request's work on its way through the engine: iterate over what `listen` makes of it, then `work` is done.

    `prepare` and `listen` run in the engine's thread; `listen` hears of the work when it begins, then of each step. A
    job ends with what goes wrong: ValueError for a request that cannot be served, TimeoutError past its deadline.
    """

    model: str
    prepare: Callable[[DiffusionLM], Work]
    listen: Callable[[Any], Any] | None = None
    seconds: float = math.inf
    work: Any = None
    began: float = field(default_factory=monotonic)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self._home = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            ended, told = await self._inbox.get()
            if isinstance(told, BaseException):
                raise told
            if ended:
                return
            yield told

    async def done(self) -> Any:
        """The work, finished."""
        async for _ in self:
            pass
        return self.work

    def cancel(self) -> None:
        """Nobody waits any more: its rows are free before the next pass."""
        self.cancelled = True

    @property
    def late(self) -> bool:
        return monotonic() - self.began > self.seconds

    def tell(self, step: Any) -> None:
        told = None if self.listen is None else self.listen(step)
        if told is not None:
            self._post((False, told))

    def end(self, error: BaseException | None = None) -> None:
        self._post((True, error))

    def _post(self, item: tuple[bool, Any]) -> None:
        if not self._home.is_closed():
            self._home.call_soon_threadsafe(self._inbox.put_nowait, item)
