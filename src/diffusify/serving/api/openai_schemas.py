"""Request bodies of OpenAI's endpoints, and of the completion endpoint for editors.

Some fields have no effect here. They are accepted because clients send them.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffusify.config import nearest
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.logprobs import Penalties, TopLogprobs
from diffusify.serving.api.schemas import (
    MAX_TEXTS,
    Count,
    InfillBody,
    SamplingFields,
    Seed,
    TokenIds,
    UnicodeText,
    check_unicode,
)
from diffusify.text.grammar import schema_regex


class OpenAIFields(SamplingFields):
    """The fields that OpenAI's two endpoints share."""

    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = 1
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    denoise: bool = Field(False, description="With `stream`: also send an event for every denoising step.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    service_tier: str | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported; None if log-probabilities were not requested."""
        return None

    def penalties(self) -> Penalties | None:
        bias = tuple(sorted((_token_id(key), value) for key, value in (self.logit_bias or {}).items()))
        found = Penalties(bias, self.presence_penalty, self.frequency_penalty)
        return None if found == Penalties() else found

    def sampling_config(self, lm: DiffusionLM, *, infilling: bool = False) -> SamplingConfig:
        vocab_size = lm.denoiser.vocab_size
        for token, _ in (self.penalties() or Penalties()).bias:
            if token >= vocab_size:
                raise ValueError(f"logit_bias: token {token} is outside the vocabulary of {vocab_size} tokens")
        config = super().sampling_config(lm, infilling=infilling)
        return self._with_top_logprobs(config, lm)

    def _with_top_logprobs(self, config: SamplingConfig, lm: DiffusionLM) -> SamplingConfig:
        """The settings with a policy that records the most likely tokens, if they were requested."""
        if not self.num_top_logprobs:
            return config
        if config.tolerance is not None:
            if self.tolerance is not None or self.preset:
                raise ValueError(
                    f"tolerance={config.tolerance} cannot report top logprobs; leave out either tolerance or them"
                )
            config = replace(config, tolerance=None)
        policy = TopLogprobs(config.sampler(lm.config.policy).policy, self.num_top_logprobs)
        return replace(config, threshold=None, policy=policy)

    @model_validator(mode="after")
    def _check_denoise(self) -> "OpenAIFields":
        if self.denoise and not self.stream:
            raise ValueError("denoise sends an event for every step; it needs stream")
        return self


class CompletionBody(OpenAIFields):
    """OpenAI's POST /v1/completions. With a `suffix`, the model fills the span between `prompt` and `suffix`."""

    prompt: (
        UnicodeText
        | Annotated[list[UnicodeText], Field(min_length=1, max_length=MAX_TEXTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS)]
    ) = ""
    suffix: UnicodeText | None = None
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item]

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_counts(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} must equal n={self.n}; all generated texts are returned")
        if len(self.prompts) * self.n > MAX_TEXTS:
            raise ValueError(f"{len(self.prompts)} prompts with n={self.n} exceed the limit of {MAX_TEXTS} texts")
        return self


class JSONSchema(BaseModel):
    """A JSON schema, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's response_format."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_schema"]
    json_schema: JSONSchema | None = None


class Message(BaseModel):
    """A chat message with text content."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: UnicodeText | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The content. Raises ValueError if a part of it is not text."""
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
            raise ValueError("messages must be text; leave out parts of another type")
        return check_unicode("".join(part["text"] for part in self.content))


class ChatBody(OpenAIFields):
    """OpenAI's POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The length limit of the answer, if there is one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def constraint(self) -> str | None:
        response_format = self.response_format
        if response_format is None or response_format.type == "text":
            return self.regex
        if response_format.json_schema is None or self.regex is not None:
            raise ValueError("response_format json_schema needs a schema, and excludes regex")
        return schema_regex(response_format.json_schema.body)

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in self.messages]


class FimBody(SamplingFields):
    """The editors' POST /v1/fim/completions: the text before the cursor and the text after it."""

    prompt: UnicodeText
    suffix: UnicodeText | None = None
    max_tokens: Count | None = 16
    min_tokens: int | None = Field(None, description="Ignored.")
    stop: UnicodeText | list[UnicodeText] | None = None
    stream: bool = False
    random_seed: Seed | None = None


def _token_id(key: str) -> int:
    if not key.isdecimal() or int(key) >= 2**31:
        raise ValueError(f'logit_bias: "{key}" is not a token id')
    return int(key)


_FIELDS = sorted({name for body in (CompletionBody, ChatBody, InfillBody) for name in body.model_fields})


def unknown_field(name: str) -> str:
    """The error message for an unknown field, with the most similar known one."""
    return f'"{name}" is not known{nearest(name, _FIELDS)}'
