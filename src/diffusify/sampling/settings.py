"""How a model is to write, in the words that users and servers know."""

from dataclasses import dataclass
from typing import Any, Literal

from diffusify.diffusion.picking import Draw, Greedy
from diffusify.diffusion.policies import Policy, Threshold, Unmask
from diffusify.sampling.sampler import Sampler

# What greedy decoding has no room for.
_LOSSLESS: dict[str, Any] = {
    "steps": None, "threshold": None, "policy": None, "temperature": 0.0, "window": None, "guidance": 0.0,
    "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """How a model writes. Unset values are the model's own, as its card has them.

    `steps` denoising steps in all; `threshold` writes every token with a higher probability at once (and, where
    `steps` are given too, never fewer than they ask for); any other `policy` stands in for the card's. `temperature` 0
    takes the likeliest token. `length_beam`: so many lengths are tried, and the surest text is kept, where the model
    tells lengths and none is given. The `cache` keeps finished blocks, exactly, where the model writes in blocks;
    `prefix` and `dual` keep what is around the window in work of a model that sees both ways, approximately. Such a
    model may write in a `window` of so many tokens at a time, from left to right. `guidance` above 0 writes what fits the
    prompt more than it fits none (classifier-free; twice the work). `repetition_penalty` above 1 makes tokens that the
    text has already less likely.
    `lossless` writes what greedy left-to-right decoding would, in fewer forwards, where the model can (see `Lossless`).
    """

    steps: int | None = None
    threshold: float | None = None
    policy: Policy | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    length_beam: int = 3
    window: int | None = None
    guidance: float = 0.0
    repetition_penalty: float = 1.0
    cache: Literal["exact", "prefix", "dual", "none"] = "exact"
    lossless: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token")
        if self.threshold is not None and self.policy is not None:
            raise ValueError(f"threshold={self.threshold} is a policy by itself; leave {self.policy} or the threshold")
        if self.length_beam < 1:
            raise ValueError(f"length_beam={self.length_beam} must be at least 1, the likeliest length alone")
        if self.lossless and (self.temperature, self.steps, self.threshold, self.policy) != (0, None, None, None):
            raise ValueError(
                "lossless decoding is greedy, with steps of its own; leave temperature, steps and policy out"
            )
        self.sampler(Unmask())

    def sampler(self, default: Policy, *, banned: tuple[int, ...] = (), end: int | None = None) -> Sampler:
        """The loop with these settings. ValueError for one that is out of bounds."""
        pick = Greedy() if self.temperature == 0 else Draw(float(self.temperature), self.top_k, float(self.top_p))
        policy = (self.policy or default) if self.threshold is None else Unmask(quota=Threshold(float(self.threshold)))
        return Sampler(
            pick,
            policy,
            self.steps,
            banned=banned,
            end_token_id=end,
            repetition_penalty=float(self.repetition_penalty),
        )
