"""Rankings: which open position to write first.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.diffusion.step import StepState


@dataclass(frozen=True)
class Confidence:
    """The guess with the highest log-probability first (MaskGIT, LLaDA)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.guess.score


@dataclass(frozen=True)
class Margin:
    """The position with the largest gap between its two highest probabilities first (Dream's topk_margin)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        best, second = state.logits.map(lambda chunk: chunk.softmax(-1).topk(2).values).unbind(-1)
        return state.scatter(best - second)


@dataclass(frozen=True)
class Entropy:
    """The position with the lowest entropy first (Dream's entropy)."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.scatter(state.logits.map(lambda chunk: -torch.special.entr(chunk.softmax(-1)).sum(-1)))


@dataclass(frozen=True)
class Leftmost:
    """The leftmost position first."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return -state.positions.long().cumsum(1).float()


@dataclass(frozen=True)
class Random:
    """A random order. With one token per step, sampled at temperature 1, it is BD3-LM's first-hitting sampler."""

    def __call__(self, state: StepState) -> Float[Tensor, "b n"]:
        return state.rng.uniform(state.positions)


Ranking = Confidence | Margin | Entropy | Leftmost | Random  # (state) -> Float[b n]: the highest is written first


def select_top(
    rank: Float[Tensor, "b n"], candidates: Bool[Tensor, "b n"], count: Int[Tensor, " b"]
) -> Bool[Tensor, "b n"]:
    """The `count` highest-ranked candidates of each row; ties go to the leftmost."""
    order = rank.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < count[:, None]) & candidates
