"""OpenAI's requests, and what editors send.

Fields that have no effect here are taken all the same, because clients send them.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffusify.config import nearest
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.logprobs import Penalties, TopLogprobs
from diffusify.serving.api.schemas import TEXTS, Count, Ids, InfillBody, SamplingFields, Seed, Words, letters
from diffusify.text.grammar import schema_regex


class OpenAI(SamplingFields):
    """What OpenAI's two endpoints have in common."""

    n: Annotated[int, Field(ge=1, le=TEXTS)] = 1
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    denoise: bool = Field(False, description="With `stream`: an event for every step, too.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    service_tier: str | None = Field(None, description="Without effect.")
    store: bool | None = Field(None, description="Without effect.")

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_asked(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are to be told; None if nothing is."""
        return None

    def penalties(self) -> Penalties | None:
        bias = tuple(sorted((_token(key), value) for key, value in (self.logit_bias or {}).items()))
        found = Penalties(bias, self.presence_penalty, self.frequency_penalty)
        return None if found == Penalties() else found

    def settings(self, lm: DiffusionLM, *, holes: bool = False) -> SamplingConfig:
        rows = lm.denoiser.vocabulary
        for token, _ in (self.penalties() or Penalties()).bias:
            if token >= rows:
                raise ValueError(f"logit_bias: token {token} is beyond the {rows} that the model knows")
        return super().settings(lm, holes=holes)

    def watched(self, settings: SamplingConfig, lm: DiffusionLM) -> SamplingConfig:
        """The settings, with the likeliest tokens taken down, where they are to be told."""
        if not self.top:
            return settings
        if settings.tolerance is not None:
            if self.tolerance is not None or self.preset:
                raise ValueError(f"tolerance={settings.tolerance} tells no alternatives; leave it out, or top_logprobs")
            settings = replace(settings, tolerance=None)
        policy = TopLogprobs(settings.sampler(lm.config.policy).policy, self.top)
        return replace(settings, threshold=None, policy=policy)

    @model_validator(mode="after")
    def _events_are_streamed(self) -> "OpenAI":
        if self.denoise and not self.stream:
            raise ValueError("denoise tells of every step; it needs stream")
        return self


class CompletionBody(OpenAI):
    """OpenAI's POST /v1/completions. With a `suffix`, what is written leads up to it."""

    prompt: (
        Words
        | Annotated[list[Words], Field(min_length=1, max_length=TEXTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=TEXTS)]
    ) = ""
    suffix: Words | None = None
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item]

    @property
    def top(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _goes_together(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} must be n={self.n}; every text that is written is returned")
        if len(self.prompts) * self.n > TEXTS:
            raise ValueError(f"{len(self.prompts)} prompts with n={self.n} are more than {TEXTS} texts")
        return self


class Schema(BaseModel):
    """A JSON schema, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    body: dict[str, Any] = Field(alias="schema")


class Format(BaseModel):
    """OpenAI's response_format."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_schema"]
    json_schema: Schema | None = None


class Message(BaseModel):
    """A turn of a chat; contents are text."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Words | list[dict[str, Any]]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
            raise ValueError("messages are text; leave out parts of another type")
        return letters("".join(part["text"] for part in self.content))


class ChatBody(OpenAI):
    """OpenAI's POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None

    @property
    def room(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def form(self) -> str | None:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return self.regex
        if asked.json_schema is None or self.regex is not None:
            raise ValueError("response_format json_schema needs its schema, and goes without a regex")
        return schema_regex(asked.json_schema.body)

    @property
    def chat(self) -> list[dict[str, str]]:
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in self.messages]


class FimBody(SamplingFields):
    """What editors send to POST /v1/fim/completions: the text before the cursor, and behind it."""

    prompt: Words
    suffix: Words | None = None
    max_tokens: Count | None = 16
    min_tokens: int | None = Field(None, description="Without effect.")
    stop: Words | list[Words] | None = None
    stream: bool = False
    random_seed: Seed | None = None


def _token(key: str) -> int:
    if not key.isdecimal() or int(key) >= 2**31:
        raise ValueError(f'logit_bias: "{key}" is no token id')
    return int(key)


KNOWN = sorted({name for body in (CompletionBody, ChatBody, InfillBody) for name in body.model_fields})


def unknown(name: str) -> str:
    """The message for a field that nobody knows."""
    return f'"{name}" is not known{nearest(name, KNOWN)}'
