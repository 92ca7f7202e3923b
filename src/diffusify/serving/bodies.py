"""What clients may send, with its bounds, and what it means for the sampler."""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffusify.config import from_plain, nearest
from diffusify.diffusion.attention import Causal
from diffusify.diffusion.policies import Policy
from diffusify.sampling.generation import DiffusionLM
from diffusify.sampling.settings import Preset, SamplingConfig
from diffusify.serving.probabilities import Penalties, Watched
from diffusify.text.grammar import schema_regex


def _letters(text: str) -> str:
    """JSON can spell halves of letters, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a letter at {error.start}; send text that is UTF-8") from error
    return text


Words = Annotated[str, AfterValidator(_letters)]
TEXTS = 128  # at most in one request
_PLAIN = (
    *("steps", "threshold", "tolerance", "window", "guidance"),
    *("repetition_penalty", "cache", "length_beam", "top_k"),
)
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(min_length=1)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Body(BaseModel):
    """A request. A field that nobody knows is an error, as at OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="One of GET /v1/models.")


class Wishes(Body):
    """How a text is to be written: OpenAI's words, and the sampler's own."""

    seed: Seed | None = Field(None, description="The same seed gives the same text; unset: another one each time.")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count | None = None
    steps: Count | None = Field(None, description="Denoising steps in all.")
    threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Every token with a higher probability is written at once."
    )
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Drafts are kept if they are so many nats less likely than the left-to-right choice; 0: lossless.",
    )
    policy: str | dict[str, Any] | None = Field(None, description="A decoding policy as in a model's card.")
    window: Count | None = Field(None, description="So many tokens at a time, for models that see both ways.")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    cache: Literal["exact", "prefix", "dual", "none"] | None = None
    length_beam: Annotated[int, Field(ge=1, le=16)] | None = None
    preset: Preset | None = Field(None, description="Settings that suit the model; other fields change them.")
    regex: Annotated[Words, Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="What is written matches it as a whole."
    )
    user: str | None = Field(None, description="Without effect.")
    metadata: dict[str, str] | None = Field(None, description="Without effect.")

    @property
    def form(self) -> str | None:
        """The regular expression that is to be followed."""
        return self.regex

    def settings(self, lm: DiffusionLM) -> SamplingConfig:
        """Of the first text. ValueError for what does not go together, or not with the model."""
        start = SamplingConfig() if self.preset is None else SamplingConfig.preset(self.preset, lm.config)
        names = [
            "steps",
            "threshold",
            "tolerance",
            "window",
            "guidance",
            "repetition_penalty",
            "cache",
            "length_beam",
            "top_k",
        ]
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.policy is not None:
            changes["policy"] = from_plain(self.policy, Policy, "policy")
        stepwise = {"regex": self.form, "logits_processor": self.penalties()}
        if self.preset and any(stepwise.values()):
            start = replace(start, tolerance=None)
        if isinstance(lm.config.attention, Causal) and not any(stepwise.values()):
            changes = {name: value for name, value in changes.items() if name in ("top_k", "tolerance")}
            start = SamplingConfig(tolerance=0.0)
        seed = secrets.randbits(31) if self.seed is None else self.seed
        heat = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        return replace(start, **changes, **stepwise, **heat)

    def penalties(self) -> Penalties | None:
        return None


class OpenAI(Wishes):
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

    def settings(self, lm: DiffusionLM) -> SamplingConfig:
        rows = lm.denoiser.vocabulary
        for token, _ in (self.penalties() or Penalties()).bias:
            if token >= rows:
                raise ValueError(f"logit_bias: token {token} is beyond the {rows} that the model knows")
        return super().settings(lm)

    def watched(self, settings: SamplingConfig, lm: DiffusionLM) -> SamplingConfig:
        """The settings, with the likeliest tokens taken down, where they are to be told."""
        if not self.top:
            return settings
        if settings.tolerance is not None:
            if self.tolerance is not None or self.preset:
                raise ValueError(f"tolerance={settings.tolerance} tells no alternatives; leave it out, or top_logprobs")
            settings = replace(settings, tolerance=None)
        policy = Watched(settings.sampler(lm.config.policy).policy, self.top)
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
        return _letters("".join(part["text"] for part in self.content))


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


class FimBody(Wishes):
    """What editors send to POST /v1/fim/completions: the text before the cursor, and behind it."""

    prompt: Words
    suffix: Words | None = None
    max_tokens: Count | None = 16
    min_tokens: int | None = Field(None, description="Without effect.")
    stop: Words | list[Words] | None = None
    stream: bool = False
    random_seed: Seed | None = None


class InfillBody(Wishes):
    """A text with holes, `[[8]]` or `[[3-12]]`, or its tokens, null where they are to be written."""

    text: Words | None = None
    tokens: Annotated[list[Id | None], Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    stream: bool = False
    denoise: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "InfillBody":
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give text with holes, or tokens with nulls; one of the two")
        if self.denoise and not self.stream:
            raise ValueError("denoise tells of every step; it needs stream")
        return self


class TokenizeBody(Body):
    """A text, which may have holes."""

    text: Words


class AlternativesBody(Body):
    """What else could stand at a position?"""

    tokens: Annotated[list[Id | None], Field(min_length=1)]
    position: Id
    top: Annotated[int, Field(ge=1, le=100)] = 10


class ScoreBody(Body):
    """How likely is a text, or what follows a prompt?"""

    text: Annotated[Words, Field(min_length=1)]
    prompt: Words = ""
    measure: Literal["best", "exact", "bound"] = "best"
    draws: Annotated[int, Field(ge=1, le=64)] = 8
    seed: Seed = 0


def _token(key: str) -> int:
    if not key.isdecimal() or int(key) >= 2**31:
        raise ValueError(f'logit_bias: "{key}" is no token id')
    return int(key)


KNOWN = sorted({name for body in (CompletionBody, ChatBody, InfillBody) for name in body.model_fields})


def unknown(name: str) -> str:
    """The message for a field that nobody knows."""
    return f'"{name}" is not known{nearest(name, KNOWN)}'
