"""What clients may send, with its bounds, and what it means for the sampler."""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffusify.config import from_plain
from diffusify.diffusion.attention import Causal
from diffusify.diffusion.policies import Policy
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import Preset, SamplingConfig
from diffusify.serving.api.logprobs import Penalties


def letters(text: str) -> str:
    """JSON can spell halves of letters, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a letter at {error.start}; send text that is UTF-8") from error
    return text


Words = Annotated[str, AfterValidator(letters)]
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


class SamplingFields(Body):
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

    def settings(self, lm: DiffusionLM, *, holes: bool = False) -> SamplingConfig:
        """Of the first text, which is continued or has holes. ValueError for what does not go together."""
        card = lm.config.infiller if holes else lm.config
        start = SamplingConfig() if self.preset is None else SamplingConfig.preset(self.preset, card)
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
        if isinstance(card.attention, Causal) and not any(stepwise.values()):
            changes = {name: value for name, value in changes.items() if name in ("top_k", "tolerance")}
            start = SamplingConfig(tolerance=0.0)
        seed = secrets.randbits(31) if self.seed is None else self.seed
        heat = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        return replace(start, **changes, **stepwise, **heat)

    def penalties(self) -> Penalties | None:
        return None


class InfillBody(SamplingFields):
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
