"""The request body of OpenAI's chat completions."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusify.serving.api.openai_schemas import OpenAIFields
from diffusify.serving.api.schemas import Count, UnicodeText
from diffusify.text.grammar import schema_regex
from diffusify.text.json_object import json_object_regex
from diffusify.text.unicode import check_unicode


class JSONSchema(BaseModel):
    """A JSON schema, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's response_format."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @property
    def regex(self) -> str | None:
        """The regular expression that the answer has to match, None for any text."""
        if self.type == "json_object":
            return json_object_regex()
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise ValueError("response_format json_schema needs a schema")
        return schema_regex(self.json_schema.body)


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: UnicodeText | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema, which the arguments always follow.")
    strict: bool | None = Field(None, description="Ignored; arguments always follow their schema.")


class Tool(BaseModel):
    """A tool of OpenAI's `tools`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """The tool as a chat template takes it."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}


class FunctionName(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A `tool_choice` of one function."""

    type: Literal["function"] = "function"
    function: FunctionName


class CalledFunction(BaseModel):
    """A function that was called, with its arguments as JSON."""

    name: str
    arguments: str = "{}"


class PastToolCall(BaseModel):
    """A tool call of an earlier message."""

    model_config = ConfigDict(extra="ignore")
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def plain(self) -> dict[str, Any]:
        """The call as a chat template takes it, with arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"messages: the arguments of {self.function.name} are not a JSON object")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": call_id(self.id), "type": "function", "function": function}


def call_id(given: str) -> str:
    """The last nine letters and digits of a call's id, since Mistral's templates accept no others."""
    return "".join(char for char in given if char.isascii() and char.isalnum())[-9:].rjust(9, "0")


class Message(BaseModel):
    """A chat message with text content."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: UnicodeText | list[dict[str, Any]] | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    name: UnicodeText | None = None
    function_call: None = Field(None, description="Replaced by `tool_calls`.")

    @property
    def text(self) -> str:
        """The content; parts are joined by line breaks. Raises ValueError if there is none or a part is not text."""
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise ValueError(f"messages: a message of the {self.role} has no content")
        if isinstance(self.content, str):
            return self.content
        parts = [part.get("text", part.get("refusal")) for part in self.content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("messages must be text; leave out parts of another type")
        return check_unicode("\n".join(map(str, parts)))

    @property
    def plain(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.role == "assistant" and self.tool_calls:
            plain["tool_calls"] = [call.plain for call in self.tool_calls]
        if self.role == "tool":
            plain |= {"tool_call_id": call_id(self.tool_call_id or "")} | ({"name": self.name} if self.name else {})
        return plain


class ChatBody(OpenAIFields):
    """OpenAI's POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = Field(None, description="Ignored.")
    reasoning_effort: str | None = Field(None, description="Ignored.")
    verbosity: str | None = Field(None, description="Ignored.")
    prompt_cache_retention: str | None = Field(None, description="Ignored.")

    @property
    def max_new_tokens(self) -> int | None:
        """The length limit of the answer, if there is one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def constraint(self) -> str | None:
        regex = None if self.response_format is None else self.response_format.regex
        if regex is not None and self.regex is not None:
            raise ValueError("response_format excludes regex; leave out one of the two")
        return regex or self.regex

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice requires a tool call, but there are no tools")
        return [] if self.tool_choice == "none" else self.tools

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [message.plain for message in self.messages]
