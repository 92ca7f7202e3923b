"""Request bodies with their bounds, and how they become a `SamplingConfig`."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffusify.config import from_plain
from diffusify.diffusion.policies import Policy
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import Preset, SamplingConfig
from diffusify.serving.api.logprobs import Penalties
from diffusify.text.unicode import check_unicode

UnicodeText = Annotated[str, AfterValidator(check_unicode)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

MAX_TEXTS = 128  # in one request
_SAMPLING_FIELDS = (  # of the same name in `SamplingConfig`
    "steps", "threshold", "tolerance", "window", "guidance", "repetition_penalty", "cache", "length_beam", "rerank",
    "top_k",
)  # fmt: skip


# Fields of OpenAI's API that ask for something else than text, or that others have replaced.
UNSUPPORTED_FIELDS = {
    "audio": "this server takes and gives text",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "web_search_options": "this server does not search the web",
    "previous_response_id": "this server stores no responses; send the whole conversation as input",
    "conversation": "this server stores no conversations; send the whole conversation as input",
}


class Body(BaseModel):
    """A request body. Null means that a field is left out, and unknown fields are errors, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="A model of GET /v1/models.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {*cls.model_fields, *UNSUPPORTED_FIELDS}
        return {name: value for name, value in data.items() if value is not None or name not in known}


class SamplingFields(Body):
    """Sampling settings: OpenAI's fields, and those of `SamplingConfig`."""

    seed: Seed | None = Field(None, description="The same seed gives the same text; default: a new seed each time.")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count | None = None
    steps: Count | None = Field(None, description="Number of denoising steps.")
    threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Each step decodes all tokens whose probability exceeds this threshold."
    )
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Self-speculative decoding: accepts a draft token that is at most this many nats less likely than "
        "the AR half's own choice; 0 is lossless, the default of models that keep their AR half.",
    )
    policy: str | dict[str, Any] | None = Field(None, description="A decoding policy, as in a diffusion_config.json.")
    window: Count | None = Field(None, description="Number of tokens decoded at a time, for bidirectional models.")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    cache: Literal["exact", "prefix", "dual", "none"] | None = None
    length_beam: Annotated[int, Field(ge=1, le=16)] | None = None
    rerank: Annotated[int, Field(ge=2, le=16)] | None = Field(
        None, description="Number of fillings of masked spans, of which the AR half's likeliest text is kept."
    )
    preset: Preset | None = Field(None, description="Settings that suit the model; other fields override them.")
    regex: Annotated[UnicodeText, Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="A regular expression that the whole generated text matches."
    )
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, str] | None = Field(None, description="Ignored.")

    @property
    def constraint(self) -> str | None:
        """The regular expression that the generated text has to match."""
        return self.regex

    def sampling_config(self, lm: DiffusionLM, *, infilling: bool = False) -> SamplingConfig:
        """The settings for a continuation, or for infilling. Raises ValueError for fields that exclude each other."""
        config = lm.config.infiller if infilling else lm.config
        start = SamplingConfig() if self.preset is None else SamplingConfig.preset(self.preset, config)
        changes = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.policy is not None:
            changes["policy"] = from_plain(self.policy, Policy, "policy")
        seed = secrets.randbits(31) if self.seed is None else self.seed
        changes |= {"regex": self.constraint, "logits_processor": self.penalties(), "seed": seed}
        return start.override(**changes, temperature=self.temperature, top_p=self.top_p)

    def penalties(self) -> Penalties | None:
        """The logits processor, if there is one."""
        return None


class InfillBody(SamplingFields):
    """A text with masked spans (`[[8]]`, `[[3-12]]`, `[[...]]`), or token ids with null where tokens are generated."""

    text: UnicodeText | None = None
    tokens: Annotated[list[TokenId | None], Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    stream: bool = False
    denoise: bool = Field(False, description="With `stream`: also send an event for every denoising step.")

    @model_validator(mode="after")
    def _check(self) -> "InfillBody":
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give either text with masked spans, or tokens with nulls")
        if self.denoise and not self.stream:
            raise ValueError("denoise sends an event for every step; it needs stream")
        return self


class TokenizeBody(Body):
    """A text, which may have masked spans."""

    text: UnicodeText


class AlternativesBody(Body):
    """A position, and the tokens around it. The token at the position itself is ignored."""

    tokens: Annotated[list[TokenId | None], Field(min_length=1)]
    position: TokenId
    top: Annotated[int, Field(ge=1, le=100)] = 10


class ScoreBody(Body):
    """A text to score, after a prompt if there is one."""

    text: Annotated[UnicodeText, Field(min_length=1)]
    prompt: UnicodeText = ""
    measure: Literal["best", "exact", "bound"] = "best"
    draws: Annotated[int, Field(ge=1, le=64)] = 8
    seed: Seed = 0
