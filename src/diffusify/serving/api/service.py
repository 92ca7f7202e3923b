"""What the endpoints share: checks, submitting jobs to the engine, streaming, and cancelling for clients that leave.

All of this runs in the event loop, so it uses tokenizers and configs, but never a network.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.errors import ClientDisconnected, to_error_response
from diffusify.serving.api.responses import JobTexts, sse_event
from diffusify.serving.engine.engine import Engine
from diffusify.serving.engine.generation_progress import ProgressTracker, TextStream
from diffusify.serving.engine.job import Job, Work
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_pool import ModelPool


@dataclass
class Service:
    """The state that all endpoints share. `timeout` is the longest time of a request in seconds."""

    engine: Engine
    models: ModelPool
    metrics: Metrics
    timeout: float
    ready: bool = True

    def __post_init__(self) -> None:
        self._compiling = asyncio.Lock()

    def check_texts(
        self, lm: DiffusionLM, texts: Sequence[str | Sequence[int | None] | None], *more: str | None
    ) -> None:
        """Raises ValueError for unknown token ids, and for texts that are too long whatever the tokenizer does.

        The check is much cheaper than tokenizing a text that is too long.
        """
        context = lm.denoiser.context_length
        lengths = [len(text) for text in (*texts, *more) if isinstance(text, str)]
        if context is not None and max(lengths, default=0) > context * lm.tokenizer.max_token_length:
            raise ValueError(
                f"a text of {max(lengths)} characters does not fit the model's context length of {context} tokens"
            )
        vocab_size = lm.denoiser.vocab_size
        for token in (token for text in texts if isinstance(text, list) for token in text):
            if token is not None and token >= vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {vocab_size} tokens")

    def room(self, lm: DiffusionLM, given: int, texts: int = 1) -> int:
        """The number of tokens that `texts` of `given` tokens each can be continued by, at least 1."""
        context = self.engine.tokens // texts
        if lm.denoiser.context_length is not None:
            context = min(context, lm.denoiser.context_length)
        return max(1, context - given)

    def check_length(self, lm: DiffusionLM, tokens: int) -> None:
        """Raises ValueError for more tokens than the model's context length."""
        if lm.denoiser.context_length is not None and tokens > lm.denoiser.context_length:
            raise ValueError(f"{tokens} tokens exceed the model's context length of {lm.denoiser.context_length}")

    async def compile(self, lm: DiffusionLM, regex: str | None) -> None:
        """Compile a regular expression outside the event loop and the engine's thread, one at a time."""
        if regex is not None:
            async with self._compiling:
                await asyncio.to_thread(lm.compile_regex, regex)

    def submit(
        self, model: str, prepare: Callable[[DiffusionLM], Work], request: Request, *, progress: bool = True
    ) -> Job:
        """Submit a job to the engine; with `progress`, it yields the events of a `ProgressTracker`."""
        job = self.engine.submit(Job(model, prepare, ProgressTracker() if progress else None, self.timeout))
        request.state.job = job
        request.state.jobs = [*getattr(request.state, "jobs", []), job]
        return job

    async def finish(self, request: Request, texts: JobTexts) -> list[TextStream]:
        """Wait for the finished texts. The job is cancelled if the client disconnects."""
        finished = await wait_or_cancel(request, texts.finished())
        self.count(texts)
        return finished

    def count(self, texts: JobTexts) -> None:
        """Add finished texts to the metrics."""
        for text in texts.texts:
            self.metrics.observe_text(texts.job.model, len(text.tokens), texts.job.work.forwards)


def get_service(request: Request) -> Service:
    """The service of a request's app."""
    return request.app.state.service


async def wait_or_cancel(request: Request, awaitable: Any) -> Any:
    """The awaitable's result. Cancels the request's jobs and raises ClientDisconnected if the client disconnects."""
    task, disconnected = asyncio.ensure_future(awaitable), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        disconnected.cancel()
        if not task.done():
            _cancel_jobs(request)
            task.cancel()


def _cancel_jobs(request: Request) -> None:
    for job in getattr(request.state, "jobs", []):
        job.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream_response(request: Request, events: AsyncIterator[str]) -> Response:
    """A response of server-sent events. An error before the first event is raised; a later one is sent as an event."""
    first = await wait_or_cancel(request, anext(events))

    async def body() -> AsyncIterator[str]:
        try:
            yield first
            async for event in events:
                yield event
        except Exception as error:
            yield sse_event("error", to_error_response(error).body)
        finally:
            _cancel_jobs(request)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)
