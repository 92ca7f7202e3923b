"""OpenAI's POST /v1/responses: one answer as text, whole or streamed. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from diffusify.serving.api.chat_completions import parse_chat
from diffusify.serving.api.chat_schemas import ChatBody
from diffusify.serving.api.choices import Choices
from diffusify.serving.api.logprobs import chat_logprobs
from diffusify.serving.api.responses import sse_event
from diffusify.serving.api.schemas import Count, SamplingFields, UnicodeText
from diffusify.serving.api.service import get_service, stream_response, wait_or_cancel

router = APIRouter()
_LOGPROBS = "message.output_text.logprobs"


class InputMessage(BaseModel):
    """A message of the input."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["message"] = "message"
    role: Literal["system", "user", "assistant", "developer"]
    content: UnicodeText | list[dict[str, Any]]


class TextFormat(BaseModel):
    """The form of the text."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(BaseModel):
    """OpenAI's `text`."""

    model_config = ConfigDict(extra="forbid")
    format: TextFormat = TextFormat()
    verbosity: str | None = Field(default=None, description="Ignored.")


def _no_tools(tools: list[Any]) -> list[Any]:
    if tools:
        raise ValueError("tools are a part of /v1/chat/completions only; send the request there")
    return tools


class ResponseBody(SamplingFields):
    """OpenAI's POST /v1/responses, without tools."""

    input: UnicodeText | Annotated[list[InputMessage], Field(min_length=1, max_length=1000)]
    instructions: UnicodeText | None = None
    max_output_tokens: Count | None = None
    stream: bool = False
    text: TextOptions = TextOptions()
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: list[str] = []
    tools: Annotated[list[Any], AfterValidator(_no_tools)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    stream_options: dict[str, Any] | None = Field(None, description="Ignored.")
    parallel_tool_calls: bool = Field(True, description="Ignored.")
    max_tool_calls: int | None = Field(None, description="Ignored.")
    reasoning: dict[str, Any] | None = Field(None, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored; nothing is stored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    prompt_cache_retention: str | None = Field(None, description="Ignored.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")

    @property
    def chat(self) -> ChatBody:
        """The request as one for a chat completion."""
        messages = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = [m if isinstance(m, dict) else m.model_dump(exclude={"type"}) for m in messages]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        form = self.text.format
        schema = None if form.json_schema is None else {"name": "answer", "schema": form.json_schema}
        return ChatBody.model_validate(
            self.model_dump(include=set(SamplingFields.model_fields), exclude_defaults=True)
            | {"model": self.model, "messages": messages, "max_completion_tokens": self.max_output_tokens}
            | {"response_format": {"type": form.type, "json_schema": schema}}
            | {"logprobs": _LOGPROBS in self.include or self.top_logprobs > 0, "top_logprobs": self.top_logprobs}
        )


@router.post("/v1/responses", summary="Answer a text or a conversation")
async def create_response(body: ResponseBody, request: Request) -> Response:
    """OpenAI's responses."""
    service, chat = get_service(request), body.chat
    lm = await service.models.get(body.model)
    choices = Choices(service, request, lm, chat, parse_chat(service, lm, chat))
    answer = _Answer(body, choices)
    if body.stream:
        return await stream_response(request, answer.events())
    await wait_or_cancel(request, choices.finish())
    return JSONResponse(answer.response())


class _Answer:
    """The JSON of a response and of its events."""

    def __init__(self, body: ResponseBody, choices: Choices) -> None:
        self.body, self.choices, self.created = body, choices, int(time.time())
        self.id, self.message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._sequence = 0

    @property
    def status(self) -> str:
        """OpenAI's status of the response."""
        reason = self.choices.finish_reasons.get(0)
        return {None: "in_progress", "length": "incomplete"}.get(reason, "completed")

    def content(self) -> dict[str, Any]:
        """The text of the message."""
        tokens = self.choices.logprobs(0) if self.choices.finish_reasons else None
        logprobs = [] if tokens is None else chat_logprobs(tokens, self.choices.lm.tokenizer)["content"]
        return {"type": "output_text", "text": self.choices.texts.get(0, ""), "annotations": [], "logprobs": logprobs}

    def message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The only output item."""
        kind = {"id": self.message_id, "type": "message", "role": "assistant"}
        return kind | {"status": self.status, "content": content}

    def response(self) -> dict[str, Any]:
        """The response as it is so far."""
        body, finished = self.body, bool(self.choices.finish_reasons)
        usage = None
        if finished:
            counts = self.choices.usage
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [self.message([self.content()])] if finished else [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": body.tool_choice,
            "tools": [],
            "top_p": body.top_p,
            "truncation": body.truncation,
            "usage": usage,
            "user": body.user,
        }

    async def events(self) -> AsyncIterator[str]:
        """The events of a streamed response."""
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        started = False
        async for _, deltas in self.choices.updates():
            if not started:
                started = True
                empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                response = self.response() | {"status": "in_progress", "output": [], "usage": None}
                item = self.message([]) | {"status": "in_progress"}
                yield self._event("response.created", response=response)
                yield self._event("response.in_progress", response=response)
                yield self._event("response.output_item.added", output_index=0, item=item)
                yield self._event("response.content_part.added", **place, part=empty)
            for delta in deltas:
                if delta.text:
                    yield self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
        content = self.content()
        yield self._event("response.output_text.done", **place, text=content["text"], logprobs=content["logprobs"])
        yield self._event("response.content_part.done", **place, part=content)
        yield self._event("response.output_item.done", output_index=0, item=self.message([content]))
        yield self._event(f"response.{self.status}", response=self.response())

    def _event(self, kind: str, **data: Any) -> str:
        self._sequence += 1
        return sse_event(kind, {"type": kind, "sequence_number": self._sequence - 1} | data)
