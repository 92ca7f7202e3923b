"""Request bodies of OpenAI's completions, and of the completion endpoint for editors; what chats share with them.

Some fields have no effect here. They are accepted because clients send them.
"""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.logprobs import Penalties, TopLogprobs
from diffusify.serving.api.schemas import (
    MAX_TEXTS,
    SamplingFields,
    Seed,
    TokenIds,
    UnicodeText,
)

MAX_STOPS, MAX_STOP_LENGTH = 64, 1000


def _check_stops(stop: str | list[str] | None) -> str | list[str] | None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings exceed the limit of {MAX_STOPS}")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"a stop string has {len(text)} characters; it needs 1 to {MAX_STOP_LENGTH}")
    return stop


class OpenAIFields(SamplingFields):
    """The fields that OpenAI's endpoints share."""

    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = 1
    stop: Annotated[str | list[str] | None, AfterValidator(_check_stops)] = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    denoise: bool = Field(False, description="With `stream`: also send an event for every denoising step.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    service_tier: str | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

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
        return replace(config, observer=TopLogprobs(self.num_top_logprobs)) if self.num_top_logprobs else config

    @model_validator(mode="after")
    def _check_denoise(self) -> "OpenAIFields":
        if self.denoise and not self.stream:
            raise ValueError("denoise sends an event for every step; it needs stream")
        return self


class CompletionBody(OpenAIFields):
    """OpenAI's POST /v1/completions. With a `suffix`, the model fills the span between `prompt` and `suffix`."""

    prompt: (
        UnicodeText
        | Annotated[list[UnicodeText], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    ) = ""
    suffix: UnicodeText | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = Field(16, description="With 0 nothing is generated.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = Field(False, description="Repeat the prompt; with `logprobs` also those of its tokens.")
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
        if self.suffix and (self.echo or not self.max_tokens):
            raise ValueError("a suffix needs max_tokens above 0 and excludes echo")
        return self


class FimBody(CompletionBody):
    """The editors' POST /v1/fim/completions: the text before the cursor and the text after it."""

    prompt: UnicodeText = ""  # pyright: ignore[reportIncompatibleVariableOverride]  (narrower)
    min_tokens: int | None = Field(None, description="Ignored.")
    random_seed: Seed | None = Field(None, description="Another name of `seed`.")

    @model_validator(mode="after")
    def _read_random_seed(self) -> "FimBody":
        self.seed = self.random_seed if self.seed is None else self.seed
        return self


def _token_id(key: str) -> int:
    if not key.isdecimal() or int(key) >= 2**31:
        raise ValueError(f'logit_bias: "{key}" is not a token id')
    return int(key)
