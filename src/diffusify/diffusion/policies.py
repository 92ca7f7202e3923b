"""What to write, and what to take back.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.luck import Luck
from diffusify.diffusion.schedules import Linear, NoiseSchedule


@dataclass(frozen=True)
class Moment:
    """Everything a policy may look at. Steps count within the window, row by row."""

    canvas: Canvas
    guess: Guess
    score: Float[Tensor, "b n"]  # how sure each written token was when it was written
    asked: Bool[Tensor, "b n"]  # where there are guesses: the open positions of `here`, or all if a policy rereads
    logits: Float[Tensor, "k v"]  # at the asked positions
    here: Bool[Tensor, "b n"]  # the positions that are worked on together, those already written included
    step: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    luck: Luck

    @property
    def size(self) -> Int[Tensor, " b"]:
        return self.here.sum(1)

    def spread(self, values: Float[Tensor, " k"]) -> Float[Tensor, "b n"]:
        """Values of the asked positions, back in their places; -inf elsewhere."""
        out = values.new_full(self.asked.shape, -torch.inf)
        return out.masked_scatter(self.asked, values)


def open_share(curve: Literal["linear", "cosine"], now: Moment) -> Float[Tensor, " b"]:
    """The share of positions that a curve leaves open after this step: none after the last."""
    done = (now.step + 1).double() / now.steps
    return (1 - done if curve == "linear" else torch.cos(math.pi / 2 * done)).clamp_min(0)


@dataclass(frozen=True)
class Confidence:
    """The surest guess first (MaskGIT, LLaDA)."""

    def __call__(self, now: Moment) -> Float[Tensor, "b n"]:
        return now.guess.score


@dataclass(frozen=True)
class Margin:
    """The guess furthest ahead of its runner-up first (Dream's topk_margin)."""

    def __call__(self, now: Moment) -> Float[Tensor, "b n"]:
        best, second = now.logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return now.spread(best - second)


@dataclass(frozen=True)
class Entropy:
    """The position with the least entropy first (Dream's entropy)."""

    def __call__(self, now: Moment) -> Float[Tensor, "b n"]:
        return now.spread(-torch.special.entr(now.logits.softmax(-1)).sum(-1))


@dataclass(frozen=True)
class Leftmost:
    """From left to right."""

    def __call__(self, now: Moment) -> Float[Tensor, "b n"]:
        return -now.asked.long().cumsum(1).float()


@dataclass(frozen=True)
class Random:
    """In random order."""

    def __call__(self, now: Moment) -> Float[Tensor, "b n"]:
        return now.luck.uniform(now.asked)


Rank = Confidence | Margin | Entropy | Leftmost | Random  # (now) -> Float[b n]: higher goes first


@dataclass(frozen=True)
class Evenly:
    """What is open, shared out over the steps that are left; at least one."""

    def __call__(self, now: Moment) -> Int[Tensor, " b"]:
        left = (now.steps - now.step).clamp_min(1)
        return (now.asked.sum(1) + left - 1) // left


@dataclass(frozen=True)
class Threshold:
    """Every guess with a probability above `least`, and never fewer than evenly (Fast-dLLM)."""

    least: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"threshold={self.least} must be in (0, 1]; 0.9 is the usual choice, 1.0 is one at a time")

    def __call__(self, now: Moment) -> Int[Tensor, " b"]:
        sure = (now.asked & (now.guess.score > math.log(self.least))).sum(1)
        return torch.maximum(sure, Evenly()(now))


@dataclass(frozen=True)
class Accelerating:
    """Few at first, then more and more: a share cos(pi/2 p) stays open after a share p of the steps (MaskGIT)."""

    def __call__(self, now: Moment) -> Int[Tensor, " b"]:
        left = (now.size * open_share("cosine", now) + 1e-9).floor().long()
        return (now.asked.sum(1) - left).clamp_min(1)


@dataclass(frozen=True)
class Factor:
    """The surest guesses, as long as the n-th has a doubt (1 - p) of at most factor / (n + 1); one at least.

    Fast-dLLM's bound for writing n tokens at once as if one by one, loosened by the factor.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} must be above 0; 1.0 is the bound itself, more writes more at once")

    def __call__(self, now: Moment) -> Int[Tensor, " b"]:
        doubt = (1 - now.guess.score.exp()).masked_fill(~now.asked, torch.inf).sort(dim=1).values
        rank = torch.arange(1, doubt.shape[1] + 1, device=doubt.device)
        return _leading(doubt * (rank + 1) <= self.factor, now)


@dataclass(frozen=True)
class EntropyBudget:
    """The least uncertain positions, as long as their entropies, but for the largest, sum up to a budget at most.

    Bounds how far tokens written together may depend on each other (EB-Sampler). Goes with the rank `Entropy`.
    """

    nats: float = 0.1

    def __post_init__(self) -> None:
        if self.nats < 0:
            raise ValueError(f"entropy budget {self.nats} must be at least 0; 0.1 nats is usual")

    def __call__(self, now: Moment) -> Int[Tensor, " b"]:
        entropy = (-Entropy()(now)).masked_fill(~now.asked, torch.inf).sort(dim=1).values
        before = torch.where(entropy.isfinite(), entropy, 0).cumsum(1) - entropy
        return _leading(before <= self.nats, now)


def _leading(fine: Bool[Tensor, "b n"], now: Moment) -> Int[Tensor, " b"]:
    """How many come before the first that is not fine: at least one, at most the asked."""
    return torch.minimum(fine.long().cumprod(1).sum(1).clamp_min(1), now.asked.sum(1))


Quota = Evenly | Threshold | Accelerating | Factor | EntropyBudget  # (now) -> Int[b]: how many to write


def best(rank: Float[Tensor, "b n"], among: Bool[Tensor, "b n"], count: Int[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """The `count` highest-ranked of each row's candidates; the leftmost of equals."""
    order = rank.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < count[:, None]) & among


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


def _survival(schedule: NoiseSchedule, now: Moment) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The shares of text before and after this step."""
    steps = now.steps.clamp_min(1)
    return schedule.alpha(1 - now.step / steps), schedule.alpha(1 - (now.step + 1) / steps)


Policy = Unmask | Ancestral | Reparam | Remask
