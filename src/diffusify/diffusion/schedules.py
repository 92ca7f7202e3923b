"""Noise schedules: the probability alpha(t) that a token is still clean at time t."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t: at time t a share t of the text is noise (MDLM, DiffuLLaMA, LLaDA)."""

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - t

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return -torch.ones_like(t)

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 / t

    def inverse(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - alpha


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): most of the time is spent at high noise (MaskGIT)."""

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))

    def inverse(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - torch.acos(1 - alpha) * 2 / math.pi


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t^power: less noise than linear for a power above 1, more for one below 1 (MD4).

    Raises ValueError if `power` is not above 0.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"Polynomial(power={self.power}) must have a power above 0; 1.0 is Linear()")

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - t**self.power

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return -self.power * t ** (self.power - 1)

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.power / t

    def inverse(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return (1 - alpha) ** (1 / self.power)


# alpha(t) falls from 1 at t = 0 (clean text) to 0 at t = 1 (pure noise); slope(t) is its derivative,
# rate(t) = -slope / (1 - alpha) in closed form, and inverse(alpha) the time.
NoiseSchedule = Linear | Cosine | Polynomial
