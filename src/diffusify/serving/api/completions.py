"""OpenAI's completion endpoints: prompts with an optional suffix, chats, and fill-in-the-middle for editors."""

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
from diffusify.serving.api.openai_schemas import ChatBody, CompletionBody, FimBody, OpenAIFields
from diffusify.serving.api.responses import JobTexts, StepEvents, logprob_records, sse_event
from diffusify.serving.api.service import Service, get_service, stream_response
from diffusify.serving.engine.generation_progress import StartEvent, TextStream

router = APIRouter()


@dataclass(frozen=True)
class EndpointFormat:
    """The JSON of an endpoint: names of its objects, a whole choice, and the delta of a streamed one."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]


COMPLETION = EndpointFormat(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)
CHAT = EndpointFormat(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}},
)


@dataclass(frozen=True)
class ParsedRequest:
    """A request as a generation: how to prepare it, how its tokens become text, and the format of the response."""

    format: EndpointFormat
    prepare: Callable[[DiffusionLM], GenerationRun]
    decode: Callable[[list[int]], str]
    end_token_ids: frozenset[int]
    prefix: Callable[[int], str] = lambda choice: ""  # text in front of a choice


@router.post("/v1/completions", summary="Continue a prompt, or fill the span between a prompt and a suffix")
async def complete(body: CompletionBody, request: Request) -> Response:
    """OpenAI's completions."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    return await _respond(service, request, lm, body, _parse_completion(service, lm, body))


@router.post("/v1/chat/completions", summary="Answer a chat")
async def chat(body: ChatBody, request: Request) -> Response:
    """OpenAI's chat completions."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    messages: list[dict[str, Any]] = list(body.chat)
    service.check_texts(lm, [message["content"] for message in messages])
    has_length_head = lm.denoiser.length_head is not None

    def prepare(lm: DiffusionLM) -> GenerationRun:
        length = body.max_new_tokens or (None if has_length_head else _default_length(lm, messages))
        return lm.prepare_chat([messages] * body.n, length, body.sampling_config(lm))

    ends = frozenset({lm.chat_template.end_token_id, lm.tokenizer.end_token_id})
    return await _respond(
        service, request, lm, body, ParsedRequest(CHAT, prepare, lm.chat_template.decode_answer, ends)
    )


@router.post("/v1/fim/completions", summary="Fill in the middle, for editors")
async def fill_in_the_middle(body: FimBody, request: Request) -> Response:
    """Completions at an editor's cursor, as chat completions."""
    fields = body.model_dump(exclude={"random_seed", "min_tokens"}, exclude_none=True)
    if body.random_seed is not None:
        fields["seed"] = body.random_seed
    completion = CompletionBody.model_validate(fields)
    service = get_service(request)
    lm = await service.models.get(body.model)
    parsed = replace(_parse_completion(service, lm, completion), format=CHAT)
    return await _respond(service, request, lm, completion, parsed)


def _parse_completion(service: Service, lm: DiffusionLM, body: CompletionBody) -> ParsedRequest:
    """A continuation of the prompts, or with a suffix the span between them."""
    prompts = [prompt for prompt in body.prompts for _ in range(body.n)]
    tokenizer, length = lm.tokenizer, body.max_tokens or 16
    service.check_texts(lm, prompts, body.suffix)
    if body.suffix:
        return _parse_suffix(lm, body, prompts, body.suffix, length)

    def prepare(lm: DiffusionLM) -> GenerationRun:
        return lm.prepare_generation(prompts, length, body.sampling_config(lm))

    def echo(choice: int) -> str:
        prompt = prompts[choice]
        return "" if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    ends = frozenset({tokenizer.end_token_id})
    return ParsedRequest(COMPLETION, prepare, lambda ids: tokenizer.decode(ids, continues=True), ends, echo)


def _parse_suffix(
    lm: DiffusionLM, body: CompletionBody, prompts: list[str | list[int]], suffix: str, max_length: int
) -> ParsedRequest:
    """Masked spans before the suffix. All lengths up to `max_length` are tried, unless a constraint is given."""
    tokenizer = lm.tokenizer

    def prepare(lm: DiffusionLM) -> GenerationRun:
        lengths = range(max_length, max_length + 1) if body.constraint else range(1, max_length + 1)
        texts = [[prompt, lengths, suffix] for prompt in prompts]
        return lm.prepare_infilling(texts, body.sampling_config(lm, infilling=True))

    # A space at the prompt's end becomes part of the span's first token.
    ends_in_space = isinstance(prompts[0], str) and prompts[0].endswith(" ")

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, continues=True)
        return text.removeprefix(" ") if ends_in_space else text

    return ParsedRequest(COMPLETION, prepare, decode, frozenset())


def _default_length(lm: DiffusionLM, messages: list[dict[str, Any]]) -> int:
    """The length of an answer if none is requested: 256 tokens, or what is left of the context length."""
    context = lm.denoiser.context_length
    return 256 if context is None else max(1, min(256, context - len(lm.chat_template.prompt(messages))))


async def _respond(
    service: Service, request: Request, lm: DiffusionLM, body: OpenAIFields, parsed: ParsedRequest
) -> Response:
    top_logprobs: list[TopLogprobs] = []

    def prepare(lm: DiffusionLM) -> GenerationRun:
        run = parsed.prepare(lm)
        top_logprobs.extend(each.policy for each in run.settings[:1] if isinstance(each.policy, TopLogprobs))
        return run

    await service.compile(lm, body.constraint)
    job = service.submit(body.model, prepare, request)
    texts = JobTexts(job, parsed.decode, parsed.end_token_ids, body.stops)
    head = {"id": f"{parsed.format.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def logprobs(choice: int, text: TextStream) -> dict[str, Any] | None:
        if body.num_top_logprobs is None:
            return None
        row = job.work.best_rows[choice]
        records = logprob_records(text.tokens, row, lm.tokenizer, top_logprobs[0] if top_logprobs else None)
        return {"content": records, "refusal": None} if parsed.format is CHAT else _legacy_logprobs(records)

    if body.stream:
        return await stream_response(request, texts, _chunks(texts, body, parsed, head, lm, logprobs))
    choices = [
        {"index": i}
        | parsed.format.choice(parsed.prefix(i) + text.sent)
        | {"logprobs": logprobs(i, text), "finish_reason": text.finish_reason}
        for i, text in enumerate(await service.finish(request, texts))
    ]
    return JSONResponse(head | {"object": parsed.format.object, "choices": choices, "usage": texts.usage})


async def _chunks(
    texts: JobTexts,
    body: OpenAIFields,
    parsed: ParsedRequest,
    head: dict[str, Any],
    lm: DiffusionLM,
    logprobs: Callable[[int, TextStream], dict[str, Any] | None],
) -> AsyncIterator[str]:
    """Deltas of final text; with `denoise`, the events of all steps between them."""
    head = head | {"object": parsed.format.chunk_object}
    events = StepEvents(lm.tokenizer, has_end=False)
    finished: set[int] = set()

    def chunk(choice: dict[str, Any], **more: Any) -> str:
        return sse_event(None, head | {"choices": [choice]} | more)

    async for new, update in texts.updates():
        if body.denoise:
            for event in events.format(update):
                yield event
        for i, (text, added) in enumerate(zip(texts.texts, new, strict=True)):
            choice = {"index": i, "logprobs": None, "finish_reason": None}
            if isinstance(update, StartEvent):
                prefix = parsed.prefix(i)
                if parsed.format is CHAT:
                    yield chunk(choice | {"delta": {"role": "assistant", "content": "", "refusal": None}})
                elif prefix:
                    yield chunk(choice | parsed.format.delta(prefix))
            if added:
                yield chunk(choice | parsed.format.delta(added))
            if text.finish_reason and i not in finished:
                finished.add(i)
                last = {"delta": {}} if parsed.format is CHAT else {"text": ""}
                yield chunk(choice | last | {"logprobs": logprobs(i, text), "finish_reason": text.finish_reason})
    if body.include_usage or body.denoise:
        yield sse_event(None, head | {"choices": [], "usage": texts.usage})
    yield sse_event(None, "[DONE]")


def _legacy_logprobs(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The logprobs object of /v1/completions, which has one list per field."""
    offsets, offset = [], 0
    for record in records:
        offsets.append(offset)
        offset += len(record["token"])
    return {
        "tokens": [record["token"] for record in records],
        "token_logprobs": [record["logprob"] for record in records],
        # Incomplete characters have the same text; reversed, so that the most likely of them is kept.
        "top_logprobs": [
            {each["token"]: each["logprob"] for each in reversed(record["top_logprobs"])} for record in records
        ],
        "text_offset": offsets,
    }
