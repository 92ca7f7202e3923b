"""What to write, and what to take back.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.schedules import Linear, NoiseSchedule


@dataclass(frozen=True)
class Moment:
    """Everything a policy may look at. Steps count within the window, row by row."""

    canvas: Canvas
    guess: Guess
    score: Float[Tensor, "b n"]  # how sure each written token was when it was written
    asked: Bool[Tensor, "b n"]  # where work is going on: open positions, or all editable ones where a policy revises
    logits: Float[Tensor, "k v"]  # at the asked positions
    size: Int[Tensor, " b"]  # how many positions there are to write, those already written included
    step: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    generator: Generator | None = None

    def spread(self, values: Float[Tensor, " k"]) -> Float[Tensor, "b n"]:
        """Values of the asked positions, back in their places; -inf elsewhere."""
        out = values.new_full(self.asked.shape, -torch.inf)
        return out.masked_scatter(self.asked, values)

    def rand(self) -> Float[Tensor, "b n"]:
        return torch.rand(self.asked.shape, generator=self.generator, device=self.asked.device)


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
        return now.rand()


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


Quota = Evenly | Threshold | Accelerating  # (now) -> Int[b]: how many to write


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

    def __call__(self, now: Moment) -> Move:
        before, after = (self.schedule.alpha(1 - step / now.steps) for step in (now.step, now.step + 1))
        chance = (after - before) / (1 - before)
        write = now.asked & ((now.rand() < chance[:, None]) | (now.step + 1 >= now.steps)[:, None])
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Reparam:
    """Judge every position anew at every step and keep the surest (RDM, Diffusion-LLM).

    A `curve` says how many positions stay noise; a written token that falls among the least sure is taken back. When
    `conditional`, only if the network still gives that token, and is less sure of it than when it was written.
    `noise` adds so much Gumbel noise to the scores at first, and less along the curve (stochastic routing).
    """

    revises: ClassVar[bool] = True
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
            gumbel = -torch.log(-torch.log(now.rand()))
            rank = rank + self.noise * share[:, None] * gumbel
        low = best(-rank, now.asked, (now.size * share + 1e-9).floor().long())
        falls = low & ~open
        if self.conditional:
            falls = falls & (now.guess.tokens == now.canvas.tokens) & (now.guess.score < now.score)
        return Move(write=now.asked & open & ~low, erase=falls)


Policy = Unmask | Ancestral | Reparam
