"""Which position to write first.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.diffusion.step import StepState


@dataclass(frozen=True)
class Confidence:
    """The surest guess first (MaskGIT, LLaDA)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.guess.score


@dataclass(frozen=True)
class Margin:
    """The guess furthest ahead of its runner-up first (Dream's topk_margin)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        best, second = state.logits.map(lambda part: part.softmax(-1).topk(2).values).unbind(-1)
        return state.scatter(best - second)


@dataclass(frozen=True)
class Entropy:
    """The position with the least entropy first (Dream's entropy)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.scatter(state.logits.map(lambda part: -torch.special.entr(part.softmax(-1)).sum(-1)))


@dataclass(frozen=True)
class Leftmost:
    """From left to right."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return -state.positions.long().cumsum(1).float()


@dataclass(frozen=True)
class Random:
    """In random order. One token a step, drawn at temperature 1, is the first-hitting sampler (BD3-LM)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.rng.uniform(state.positions)


Ranking = Confidence | Margin | Entropy | Leftmost | Random  # (state) -> Float[b n]: higher goes first


def select_top(rank: Float[Tensor, "b n"], among: Bool[Tensor, "b n"], count: Int[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """The `count` highest-ranked of each row's candidates; the leftmost of equals."""
    order = rank.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < count[:, None]) & among
