"""Texts with holes anywhere: fill them, look at what else could stand there, and what tokens a text has."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from itertools import groupby
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from diffusify.canvas import Canvas
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.responses import Answer, Events, event, row_tokens
from diffusify.serving.api.schemas import AlternativesBody, InfillBody, TokenizeBody
from diffusify.serving.api.service import service, streamed, unless_gone
from diffusify.text.prompts import encode_holed, read_spans

router = APIRouter()


@router.post("/v1/infill", summary="Fill the holes of a text, anywhere in it")
async def infill(body: InfillBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    serving.check_length(lm, [body.tokens], body.text)
    await serving.compile(lm, body.form)
    closed = lm.config.sees_right_context

    def prepare(lm: DiffusionLM) -> GenerationRun:
        settings = body.settings(lm, holes=closed)
        if body.tokens is None:
            return lm.prepare_infilling([body.text or ""], settings)
        if closed:
            return lm.prepare_infilling([_pieces(body.tokens)], settings)
        return lm.prepare_generation([_beginning(lm, body.tokens)], body.tokens.count(None), settings)

    ends = frozenset[int]() if closed else frozenset({lm.tokenizer.end_token_id})
    answer = Answer(serving.submit(body.model, prepare, request), lambda ids: "", ends)
    head = {"id": f"infill-{uuid.uuid4().hex}", "object": "infill", "created": int(time.time()), "model": body.model}
    if body.stream:
        return await streamed(request, answer, _parts(answer, body, head, lm))
    await serving.finished(request, answer)
    return JSONResponse(head | _result(answer, lm))


async def _parts(answer: Answer, body: InfillBody, head: dict[str, Any], lm: DiffusionLM) -> AsyncIterator[str]:
    events = Events(lm.tokenizer, closed=lm.config.sees_right_context)
    async for _, told in answer.grow():
        if body.denoise:
            for each in events.of(told):
                yield each
    yield event(None, head | _result(answer, lm))
    yield event(None, "[DONE]")


def _result(answer: Answer, lm: DiffusionLM) -> dict[str, Any]:
    writing: GenerationRun = answer.job.work
    (row,) = writing.best
    canvas = writing.canvas[row : row + 1]
    choice = {
        "index": 0,
        "text": lm.read(canvas),
        "spans": read_spans(lm.tokenizer, canvas)[0],
        "candidate": row,
        "finish_reason": "stop",
        "tokens": row_tokens(writing, row, lm.tokenizer, closed=lm.config.sees_right_context),
    }
    return {"choices": [choice], "usage": answer.usage}


def _pieces(tokens: list[int | None]) -> list[str | range | list[int]]:
    """Token ids, and a hole of exactly as many tokens as there are nulls side by side."""
    pieces: list[str | range | list[int]] = []
    for open, run in groupby(tokens, key=lambda token: token is None):
        some = list(run)
        pieces.append(range(len(some), len(some) + 1) if open else [token for token in some if token is not None])
    return pieces


def _beginning(lm: DiffusionLM, tokens: list[int | None]) -> list[int]:
    """The prompt of a model that writes from left to right."""
    given = [token for token in tokens if token is not None]
    if tokens[: len(given)] != given or len(given) == len(tokens):
        raise ValueError(
            "this model writes from left to right, so nulls stand at the end, one at least; give it no text behind them"
        )
    return [lm.tokenizer.start_token_id, *given]


@router.post("/v1/tokenize", summary="The tokens of a text, null where it has holes")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    serving.check_length(lm, [], body.text)
    events, shown = Events(lm.tokenizer, closed=False), []
    for piece in encode_holed(lm.tokenizer, body.text):
        if isinstance(piece, range):
            serving.check_room(lm, len(shown) + piece[-1])
            shown += [{"id": None, "text": ""}] * piece[-1]
        else:
            shown += [{"id": i, "text": events.text(i)} for i in piece]
    return JSONResponse({"tokens": shown})


class Look:
    """What the model thinks of one position, whatever stands there."""

    def __init__(self, lm: DiffusionLM, body: AlternativesBody) -> None:
        if body.position >= len(body.tokens):
            raise ValueError(f"position={body.position} is beyond the {len(body.tokens)} tokens")
        closed = lm.config.sees_right_context
        start, end, at = lm.tokenizer.start_token_id, lm.tokenizer.end_token_id, body.position
        before: list[int | None] = [start, *body.tokens[:at], None]
        after = [*body.tokens[at + 1 :], end] if closed else []
        self.canvas = Canvas.from_tokens([before + after], noise=lm.config.mask_token_id, pad=lm.tokenizer.pad_token_id)
        self._positions = torch.zeros_like(self.canvas.open)
        self._positions[0, at + 1] = True
        self._denoiser, self._never = lm.denoiser.infiller, [start, end] if closed else []
        self._top, self.found = body.top, []

    def __iter__(self) -> Iterator[None]:
        canvas, positions = self.canvas.to(self._denoiser.device), self._positions.to(self._denoiser.device)
        logits = self._denoiser.predict(canvas, positions=positions).logits[0]
        logits[self._never] = -torch.inf
        sure, ids = logits.softmax(-1).topk(min(self._top, len(logits)))
        self.found = list(zip(ids.tolist(), sure.tolist(), strict=True))
        yield


@router.post("/v1/alternatives", summary="What could stand at a position, by everything that the model sees around it")
async def alternatives(body: AlternativesBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    serving.check_length(lm, [body.tokens])
    serving.check_room(lm, len(body.tokens) + 2)
    job = serving.submit(body.model, lambda lm: Look(lm, body), request, follow=False)
    await unless_gone(request, job, job.done())
    events = Events(lm.tokenizer, closed=False)
    found = [{"id": i, "text": events.text(i), "probability": round(p, 6)} for i, p in job.work.found]
    return JSONResponse({"alternatives": found})
