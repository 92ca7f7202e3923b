"""What to write, and what to take back.

Axes: b texts, n positions.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusify.canvas import Move
from diffusify.diffusion.moments import Moment, moved, open_share
from diffusify.diffusion.quotas import Evenly, Quota
from diffusify.diffusion.ranks import Confidence, Rank, best
from diffusify.diffusion.schedules import Linear, NoiseSchedule


@dataclass(frozen=True)
class Unmask:
    """Write the best-ranked guesses, as many as the quota says; never take one back."""

    rank: Rank = field(default_factory=Confidence)
    quota: Quota = field(default_factory=Evenly)

    def __call__(self, now: Moment) -> Move:
        write = best(self.rank(now), now.asked, self.quota(now))
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Ancestral:
    """Write each guess with the reverse process's own chance at this step (MDLM, DiffuLLaMA); all at the last."""

    schedule: NoiseSchedule = field(default_factory=Linear)

    def __call__(self, now: Moment, remasked: Float[Tensor, " b"] | float = 0.0) -> Move:
        """`remasked` is the chance that a written token is taken back in this step; the others make up for it."""
        before, after = _survival(self.schedule, now)
        chance = (after - (1 - remasked) * before) / (1 - before)
        write = now.asked & ((now.luck.uniform(now.asked) < chance[:, None]) | (now.step + 1 >= now.steps)[:, None])
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Reparam:
    """Judge every position anew at every step and keep the surest (RDM, Diffusion-LLM).

    A `curve` says how many positions stay noise; a written token that falls among the least sure is taken back. When
    `conditional`, only if the network still gives that token, and is less sure of it than when it was written.
    `noise` adds so much Gumbel noise to the scores at first, and less along the curve (stochastic routing).
    """

    revises: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
    curve: Literal["linear", "cosine"] = "cosine"
    conditional: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must be at least 0; 0.0 is deterministic routing")

    def __call__(self, now: Moment) -> Move:
        open, rank = now.canvas.open, now.guess.score
        share = open_share(self.curve, now)
        if self.noise:
            gumbel = -torch.log(-torch.log(now.luck.uniform(now.asked)))
            rank = rank + self.noise * share[:, None] * gumbel
        low = best(-rank, now.asked, (now.size * share + 1e-9).floor().long())
        falls = low & ~open
        if self.conditional:
            falls = falls & (now.guess.tokens == now.canvas.tokens) & (now.guess.score < now.score)
        return Move(write=now.asked & open & ~low, erase=falls)


@dataclass(frozen=True)
class Remask:
    """Any policy that writes, and written tokens taken back with a chance that keeps the noise level (ReMDM).

    `how`: the chance `eta` itself as far as it may be (cap), that share of the most it may be (rescale), or the most it
    may be shared out among the tokens by their doubt when they were written (confidence). Worth it where there are many
    more steps than tokens.
    """

    revises: ClassVar[bool] = True
    policy: Unmask | Ancestral = field(default_factory=Ancestral)
    how: Literal["cap", "rescale", "confidence"] = "rescale"
    eta: float = 0.02
    schedule: NoiseSchedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be in [0, 1]; 0.02 is usual")

    def __call__(self, now: Moment) -> Move:
        before, after = _survival(self.schedule, now)
        most = ((1 - after) / before.clamp_min(1e-9)).clamp_max(1.0)
        written = now.here & ~now.canvas.open
        chance = (most.clamp_max(self.eta) if self.how == "cap" else self.eta * most)[:, None].expand(written.shape)
        if self.how == "confidence":
            doubt = torch.where(written, -now.score.exp(), -torch.inf).softmax(1).nan_to_num()
            chance = doubt * most[:, None]
        erase = written & (now.luck.uniform(written) < chance)
        if not now.asked.any():
            return Move(torch.zeros_like(erase), erase)
        if isinstance(self.policy, Ancestral):
            mean = (chance * written).sum(1) / written.sum(1).clamp_min(1)
            return Move(self.policy(now, mean).write, erase)
        return Move(self.policy(now).write, erase)


@dataclass(frozen=True)
class Stable:
    """Write what is likely and has settled; where nothing has, the surest guesses, evenly (KLASS).

    A guess has settled when the distribution at its position has moved by less than `drift` nats (KL from the step
    before) in each of the last `rounds` steps. With a probability above `least` it is then written.
    """

    least: float = 0.6
    drift: float = 0.01
    rounds: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least} must be a probability in (0, 1]; 0.6 is usual")
        if self.drift <= 0:
            raise ValueError(f"drift={self.drift} must be above 0 nats; 0.01 is usual")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1; 2 is usual")

    @property
    def remembers(self) -> int:
        return self.rounds

    def __call__(self, now: Moment) -> Move:
        settled = now.asked & (now.guess.score > math.log(self.least))
        chain = (now, *now.earlier)
        for after, before in pairwise(chain):
            settled = settled & (moved(after, before) < self.drift)
        if len(chain) <= self.rounds:
            settled = torch.zeros_like(settled)
        usual = best(now.guess.score, now.asked, Evenly()(now))
        write = torch.where(settled.any(1, keepdim=True), settled, usual)
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Revoke:
    """Write boldly, read again what was written, and take back what no longer convinces (WINO).

    Guesses with a probability above `least` are written, up to `share` of what is open. A token written earlier in the
    window is taken back if, from all the rest of the text, it has a probability below `keep`: the least likely first,
    and always fewer than the last step wrote, so that the end is reached. Needs a model that sees both ways.
    """

    rereads: ClassVar[bool] = True
    blind: ClassVar[bool] = True
    remembers: ClassVar[int] = 1
    least: float = 0.6
    keep: float = 0.9
    share: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("least", self.least), ("keep", self.keep), ("share", self.share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be in (0, 1]; {getattr(Revoke, name)} is usual")

    def __call__(self, now: Moment) -> Move:
        open = now.asked & now.canvas.open
        most = (self.share * open.sum(1)).long().clamp_min(5)
        bold = (open & (now.guess.score > math.log(self.least))).sum(1)
        write = best(now.guess.score, open, torch.minimum(bold, most).clamp_min(1))
        written = now.asked & ~now.canvas.open
        before = now.earlier[0].canvas if now.earlier else now.canvas
        fresh = (before.open & written).sum(1)  # written by the last step
        chance = now.spread(now.logits.log_prob(now.canvas.tokens[now.asked]))
        doubted = written & (chance < math.log(self.keep))
        return Move(write, erase=best(-chance, doubted, (fresh - 1).clamp_min(0)))


def _survival(schedule: NoiseSchedule, now: Moment) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The shares of text before and after this step."""
    steps = now.steps.clamp_min(1)
    return schedule.alpha(1 - now.step / steps), schedule.alpha(1 - (now.step + 1) / steps)


Policy = Unmask | Ancestral | Reparam | Remask | Stable | Revoke
