"""How a model is to write, in the words that users and servers know."""

from dataclasses import dataclass
from typing import Any, Literal

from diffusify.diffusion.picking import Draw, Greedy, Pick
from diffusify.diffusion.policies import Policy, Threshold, Unmask
from diffusify.sampling.sampler import Sampler

# What lossless decoding leaves as it is.
_GREEDY: dict[str, Any] = {
    "steps": None, "threshold": None, "policy": None, "window": None, "guidance": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingConfig:
    """How a model writes. Unset values are the model's own, as its card has them.

    - `steps`: denoising steps in all. `threshold`: every token with a higher probability is written at once (and, where
      `steps` are given too, never fewer than they ask for). `policy`: any other rule in place of the card's.
    - `temperature` 0 takes the likeliest token; else tokens are drawn, from the `top_k` likeliest or the fewest that
      hold `top_p` of the probability. `repetition_penalty` above 1 makes tokens that the text has already less likely.
    - `length_beam`: so many lengths are tried, and the surest text is kept, where the model tells lengths and none is
      given. `window`: a model that sees both ways writes so many tokens at a time, from left to right.
    - `guidance` above 0: what fits the prompt more than it fits none (classifier-free; twice the work).
    - `cache` keeps finished blocks, exactly, where the model writes in blocks; `prefix` and `dual` keep what is around
      the window of a model that sees both ways, approximately.
    - `lossless`: what left-to-right decoding would write, in fewer forwards, where the model can (see `Lossless`).
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
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token; unset, all is written at once")
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance} must be at least 0, which is none")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1.0 is none, 1.2 is usual")
        if self.lossless and any(getattr(self, name) != value for name, value in _GREEDY.items()):
            raise ValueError("lossless decoding has steps of its own; leave out all but temperature, top_k and top_p")
        self.sampler(Unmask())

    @property
    def pick(self) -> Pick:
        return Greedy() if self.temperature == 0 else Draw(float(self.temperature), self.top_k, float(self.top_p))

    def sampler(self, default: Policy, *, banned: tuple[int, ...] = (), end: int | None = None) -> Sampler:
        """The loop with these settings. ValueError for one that is out of bounds."""
        policy = (self.policy or default) if self.threshold is None else Unmask(quota=Threshold(float(self.threshold)))
        return Sampler(
            self.pick,
            policy,
            self.steps,
            banned=banned,
            end_token_id=end,
            repetition_penalty=float(self.repetition_penalty),
        )
