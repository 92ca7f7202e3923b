"""OpenAI's completions of prompts, with an optional suffix, and fill-in-the-middle for editors."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.choices import EchoedPrompts, ParsedRequest
from diffusify.serving.api.openai_format import ChatFormat, CompletionFormat, respond
from diffusify.serving.api.openai_schemas import CompletionBody, FimBody
from diffusify.serving.api.service import Service, get_service, wait_or_cancel
from diffusify.serving.api.token_logits import PromptLogprobs
from diffusify.serving.engine.generation_progress import TextStream
from diffusify.text.prompts import encode_infill_text

router = APIRouter()


@router.post("/v1/completions", summary="Continue a prompt, or fill the span between a prompt and a suffix")
async def complete(body: CompletionBody, request: Request) -> Response:
    """OpenAI's completions."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    return await respond(service, request, lm, body, await _parse(service, request, lm, body), CompletionFormat())


@router.post("/v1/fim/completions", summary="Fill in the middle, for editors")
async def fill_in_the_middle(body: FimBody, request: Request) -> Response:
    """Completions at an editor's cursor, as chat completions."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    return await respond(service, request, lm, body, await _parse(service, request, lm, body), ChatFormat())


async def _parse(service: Service, request: Request, lm: DiffusionLM, body: CompletionBody) -> ParsedRequest:
    service.check_texts(lm, body.prompts, body.suffix)
    if body.suffix:
        return _parse_suffix(service, lm, body, body.suffix)
    return await _parse_continuation(service, request, lm, body)


async def _parse_continuation(
    service: Service, request: Request, lm: DiffusionLM, body: CompletionBody
) -> ParsedRequest:
    """A continuation of the prompts, at most to the end of the context."""
    tokenizer = lm.tokenizer
    distinct = [tokenizer.add_start(tokenizer.encode(p)) if isinstance(p, str) else p for p in body.prompts]
    prompts = [prompt for prompt in distinct for _ in range(body.n)]
    lengths = [min(body.max_tokens, service.room(lm, len(prompt), len(prompts))) for prompt in prompts]
    echo = await _echo(service, request, lm, body, distinct) if body.echo or not body.max_tokens else None

    def prepare(lm: DiffusionLM) -> GenerationRun:
        return lm.prepare_generation(prompts, lengths, body.sampling_config(lm))

    def new_text(_: int, positions: list[int]) -> TextStream:
        ends = frozenset(tokenizer.end_token_ids)
        return TextStream(positions, lambda ids: tokenizer.decode(ids, continues=True), ends, body.stops)

    return ParsedRequest(prepare if body.max_tokens else None, new_text, body.n, echo)


async def _echo(
    service: Service, request: Request, lm: DiffusionLM, body: CompletionBody, prompts: list[list[int]]
) -> EchoedPrompts:
    """The prompts as they are repeated before their continuations, with log-probabilities if these are requested."""
    given = zip(body.prompts, prompts, strict=True)
    texts = [("" if not body.echo else p if isinstance(p, str) else lm.tokenizer.decode(ids)) for p, ids in given]
    texts = [text for text in texts for _ in range(body.n)]
    num_tokens, top = sum(map(len, prompts)), body.logprobs
    if top is None or not body.echo:
        return EchoedPrompts(texts, [[] for _ in texts], num_tokens)

    def prepare(lm: DiffusionLM) -> Any:
        service.check_length(lm, max(map(len, prompts)))
        return PromptLogprobs(lm, prompts, top)

    job = service.submit(body.model, prepare, request, progress=False)
    await wait_or_cancel(request, job.result())
    logprobs = [found for found in job.work.found for _ in range(body.n)]
    return EchoedPrompts(texts, logprobs, num_tokens, job.work.forwards)


def _parse_suffix(service: Service, lm: DiffusionLM, body: CompletionBody, suffix: str) -> ParsedRequest:
    """Masked spans before the suffix, of up to `max_tokens` tokens.

    The model finds the length itself or several are tried, unless a constraint is given.
    """
    tokenizer = lm.tokenizer
    prompts = [prompt for prompt in body.prompts for _ in range(body.n)]
    encoded = [encode_infill_text(tokenizer, [prompt, range(1, 2), suffix]) for prompt in body.prompts]
    longest = max(sum(len(part) for part in parts if isinstance(part, list)) for parts in encoded)
    settings = body.sampling_config(lm, infilling=True)

    def lengths(longest: int) -> range:
        return range(longest if body.constraint else 1, longest + 1)

    candidates, tokens = lm.count_infillings([[lengths(body.max_tokens)]], [settings])
    given = longest + (3 if tokens == "end" else 2)  # the start token and the end tokens of the text and of the span
    max_length = min(body.max_tokens, service.room(lm, given, candidates * len(prompts)))

    def prepare(lm: DiffusionLM) -> GenerationRun:
        return lm.prepare_infilling([[prompt, lengths(max_length), suffix] for prompt in prompts], settings)

    def new_text(i: int, positions: list[int]) -> TextStream:
        prompt = prompts[i]
        # A space at the prompt's end becomes part of the span's first token.
        space = " " if isinstance(prompt, str) and prompt.endswith(" ") else ""

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, continues=True).removeprefix(space)

        return TextStream(positions, decode, frozenset(), body.stops, max_tokens=max_length)

    return ParsedRequest(prepare, new_text, body.n)
