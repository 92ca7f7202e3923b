"""OpenAI's endpoints: completions with a suffix that is meant, chats, and what editors ask for at the cursor."""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.logprobs import TopLogprobs
from diffusify.serving.api.openai_schemas import ChatBody, CompletionBody, FimBody, OpenAI
from diffusify.serving.api.responses import Answer, Events, event, told_tokens
from diffusify.serving.api.service import Service, service, streamed
from diffusify.serving.engine.generation_progress import StartEvent, Text

router = APIRouter()


@dataclass(frozen=True)
class Kind:
    """How an endpoint's answers look: a whole choice, and a piece of a streamed one."""

    prefix: str
    whole_object: str
    part_object: str
    choice: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]


COMPLETION = Kind(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)
CHAT = Kind(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}},
)


@dataclass(frozen=True)
class Asked:
    """A request, read: what is written, how it is read, and what goes around it."""

    kind: Kind
    prepare: Callable[[DiffusionLM], GenerationRun]
    read: Callable[[list[int]], str]
    ends: frozenset[int]
    before: Callable[[int], str] = lambda choice: ""  # in front of a choice's text


@router.post("/v1/completions", summary="Continue a prompt, or fill the gap between it and a suffix")
async def complete(body: CompletionBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    return await _answer(serving, request, lm, body, _completion(serving, lm, body))


@router.post("/v1/chat/completions", summary="Answer a chat")
async def chat(body: ChatBody, request: Request) -> Response:
    serving = service(request)
    lm = await serving.models.get(body.model)
    messages: list[dict[str, Any]] = list(body.chat)
    serving.check_length(lm, [message["content"] for message in messages])
    told = lm.denoiser.length_head is not None

    def prepare(lm: DiffusionLM) -> GenerationRun:
        room = body.room or (None if told else _rest(lm, messages))
        return lm.prepare_chat([messages] * body.n, room, body.watched(body.settings(lm), lm))

    ends = frozenset({lm.chat_template.end_token_id, lm.tokenizer.end_token_id})
    return await _answer(serving, request, lm, body, Asked(CHAT, prepare, lm.chat_template.read, ends))


@router.post("/v1/fim/completions", summary="What belongs at the cursor, for editors")
async def fill_in_the_middle(body: FimBody, request: Request) -> Response:
    wishes = body.model_dump(exclude={"random_seed", "min_tokens"}, exclude_none=True)
    if body.random_seed is not None:
        wishes["seed"] = body.random_seed
    inner = CompletionBody.model_validate(wishes)
    serving = service(request)
    lm = await serving.models.get(body.model)
    return await _answer(serving, request, lm, inner, replace(_completion(serving, lm, inner), kind=CHAT))


def _completion(serving: Service, lm: DiffusionLM, body: CompletionBody) -> Asked:
    """What goes on from the prompts, or leads from them to the suffix."""
    prompts = [prompt for prompt in body.prompts for _ in range(body.n)]
    tokenizer, room = lm.tokenizer, body.max_tokens or 16
    serving.check_length(lm, prompts, body.suffix)
    if body.suffix:
        return _between(lm, body, prompts, body.suffix, room)

    def prepare(lm: DiffusionLM) -> GenerationRun:
        return lm.prepare_generation(prompts, room, body.watched(body.settings(lm), lm))

    def echoed(choice: int) -> str:
        prompt = prompts[choice]
        return "" if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    ends = frozenset({tokenizer.end_token_id})
    return Asked(COMPLETION, prepare, lambda ids: tokenizer.decode(ids, continues=True), ends, echoed)


def _between(lm: DiffusionLM, body: CompletionBody, prompts: list[str | list[int]], suffix: str, most: int) -> Asked:
    """A hole before the suffix, of `most` tokens or of as many fewer as read best."""
    tokenizer = lm.tokenizer

    def prepare(lm: DiffusionLM) -> GenerationRun:
        sizes = range(most, most + 1) if body.form else range(1, most + 1)
        holed = [[prompt, sizes, suffix] for prompt in prompts]
        return lm.prepare_infilling(holed, body.watched(body.settings(lm, holes=True), lm))

    spaced = isinstance(prompts[0], str) and prompts[0].endswith(" ")  # the hole has taken the space

    def read(ids: list[int]) -> str:
        text = tokenizer.decode(ids, continues=True)
        return text.removeprefix(" ") if spaced else text

    return Asked(COMPLETION, prepare, read, frozenset())


def _rest(lm: DiffusionLM, messages: list[dict[str, Any]]) -> int:
    """Room for an answer of which nobody said how long: 256 tokens, or what the model can still see."""
    context = lm.denoiser.context
    return 256 if context is None else max(1, min(256, context - len(lm.chat_template.prompt(messages))))


async def _answer(serving: Service, request: Request, lm: DiffusionLM, body: OpenAI, asked: Asked) -> Response:
    watched: list[TopLogprobs] = []

    def prepare(lm: DiffusionLM) -> GenerationRun:
        writing = asked.prepare(lm)
        watched.extend(each.policy for each in writing.settings[:1] if isinstance(each.policy, TopLogprobs))
        return writing

    await serving.compile(lm, body.form)
    job = serving.submit(body.model, prepare, request)
    answer = Answer(job, asked.read, asked.ends, body.stops)
    head = {"id": f"{asked.kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def records(choice: int, text: Text) -> dict[str, Any] | None:
        if body.top is None:
            return None
        told = told_tokens(text.tokens, job.work.best[choice], lm.tokenizer, watched[0] if watched else None)
        return {"content": told, "refusal": None} if asked.kind is CHAT else _columns(told)

    if body.stream:
        return await streamed(request, answer, _chunks(answer, body, asked, head, lm, records))
    texts = await serving.finished(request, answer)
    choices = [
        {"index": i}
        | asked.kind.choice(asked.before(i) + text.sent)
        | {"logprobs": records(i, text), "finish_reason": text.finish}
        for i, text in enumerate(texts)
    ]
    return JSONResponse(head | {"object": asked.kind.whole_object, "choices": choices, "usage": answer.usage})


async def _chunks(
    answer: Answer,
    body: OpenAI,
    asked: Asked,
    head: dict[str, Any],
    lm: DiffusionLM,
    records: Callable[[int, Text], dict[str, Any] | None],
) -> AsyncIterator[str]:
    """Deltas of settled text; with `denoise`, all steps between them."""
    head = head | {"object": asked.kind.part_object}
    events = Events(lm.tokenizer, closed=False)
    ended: set[int] = set()

    def chunk(choice: dict[str, Any], **more: Any) -> str:
        return event(None, head | {"choices": [choice]} | more)

    async for new, told in answer.grow():
        if body.denoise:
            for each in events.of(told):
                yield each
        for i, (text, added) in enumerate(zip(answer.texts, new, strict=True)):
            rest = {"index": i, "logprobs": None, "finish_reason": None}
            if isinstance(told, StartEvent):
                first = asked.before(i)
                if asked.kind is CHAT:
                    yield chunk(rest | {"delta": {"role": "assistant", "content": "", "refusal": None}})
                elif first:
                    yield chunk(rest | asked.kind.piece(first))
            if added:
                yield chunk(rest | asked.kind.piece(added))
            if text.finish and i not in ended:
                ended.add(i)
                last = {"delta": {}} if asked.kind is CHAT else {"text": ""}
                yield chunk(rest | last | {"logprobs": records(i, text), "finish_reason": text.finish})
    if body.usage_asked or body.denoise:
        yield event(None, head | {"choices": [], "usage": answer.usage})
    yield event(None, "[DONE]")


def _columns(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The older form of the record, in columns."""
    offsets, at = [], 0
    for one in told:
        offsets.append(at)
        at += len(one["token"])
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        # Parts of a letter look alike; the likeliest, which comes first, is kept.
        "top_logprobs": [{each["token"]: each["logprob"] for each in reversed(one["top_logprobs"])} for one in told],
        "text_offset": offsets,
    }
