"""OpenAI's chat completions."""

import json
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.chat_schemas import ChatBody
from diffusify.serving.api.choices import DEFAULT_ANSWER_LENGTH, ParsedRequest
from diffusify.serving.api.openai_format import ChatFormat, respond
from diffusify.serving.api.service import Service, get_service
from diffusify.serving.api.tools import tool_use
from diffusify.serving.engine.generation_progress import TextStream
from diffusify.text.unicode import check_unicode

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a chat")
async def chat(body: ChatBody, request: Request) -> Response:
    """OpenAI's chat completions."""
    service = get_service(request)
    lm = await service.models.get(body.model)
    return await respond(service, request, lm, body, parse_chat(service, lm, body), ChatFormat())


def parse_chat(service: Service, lm: DiffusionLM, body: ChatBody) -> ParsedRequest:
    """The answer to a chat, at most to the end of the context. An assistant's message at the end is continued."""
    messages, functions = body.chat, [tool.plain for tool in body.offered_tools]
    about_tools = json.dumps([functions, *(message.get("tool_calls") for message in messages)], ensure_ascii=False)
    service.check_texts(lm, [*(message["content"] for message in messages), check_unicode(about_tools)])
    prompt = lm.chat_template.prompt(messages, functions)
    tools = tool_use(lm, body, prompt)
    length = body.max_new_tokens
    if length is not None or lm.denoiser.length_head is None:
        length = min(length or DEFAULT_ANSWER_LENGTH, service.room(lm, len(prompt), body.n))

    def prepare(lm: DiffusionLM) -> GenerationRun:
        return lm.prepare_chat([prompt] * body.n, length, body.sampling_config(lm))

    def decode(ids: list[int]) -> str:
        return lm.tokenizer.decode(ids, continues=True) if tools is None else tools.decode(lm, ids)

    ends = frozenset(lm.chat_template.end_token_ids)
    trim: Callable[[str], str] = str.rstrip if messages[-1]["role"] == "assistant" else str.strip

    def new_text(_: int, positions: list[int]) -> TextStream:
        return TextStream(positions, decode, ends, body.stops, trim, None if tools is None else tools.format)

    return ParsedRequest(prepare, new_text, body.n, tools=tools)
