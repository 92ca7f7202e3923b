"""OpenAI's JSON of completions and chat completions: whole, or as the chunks of a stream."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.choices import Choices, Delta, ParsedRequest
from diffusify.serving.api.logprobs import chat_logprobs, completion_logprobs
from diffusify.serving.api.openai_schemas import OpenAIFields
from diffusify.serving.api.responses import StepEvents, sse_event
from diffusify.serving.api.service import Service, stream_response, wait_or_cancel
from diffusify.text.tool_calls import ToolCall


class EndpointFormat(Protocol):
    """The JSON of an endpoint: names of its objects, and what a choice has beside its index and finish reason."""

    id_prefix: str
    object: str
    chunk_object: str

    def whole(self, choices: Choices, choice: int) -> dict[str, Any]:
        """A finished choice."""
        ...

    def deltas(self, choices: Choices, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        """The chunks of what is new in a choice; the `first` ones have more."""
        ...

    def last(self, choices: Choices, choice: int) -> dict[str, Any]:
        """The chunk of a finished choice."""
        ...


class CompletionFormat:
    """The format of /v1/completions."""

    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole(self, choices: Choices, choice: int) -> dict[str, Any]:
        text = _echoed(choices, choice) + choices.texts[choice]
        return {"text": text, "logprobs": self._logprobs(choices, choice)}

    def deltas(self, choices: Choices, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        texts = [_echoed(choices, delta.choice) if first else "", delta.text]
        return [{"text": text, "logprobs": None} for text in texts if text]

    def last(self, choices: Choices, choice: int) -> dict[str, Any]:
        return {"text": "", "logprobs": self._logprobs(choices, choice)}

    def _logprobs(self, choices: Choices, choice: int) -> dict[str, Any] | None:
        tokens = choices.logprobs(choice)
        text = _echoed(choices, choice) + choices.texts[choice]
        return None if tokens is None else completion_logprobs(tokens, choices.lm.tokenizer, text)


class ChatFormat:
    """The format of /v1/chat/completions."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choices: Choices, choice: int) -> dict[str, Any]:
        text, calls = _echoed(choices, choice) + choices.texts[choice], choices.calls[choice]
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        return {"message": message, "logprobs": self._logprobs(choices, choice)}

    def deltas(self, choices: Choices, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if first:
            found.append({"role": "assistant", "content": _echoed(choices, delta.choice), "refusal": None})
        if delta.text:
            found.append({"content": delta.text})
        if delta.calls:
            found.append({"tool_calls": [{"index": n} | _tool_call(call) for n, call in enumerate(delta.calls)]})
        return [{"delta": each, "logprobs": None} for each in found]

    def last(self, choices: Choices, choice: int) -> dict[str, Any]:
        return {"delta": {}, "logprobs": self._logprobs(choices, choice)}

    def _logprobs(self, choices: Choices, choice: int) -> dict[str, Any] | None:
        tokens = choices.logprobs(choice)
        return None if tokens is None else chat_logprobs(tokens, choices.lm.tokenizer)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


def _echoed(choices: Choices, choice: int) -> str:
    echo = choices.parsed.echo
    return "" if echo is None else echo.texts[choice]


async def respond(
    service: Service,
    request: Request,
    lm: DiffusionLM,
    body: OpenAIFields,
    parsed: ParsedRequest,
    format: EndpointFormat,
) -> Response:
    """The response to a request in the format of its endpoint."""
    choices = Choices(service, request, lm, body, parsed)
    head = {"id": f"{format.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return await stream_response(request, _chunks(choices, head | {"object": format.chunk_object}, format))
    await wait_or_cancel(request, choices.finish())
    finished = [
        {"index": i} | format.whole(choices, i) | {"finish_reason": choices.finish_reasons[i]}
        for i in sorted(choices.finish_reasons)
    ]
    return JSONResponse(head | {"object": format.object, "choices": finished, "usage": choices.usage})


async def _chunks(choices: Choices, head: dict[str, Any], format: EndpointFormat) -> AsyncIterator[str]:
    """Deltas of final text and of tool calls; with `denoise`, the events of all steps between them."""
    events, started = StepEvents(choices.lm.tokenizer, has_end=False), set[int]()

    def chunk(choice: dict[str, Any], finish_reason: str | None = None) -> str:
        return sse_event(None, head | {"choices": [choice | {"finish_reason": finish_reason}]})

    async for event, deltas in choices.updates():
        if choices.body.denoise:
            for each in events.format(event):
                yield each
        for delta in deltas:
            for found in format.deltas(choices, delta, first=delta.choice not in started):
                yield chunk({"index": delta.choice} | found)
            started.add(delta.choice)
            if delta.finish_reason is not None:
                yield chunk({"index": delta.choice} | format.last(choices, delta.choice), delta.finish_reason)
    if choices.body.include_usage or choices.body.denoise:
        yield sse_event(None, head | {"choices": [], "usage": choices.usage})
    yield sse_event(None, "[DONE]")
