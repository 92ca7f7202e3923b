"""How a model is to write, in the words that users and servers know."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusify.canvas import Move
from diffusify.config import DiffusionConfig, from_plain, to_plain
from diffusify.diffusion.constraints import Constraint
from diffusify.diffusion.picking import Draw, Greedy, Pick
from diffusify.diffusion.policies import Policy, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.step import StepState
from diffusify.sampling.sampler import LogitsProcessor, Sampler

Preset = Literal["quality", "balanced", "fast"]

# What speculative decoding has no use for.
_STEPWISE = ("steps", "threshold", "policy", "window", "guidance", "repetition_penalty", "logits_processor", "regex")


@dataclass(frozen=True)
class SamplingConfig:
    """How a model writes. Unset values are the model's own, as its card has them.

    - `steps`: denoising steps in all. `threshold`: every token with a higher probability is written at once (and, where
      `steps` are given too, never fewer than they ask for). `policy`: any other rule in place of the card's, as one of
      your own.
    - `tolerance`: the model drafts, and its own left-to-right half keeps what it finds at most so many nats less likely
      than its own choice. 0 is lossless: what left-to-right decoding would write, in fewer forwards (`Speculative`).
    - `temperature` 0 takes the likeliest token; else tokens are drawn, from the `top_k` likeliest or the fewest that
      hold `top_p` of the probability. `repetition_penalty` above 1 makes tokens that the text has already less likely.
      `suppress_tokens` are ids that are never written. `logits_processor(logits, canvas, asked)` has the last word on
      the logits; it cannot be saved.
    - `regex`: a regular expression that each text that is written matches as a whole; for JSON see `schema_regex`.
    - `length_beam`: so many lengths are tried, and the surest text is kept, where the model tells lengths and none is
      given. `window`: a model that sees both ways writes so many tokens at a time, from left to right.
    - `guidance` above 0: what fits the prompt more than it fits none (classifier-free; twice the work).
    - `cache` keeps finished blocks, exactly, where the model writes in blocks; `prefix` and `dual` keep what is around
      the window of a model that sees both ways, approximately.
    """

    steps: int | None = None
    threshold: float | None = None
    policy: Policy | Callable[[StepState], Move] | None = None
    tolerance: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    length_beam: int = 3
    window: int | None = None
    guidance: float = 0.0
    cache: Literal["exact", "prefix", "dual", "none"] = "exact"
    seed: int = 0
    logits_processor: LogitsProcessor | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token")
        if self.threshold is not None and self.policy is not None:
            raise ValueError(f"threshold={self.threshold} is a policy by itself; leave {self.policy} or the threshold")
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"tolerance={self.tolerance} must be at least 0 nats, which is lossless")
        if self.length_beam < 1:
            raise ValueError(f"length_beam={self.length_beam} must be at least 1, the likeliest length alone")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token; unset, all is written at once")
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance} must be at least 0, which is none")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1.0 is none, 1.2 is usual")
        if self.tolerance is not None:
            for name in _STEPWISE:
                if getattr(self, name) != getattr(SamplingConfig, name):
                    raise ValueError(
                        f"tolerance={self.tolerance} drafts from left to right in steps of its own; leave out {name}"
                    )
        self.sampler(Unmask())

    @classmethod
    def preset(cls, name: Preset, card: DiffusionConfig) -> "SamplingConfig":
        """Settings for a kind of model: `quality` spares no forward, `fast` as many as it can, `balanced` in between.

        Where the model keeps its left-to-right half, `quality` is that half's own text.
        """
        if card.reads_as_ar_model:
            return cls(tolerance={"quality": 0.0, "balanced": 0.7, "fast": 2.0}[name])
        if name == "quality":
            return cls(policy=Unmask())
        threshold = {"balanced": 0.9, "fast": 0.7}[name]
        if not card.sees_right_context:
            return cls(threshold=threshold)
        if card.recipe == "mlm":  # masked networks keep no keys and values
            return cls(threshold=threshold, window=32)
        return cls(threshold=threshold, window=32, cache="prefix" if name == "balanced" else "dual")

    def save(self, file: Path | str) -> None:
        """Write the settings as JSON. ValueError for a `logits_processor` or a policy of one's own, which is code."""
        own = None if isinstance(self.policy, Policy | None) else self.policy
        for name, code in (("logits_processor", self.logits_processor), ("policy", own)):
            if code is not None:
                raise ValueError(f"{name}={code} is code, which settings cannot keep")
        Path(file).write_text(json.dumps(to_plain(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path | str) -> "SamplingConfig":
        """Read settings that `save` wrote, or some of their fields. ValueError when they do not read."""
        try:
            return from_plain(json.loads(Path(file).read_text(encoding="utf-8")), cls, "settings")
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} does not read as settings: {error}") from error

    @property
    def pick(self) -> Pick:
        return Greedy() if self.temperature == 0 else Draw(float(self.temperature), self.top_k, float(self.top_p))

    def sampler(
        self,
        default: Policy,
        *,
        banned: tuple[int, ...] = (),
        end: int | None = None,
        constraint: Constraint | None = None,
    ) -> Sampler:
        """The loop with these settings. ValueError for one that is out of bounds."""
        policy = (self.policy or default) if self.threshold is None else Unmask(quota=Threshold(float(self.threshold)))
        return Sampler(
            self.pick,
            policy,
            self.steps,
            banned=tuple(sorted({*banned, *self.suppress_tokens})),
            end_token_id=end,
            repetition_penalty=float(self.repetition_penalty),
            logits_processor=self.logits_processor,
            constraint=constraint,
        )
