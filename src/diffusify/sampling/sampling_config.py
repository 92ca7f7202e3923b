"""The configuration of a generation, as the Python API, the command line and the server use it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusify.canvas import Move
from diffusify.config import DiffusionConfig, from_plain, to_plain
from diffusify.diffusion.attention import Causal
from diffusify.diffusion.constraints import Constraint
from diffusify.diffusion.picking import Draw, Greedy, Pick
from diffusify.diffusion.policies import Policy, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.step import StepState
from diffusify.sampling.sampler import LogitsProcessor, Observer, Sampler

Preset = Literal["quality", "balanced", "fast"]

# Fields of stepwise denoising, which speculative decoding does not support.
_STEPWISE = ("steps", "threshold", "policy", "window", "cache", "guidance")


@dataclass(frozen=True)
class SamplingConfig:
    """Holds the parameters of a generation. All of them are optional.

    A model that keeps its AR half decodes losslessly by default: it generates the text of AR decoding, in fewer forward
    passes. Any of `steps`, `threshold`, `policy`, `window`, `cache` and `guidance` selects diffusion decoding instead.

    Parameters that control the denoising steps:

    - `steps`: Total number of denoising steps. Defaults to one step per token, or fewer if the policy decodes several
      tokens per step.
    - `threshold`: Decodes all tokens with a probability above this value in each step, and at least one. With `steps`,
      it also decodes at least an even share of the tokens per step. Cannot be combined with `policy`.
    - `policy`: The rule that selects the tokens to decode or remask in each step, or a callable of your own. Defaults
      to the policy in the model's `diffusion_config.json`.
    - `window`: Decodes the text in windows of this many tokens, from left to right. Defaults to the whole text. Block
      models ignore it and decode block by block.
    - `tolerance`: Replaces denoising by self-speculative decoding, for models that keep their AR half: drafts are
      accepted if they are at most this many nats less likely than the AR half's own choice (`Speculative`). 0, the
      default of these models, is lossless.

    Parameters that control the choice of tokens:

    - `temperature`: 0 is greedy decoding, the default. Above 0, tokens are sampled.
    - `top_k`, `top_p`: Sample from the k most likely tokens, or from the smallest set of tokens with at least this
      total probability. By default all tokens are kept.
    - `repetition_penalty`: Values above 1 make tokens that already occur in the text less likely. Defaults to 1.
    - `suppress_tokens`: Token ids that are never generated.
    - `logits_processor`: A callable `(logits, canvas, positions) -> logits`, applied after them. It cannot be saved.
    - `observer`: A callable `(written, logits)`, which receives the positions that a step writes and their logits, as
      `LazyLogits`. It cannot be saved.
    - `regex`: A regular expression that each generated text, without its prompt, must match as a whole. See
      `schema_regex` for JSON.
    - `guidance`: Scale of classifier-free guidance. Values above 0 follow the prompt more closely, at twice the cost.
    - `seed`: Seed of the random numbers. Text i of a batch with shared settings uses `seed + i`.

    Parameters that control length and cache:

    - `stop`: A text or several, one of which ends a continuation or answer: generation stops as soon as it is complete,
      and the result ends where it begins.
    - `length_beam`: Number of predicted lengths to try, of which the most confident text is kept. Defaults to 3. Only
      used if the model has a length head and `max_new_tokens` is not given.
    - `rerank`: Fills masked spans this many times with different seeds and keeps the text to which the model's AR half
      gives the highest likelihood. Without a temperature, the first text is the greedy one and the others are sampled
      at 0.5. For models that keep their AR half. Default: no reranking.
    - `cache`: "exact" caches finished blocks of block models. "prefix" and "dual" are approximate caches for
      bidirectional models with a `window`: they keep what is before the window, or on both sides. Defaults to "exact".

    Raises ValueError if a value is out of range or two of them exclude each other.
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
    rerank: int | None = None
    window: int | None = None
    guidance: float = 0.0
    cache: Literal["exact", "prefix", "dual", "none"] = "exact"
    seed: int = 0
    logits_processor: LogitsProcessor | None = None
    regex: str | None = None
    observer: Observer | None = None
    stop: str | list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "suppress_tokens", tuple(self.suppress_tokens or ()))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        if "" in self.stop:
            raise ValueError("a stop string is empty, and every text contains it; leave it out")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 is greedy decoding")
        if self.threshold is not None and self.policy is not None:
            raise ValueError(f"threshold={self.threshold} is a policy by itself; leave out threshold or {self.policy}")
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"tolerance={self.tolerance} must be at least 0 nats; 0 is lossless")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be from -2**63 to 2**64 - 1")
        if self.length_beam < 1:
            raise ValueError(f"length_beam={self.length_beam} must be at least 1; 1 tries the most likely length only")
        if self.rerank is not None and self.rerank < 2:
            raise ValueError(f"rerank={self.rerank} must be at least 2 candidates; leave it unset for one")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token; leave it unset for one window")
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance} must be at least 0; 0 is no guidance")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1.0 is no penalty")
        if self.tolerance is not None and (fields := self.stepwise_fields()):
            raise ValueError(
                f"tolerance={self.tolerance} is speculative decoding, without {fields[0]}; leave out {fields[0]}"
            )
        self.sampler(Unmask())
        Draw(top_k=self.top_k, top_p=float(self.top_p))  # checks both, also where nothing is sampled

    def for_model(self, config: DiffusionConfig) -> "SamplingConfig":
        """These settings with the default of a model: lossless decoding if it keeps its AR half.

        An AR base has nothing else, so its settings of denoising steps have no effect.
        """
        if self.tolerance is not None or not config.reads_as_ar_model:
            return self
        settings = self
        if isinstance(config.attention, Causal):
            policy = None if isinstance(self.policy, Policy) else self.policy
            settings = replace(self, steps=None, threshold=None, window=None, policy=policy)
        return settings if settings.stepwise_fields() else replace(settings, tolerance=0.0)

    def for_infilling(self, config: DiffusionConfig) -> "SamplingConfig":
        """The settings of a model's continuations for its masked spans: without tolerance if they are in any order."""
        return self if config.infiller.reads_as_ar_model else replace(self, tolerance=None)

    def override(self, **changes: Any) -> "SamplingConfig":
        """These settings with some changed, without those that the changes exclude.

        Fields of denoising steps exclude `tolerance` and the reverse, and `threshold` and `policy` each other. Raises
        ValueError for changes that exclude one another.
        """
        changed = {name for name, value in changes.items() if value != getattr(SamplingConfig, name)}
        excluded = {"tolerance"} if changed & {*_STEPWISE} else set[str]()
        excluded |= {*_STEPWISE} if "tolerance" in changed else set()
        excluded |= {"policy"} if "threshold" in changed else set()
        excluded |= {"threshold"} if "policy" in changed else set()
        return replace(self, **{name: getattr(SamplingConfig, name) for name in excluded} | changes)

    def stepwise_fields(self) -> list[str]:
        """The names of the fields of stepwise denoising that are set."""
        return [name for name in _STEPWISE if getattr(self, name) != getattr(SamplingConfig, name)]

    @classmethod
    def preset(cls, name: Preset, config: DiffusionConfig) -> "SamplingConfig":
        """Recommended settings for a model: `quality` takes the most forward passes and `fast` the fewest.

        For models that keep their AR half, `quality` is lossless speculative decoding.
        """
        if config.reads_as_ar_model:
            return cls(tolerance={"quality": 0.0, "balanced": 0.7, "fast": 2.0}[name])
        if name == "quality":
            return cls(policy=Unmask())
        threshold = {"balanced": 0.9, "fast": 0.7}[name]
        if not config.sees_right_context:
            return cls(threshold=threshold)
        if config.recipe == "mlm":  # masked language models have no KV cache
            return cls(threshold=threshold, window=32)
        return cls(threshold=threshold, window=32, cache="prefix" if name == "balanced" else "dual")

    def save(self, file: Path | str) -> None:
        """Save the settings as JSON. Raises ValueError for a `logits_processor` or a policy of your own."""
        custom_policy = None if isinstance(self.policy, Policy | None) else self.policy
        codes = {"logits_processor": self.logits_processor, "observer": self.observer, "policy": custom_policy}
        for name, code in codes.items():
            if code is not None:
                raise ValueError(
                    f"{name}={code} is code, which cannot be saved; leave it out and pass it when sampling"
                )
        Path(file).write_text(json.dumps(to_plain(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path | str) -> "SamplingConfig":
        """Load saved settings; missing fields have their defaults. Raises ValueError if the file is not valid."""
        try:
            return from_plain(json.loads(Path(file).read_text(encoding="utf-8")), cls, "settings")
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is not a valid settings file: {error}") from error

    @property
    def pick(self) -> Pick:
        """The rule that picks a token from the logits: greedy, or sampling."""
        return Greedy() if self.temperature == 0 else Draw(float(self.temperature), self.top_k, float(self.top_p))

    def sampler(
        self,
        default: Policy,
        *,
        banned: tuple[int, ...] = (),
        end_token_id: int | tuple[int, ...] | None = None,
        constraint: Constraint | None = None,
    ) -> Sampler:
        """The sampler with these settings; `default` is the policy if none is set. Raises ValueError as the class."""
        policy = (self.policy or default) if self.threshold is None else Unmask(quota=Threshold(float(self.threshold)))
        return Sampler(
            self.pick,
            policy,
            self.steps,
            banned=tuple(sorted({*banned, *self.suppress_tokens})),
            end_token_id=end_token_id,
            repetition_penalty=float(self.repetition_penalty),
            logits_processor=self.logits_processor,
            observer=self.observer,
            constraint=constraint,
        )
