"""How many positions to write at a step.

Axes: b texts, n positions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.diffusion.ranking import Entropy
from diffusify.diffusion.step import StepState, open_fraction


@dataclass(frozen=True)
class Evenly:
    """What is open, shared out over the steps that are left; at least one."""

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        left = (state.steps - state.step).clamp_min(1)
        return (state.positions.sum(1) + left - 1) // left


@dataclass(frozen=True)
class Threshold:
    """Every guess with a probability above `threshold`, and never fewer than evenly (Fast-dLLM)."""

    former_fields: ClassVar[dict[str, str]] = {"least": "threshold"}
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must be in (0, 1]; 0.9 is the usual choice, 1.0 is one at a time"
            )

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        sure = (state.positions & (state.guess.score > math.log(self.threshold))).sum(1)
        return torch.maximum(sure, Evenly()(state))


@dataclass(frozen=True)
class Accelerating:
    """Few at first, then more and more: a share cos(pi/2 p) stays open after a share p of the steps (MaskGIT)."""

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        left = (state.window_size * open_fraction("cosine", state) + 1e-9).floor().long()
        return (state.positions.sum(1) - left).clamp_min(1)


@dataclass(frozen=True)
class Factor:
    """The surest guesses, as long as the n-th has a doubt (1 - p) of at most factor / (n + 1); one at least.

    Fast-dLLM's bound for writing n tokens at once as if one by one, loosened by the factor.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} must be above 0; 1.0 is the bound itself, more writes more at once")

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        doubt = (1 - state.guess.score.exp()).masked_fill(~state.positions, torch.inf).sort(dim=1).values
        rank = torch.arange(1, doubt.shape[1] + 1, device=doubt.device)
        return _leading(doubt * (rank + 1) <= self.factor, state)


@dataclass(frozen=True)
class EntropyBudget:
    """The least uncertain positions, as long as their entropies, but for the largest, sum up to a budget at most.

    Bounds how far tokens written together may depend on each other (EB-Sampler). Goes with the rank `Entropy`.
    """

    nats: float = 0.1

    def __post_init__(self) -> None:
        if self.nats < 0:
            raise ValueError(f"entropy budget {self.nats} must be at least 0; 0.1 nats is usual")

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        entropy = (-Entropy()(state)).masked_fill(~state.positions, torch.inf).sort(dim=1).values
        before = torch.where(entropy.isfinite(), entropy, 0).cumsum(1) - entropy
        return _leading(before <= self.nats, state)


def _leading(fine: Bool[Tensor, "b n"], state: StepState) -> Int[Tensor, " b"]:
    """How many come before the first that is not fine: at least one, at most the asked."""
    return torch.minimum(fine.long().cumprod(1).sum(1).clamp_min(1), state.positions.sum(1))


Quota = Evenly | Threshold | Accelerating | Factor | EntropyBudget  # (state) -> Int[b]: how many to write
