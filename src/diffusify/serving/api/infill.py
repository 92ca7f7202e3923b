"""Endpoints for infilling, for the alternatives at a position, and for the tokens of a text."""

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
from diffusify.serving.api.responses import JobTexts, StepEvents, row_tokens, sse_event
from diffusify.serving.api.schemas import AlternativesBody, InfillBody, TokenizeBody
from diffusify.serving.api.service import Service, get_service, stream_response, wait_or_cancel
from diffusify.serving.engine.generation_progress import TextStream
from diffusify.text.prompts import decode_spans, encode_infill_text

router = APIRouter()


@router.post("/v1/infill", summary="Fill the masked spans of a text")
async def infill(body: InfillBody, request: Request) -> Response:
    """Fills the masked spans of a text or of token ids. AR models take nulls at the end only."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    service.check_texts(lm, [body.tokens], body.text)
    await service.compile(lm, body.constraint)
    infills = lm.config.sees_right_context

    def prepare(lm: DiffusionLM) -> GenerationRun:
        config = body.sampling_config(lm, infilling=infills)
        if body.tokens is None:
            return lm.prepare_infilling([body.text or ""], config)
        if infills:
            return lm.prepare_infilling([_spans(body.tokens)], config)
        return lm.prepare_generation([_prompt(lm, body.tokens)], body.tokens.count(None), config)

    ends = frozenset[int]() if infills else frozenset(lm.tokenizer.end_token_ids)
    job = service.submit(body.model, prepare, request)
    texts = JobTexts(job, lambda _, positions: TextStream(positions, lambda ids: "", ends))
    head = {"id": f"infill-{uuid.uuid4().hex}", "object": "infill", "created": int(time.time()), "model": body.model}
    if body.stream:
        return await stream_response(request, _events(service, texts, body, head, lm))
    await service.finish(request, texts)
    return JSONResponse(head | _result(texts, lm))


async def _events(
    service: Service, texts: JobTexts, body: InfillBody, head: dict[str, Any], lm: DiffusionLM
) -> AsyncIterator[str]:
    events = StepEvents(lm.tokenizer, has_end=lm.config.sees_right_context)
    async for _, update in texts.updates():
        if body.denoise:
            for event in events.format(update):
                yield event
    service.count(texts)
    yield sse_event(None, head | _result(texts, lm))
    yield sse_event(None, "[DONE]")


def _result(texts: JobTexts, lm: DiffusionLM) -> dict[str, Any]:
    run: GenerationRun = texts.job.work
    (row,) = run.best_rows
    canvas = run.canvas[row : row + 1]
    choice = {
        "index": 0,
        "text": lm.read(canvas),
        "spans": decode_spans(lm.tokenizer, canvas)[0],
        "candidate": row,
        "finish_reason": "stop" if lm.config.sees_right_context else texts.texts[0].finish_reason,
        "tokens": row_tokens(run, row, lm.tokenizer, has_end=lm.config.sees_right_context),
    }
    return {"choices": [choice], "usage": texts.usage}


def _spans(tokens: list[int | None]) -> list[str | range | list[int]]:
    """Token ids, with a masked span for each run of nulls, of the run's length."""
    spans: list[str | range | list[int]] = []
    for masked, run in groupby(tokens, key=lambda token: token is None):
        span = list(run)
        spans.append(range(len(span), len(span) + 1) if masked else [token for token in span if token is not None])
    return spans


def _prompt(lm: DiffusionLM, tokens: list[int | None]) -> list[int]:
    """The prompt for an AR model. Raises ValueError unless all nulls are at the end."""
    given = [token for token in tokens if token is not None]
    if tokens[: len(given)] != given or len(given) == len(tokens):
        raise ValueError(
            "this model generates from left to right, so it needs at least one null, and all nulls at the end; "
            "leave out the tokens after them"
        )
    return lm.tokenizer.add_start(given)


@router.post("/v1/tokenize", summary="The tokens of a text, with null in masked spans")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Splits a text into tokens. A masked span has as many nulls as its largest length."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    service.check_texts(lm, [], body.text)
    events, tokens = StepEvents(lm.tokenizer, has_end=False), []
    for span in encode_infill_text(lm.tokenizer, body.text):
        if isinstance(span, range):
            service.check_length(lm, len(tokens) + span[-1])
            tokens += [{"id": None, "text": ""}] * span[-1]
        else:
            tokens += [{"id": i, "text": events.text(i)} for i in span]
    return JSONResponse({"tokens": tokens})


class Alternatives:
    """The `top` most likely tokens at one position, whatever token is there; for `Job.work`.

    After its only step, `found` has (token id, probability), most likely first.
    """

    def __init__(self, lm: DiffusionLM, body: AlternativesBody) -> None:
        if body.position >= len(body.tokens):
            raise ValueError(f"position={body.position} is beyond the {len(body.tokens)} tokens")
        infills = lm.config.sees_right_context
        start, end, position = lm.tokenizer.start_token_id, lm.tokenizer.end_token_id, body.position
        given = body.tokens[:position]
        before = [*([start, *given] if infills else lm.tokenizer.add_start(given)), None]
        after = [*body.tokens[position + 1 :], end] if infills else []
        self.canvas = Canvas.from_tokens([before + after], noise=lm.config.mask_token_id, pad=lm.tokenizer.pad_token_id)
        self._positions = torch.zeros_like(self.canvas.open)
        self._positions[0, len(before) - 1] = True
        self._denoiser, self._banned = lm.denoiser.infiller, [start, end] if infills else []
        self._top, self.found = body.top, []

    def __iter__(self) -> Iterator[None]:
        canvas, positions = self.canvas.to(self._denoiser.device), self._positions.to(self._denoiser.device)
        logits = self._denoiser.predict(canvas, positions=positions).logits[0]
        logits[self._banned] = -torch.inf
        probs, ids = logits.softmax(-1).topk(min(self._top, len(logits)))
        self.found = [(i, p) for i, p in zip(ids.tolist(), probs.tolist(), strict=True) if p > 0]
        yield


@router.post("/v1/alternatives", summary="The most likely tokens at a position")
async def alternatives(body: AlternativesBody, request: Request) -> Response:
    """The most likely tokens at a position, given all other tokens that the model attends to."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    service.check_texts(lm, [body.tokens])
    service.check_length(lm, len(body.tokens) + 2)
    job = service.submit(body.model, lambda lm: Alternatives(lm, body), request, progress=False)
    await wait_or_cancel(request, job.result())
    events = StepEvents(lm.tokenizer, has_end=False)
    found = [{"id": i, "text": events.text(i), "probability": round(p, 6)} for i, p in job.work.found]
    return JSONResponse({"alternatives": found})
