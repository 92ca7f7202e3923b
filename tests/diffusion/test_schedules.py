"""Noise schedules fall from 1 to 0, and agree with their own derivative and inverse."""

import pytest
import torch

from diffusify.diffusion.objectives import Elbo
from diffusify.diffusion.schedules import Cosine, Linear, NoiseSchedule, Polynomial

SCHEDULES = [Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_ends_slope_and_inverse(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.02, 0.98, 33, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.slope(t), slope)
    torch.testing.assert_close(schedule.inverse(alpha), t)
    torch.testing.assert_close(schedule.rate(t), -slope / (1 - alpha))
    assert (slope < 0).all()
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_elbo_weight_is_one_over_t_for_the_linear_schedule() -> None:
    t = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(Elbo()(t, Linear()), 1 / t)
    torch.testing.assert_close(Elbo()(t, Polynomial(3.0)), 3 / t)


def test_power_zero_raises() -> None:
    with pytest.raises(ValueError, match="power=0"):
        Polynomial(0.0)
