"""Many requests, one thread that runs the models: work joins and leaves between passes."""

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import torch

from diffusify.canvas import Canvas
from diffusify.sampling.generation import DiffusionLM
from diffusify.serving.batching import Loop, Together
from diffusify.serving.metrics import Metrics


class Work(Protocol):
    """Something to be done step by step on a canvas, such as a `Writing`."""

    canvas: Canvas

    def __iter__(self) -> Iterator[Any]: ...


class Busy(Exception):
    """Too many requests wait; the client may come again after some seconds."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is all that may; come again in {seconds} s")
        self.seconds = seconds


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


class Desk:
    """A model and its requests: those that wait, in order, and those that are at work."""

    def __init__(self, name: str, lm: DiffusionLM, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.together = Together(lm.denoiser)
        self.lm = DiffusionLM(self.together.denoiser, lm.tokenizer)
        self.waiting: deque[Job] = deque()
        self.working: dict[Job, Loop] = {}

    @property
    def rows(self) -> int:
        return sum(len(job.work.canvas.tokens) for job in self.working)

    def receive(self, job: Job) -> None:
        """Read the request; whether it can be served at all is told at once."""
        try:
            job.work = job.prepare(self.lm)
            rows, n = job.work.canvas.tokens.shape
            if rows * n > self.tokens:
                raise ValueError(
                    f"the request needs {rows} texts of {n} tokens, but there is room for {self.tokens} in all; "
                    "ask for fewer or shorter texts"
                )
        except Exception as error:
            job.end(error)
        else:
            self.waiting.append(job)

    def admit(self) -> None:
        """Begin what fits, strictly in order, so that nobody waits for ever."""
        while self.waiting and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            loop = self.together.join(lambda job=job: _do(job))
            if loop in self.together.loops:
                self.working[job] = loop

    def _fits(self, newcomer: Job) -> bool:
        """Whether the rows of all at work, each as long as the longest, stay within the budget."""
        shapes = [job.work.canvas.tokens.shape for job in (*self.working, newcomer)]
        return sum(rows for rows, _ in shapes) * max(n for _, n in shapes) <= self.tokens

    def dismiss(self) -> None:
        """Let go of what nobody waits for any more, and of what took too long."""
        for job in [job for job in (*self.waiting, *self.working) if job.cancelled or job.late]:
            if job in self.working:
                self.together.leave(self.working.pop(job))
            else:
                self.waiting.remove(job)
            job.end(TimeoutError(f"not done within {job.seconds:g} s") if not job.cancelled else None)

    def step(self) -> None:
        """One pass for everybody."""
        self.together.advance()
        for job in [job for job, loop in self.working.items() if loop not in self.together.loops]:
            del self.working[job]


def _do(job: Job) -> None:
    try:
        job.tell(job.work)
        for step in job.work:
            job.tell(step)
    except Exception as error:
        job.end(error)
    else:
        job.end()


class Engine:
    """All models in one thread of their own, beside the event loop that serves the clients.

    At most `waiting` requests wait; the rows at work hold at most `tokens` positions for each model.
    """

    def __init__(
        self, models: Mapping[str, DiffusionLM], *, tokens: int = 16384, waiting: int = 256, metrics: Metrics
    ) -> None:
        self.desks = {name: Desk(name, lm, tokens) for name, lm in models.items()}
        self.tokens, self.most, self.metrics = tokens, waiting, metrics
        self._arrivals: deque[Job] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: sum(desk.rows for desk in self.desks.values()))

    @property
    def waiting(self) -> int:
        return len(self._arrivals) + sum(len(desk.waiting) for desk in self.desks.values())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up what is at work, and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def add(self, name: str, lm: DiffusionLM) -> None:
        """Serve one model more."""
        self.desks = {**self.desks, name: Desk(name, lm, self.tokens)}

    def remove(self, name: str) -> None:
        """Serve a model no more; nobody must be using it."""
        self.desks = {other: desk for other, desk in self.desks.items() if other != name}

    def submit(self, job: Job) -> Job:
        """Put a job in line. Busy if the line is too long."""
        if self.waiting >= self.most:
            self.metrics.refused.inc()
            raise Busy(self.waiting, self.metrics.usual_seconds)
        self._arrivals.append(job)
        self._wake.set()
        return job

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                self._wake.clear()
                while self._arrivals:
                    job = self._arrivals.popleft()
                    if job.model in self.desks:
                        self.desks[job.model].receive(job)
                    else:
                        job.end(ValueError(f'model "{job.model}" has just been closed; ask again'))
                for desk in self.desks.values():
                    self._turn(desk)
                idle = not any(desk.working or desk.waiting for desk in self.desks.values())
                if idle and not self._arrivals and not self._stopping:
                    self._wake.wait()
        for desk in self.desks.values():
            for job in (*desk.waiting, *desk.working):
                job.end(TimeoutError("the server is stopping"))

    def _turn(self, desk: Desk) -> None:
        desk.dismiss()
        desk.admit()
        if desk.working:
            rows, passes = desk.rows, desk.together.passes
            desk.step()
            self.metrics.passed(desk.name, rows, desk.together.passes - passes)
