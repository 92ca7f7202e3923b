"""A request's way through the server: models by name, work for the engine, and clients that vanish.

All this runs beside the engine's thread, so it looks at tokenizers and cards and never at a network.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.errors import ClientDisconnected, problem
from diffusify.serving.api.responses import Answer, event
from diffusify.serving.engine.engine import Engine
from diffusify.serving.engine.generation_progress import Follow, Text
from diffusify.serving.engine.job import Job, Work
from diffusify.serving.engine.metrics import Metrics
from diffusify.serving.engine.model_pool import ModelPool


@dataclass
class Service:
    """What the endpoints stand on."""

    engine: Engine
    models: ModelPool
    metrics: Metrics
    seconds: float  # that a request may take
    ready: bool = True

    def __post_init__(self) -> None:
        self._compiling = asyncio.Lock()

    def check_length(
        self, lm: DiffusionLM, texts: Sequence[str | Sequence[int | None] | None], *more: str | None
    ) -> None:
        """ValueError for what no tokenizer could make short enough: cheap to see, dear to tokenize."""
        context = lm.denoiser.context
        given = [len(text) for text in (*texts, *more) if isinstance(text, str)]
        if context is not None and max(given, default=0) > context * lm.tokenizer.longest:
            raise ValueError(f"a text of {max(given)} letters is more than the {context} tokens that the model can see")
        rows = lm.denoiser.vocabulary
        for token in (token for text in texts if isinstance(text, list) for token in text):
            if token is not None and token >= rows:
                raise ValueError(f"token {token} is beyond the {rows} that the model knows")

    def check_room(self, lm: DiffusionLM, tokens: int) -> None:
        """ValueError for more tokens than the model can see."""
        if lm.denoiser.context is not None and tokens > lm.denoiser.context:
            raise ValueError(f"{tokens} tokens are more than the {lm.denoiser.context} that the model can see")

    async def compile(self, lm: DiffusionLM, regex: str | None) -> None:
        """Make a form's automaton beside the event loop and the engine, one at a time."""
        if regex is not None:
            async with self._compiling:
                await asyncio.to_thread(lm.form, regex)

    def submit(
        self, model: str, prepare: Callable[[DiffusionLM], Work], request: Request, *, follow: bool = True
    ) -> Job:
        job = self.engine.submit(Job(model, prepare, Follow() if follow else None, self.seconds))
        request.state.job = job
        return job

    async def finished(self, request: Request, answer: Answer) -> list[Text]:
        """The texts, once they are whole; if the client vanishes before, its work is given up."""
        texts = await unless_gone(request, answer.job, answer.whole())
        self.wrote(answer)
        return texts

    def wrote(self, answer: Answer) -> None:
        for text in answer.texts:
            self.metrics.wrote(answer.job.model, len(text.tokens), answer.job.work.forwards)


def service(request: Request) -> Service:
    return request.app.state.service


async def unless_gone(request: Request, job: Job, waiting: Any) -> Any:
    """What is waited for. Gone if the client vanishes first."""
    task, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            job.cancel()
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed(request: Request, answer: Answer, parts: AsyncIterator[str]) -> Response:
    """Server-sent events. What goes wrong before the first is an answer of its own, later an event."""
    first = await unless_gone(request, answer.job, anext(parts))

    async def all_parts() -> AsyncIterator[str]:
        try:
            yield first
            async for part in parts:
                yield part
            service(request).wrote(answer)
        except Exception as error:
            yield event("error", problem(error).body)
        finally:
            answer.job.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(all_parts(), media_type="text/event-stream", headers=headers)
