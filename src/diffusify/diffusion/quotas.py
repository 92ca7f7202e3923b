"""Quotas: how many positions to write in a decoding step.

Axes: b texts, n positions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.diffusion.ranking import Entropy
from diffusify.diffusion.step import StepState, open_count


@dataclass(frozen=True)
class Evenly:
    """The open positions, spread evenly over the remaining steps; at least one."""

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        remaining = (state.steps - state.step).clamp_min(1)
        return (state.positions.sum(1) + remaining - 1) // remaining


@dataclass(frozen=True)
class Threshold:
    """All guesses with a probability above `threshold`, and at least as many as `Evenly` (Fast-dLLM).

    Raises ValueError if `threshold` is not in (0, 1].
    """

    former_fields: ClassVar[dict[str, str]] = {"least": "threshold"}
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must be in (0, 1]; 0.9 is usual, and 1.0 writes one token at a time"
            )

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        confident = (state.positions & (state.guess.score > math.log(self.threshold))).sum(1)
        return torch.maximum(confident, Evenly()(state))


@dataclass(frozen=True)
class Accelerating:
    """A cosine schedule: a share cos(pi/2 p) of the positions is open after a share p of the steps (MaskGIT)."""

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        return (state.positions.sum(1) - open_count("cosine", state)).clamp_min(1)


@dataclass(frozen=True)
class Factor:
    """The most confident guesses, while the n-th has 1 - p of at most factor / (n + 1); at least one.

    With factor 1 this is Fast-dLLM's condition under which n tokens decoded in parallel are those that greedy decoding
    one by one gives. Raises ValueError if `factor` is not above 0.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(
                f"factor={self.factor} must be above 0; 1.0 is usual, and a larger factor writes more tokens"
            )

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        uncertainty = (1 - state.guess.score.exp()).masked_fill(~state.positions, torch.inf).sort(dim=1).values
        rank = torch.arange(1, uncertainty.shape[1] + 1, device=uncertainty.device)
        return _leading(uncertainty * (rank + 1) <= self.factor, state)


@dataclass(frozen=True)
class EntropyBudget:
    """The positions of lowest entropy, while their entropies without the largest sum to at most `nats` (EB-Sampler).

    It bounds the mutual dependence of the tokens written together. Use it with the rank `Entropy`. Raises ValueError if
    `nats` is negative.
    """

    nats: float = 0.1

    def __post_init__(self) -> None:
        if self.nats < 0:
            raise ValueError(f"nats={self.nats} must be at least 0; 0.1 is usual")

    def __call__(self, state: StepState) -> Int[Tensor, " b"]:
        entropy = (-Entropy()(state)).masked_fill(~state.positions, torch.inf).sort(dim=1).values
        before = torch.where(entropy.isfinite(), entropy, 0).cumsum(1) - entropy
        return _leading(before <= self.nats, state)


def _leading(accepted: Bool[Tensor, "b n"], state: StepState) -> Int[Tensor, " b"]:
    """The number of accepted ranks before the first that is not: at least one, at most all positions with a guess."""
    return torch.minimum(accepted.long().cumprod(1).sum(1).clamp_min(1), state.positions.sum(1))


# (state) -> Int[b]: the number of positions to write
Quota = Evenly | Threshold | Accelerating | Factor | EntropyBudget
