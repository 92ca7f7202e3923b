"""Picks draw from the distribution they say they draw from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.diffusion.picking import Draw, Greedy
from diffusify.diffusion.rng import RowGenerators

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf])


def shares(pick: Draw, draws: int = 40_000) -> torch.Tensor:
    tokens, _ = pick(LOGITS.expand(draws, 5), torch.ones(1, draws, dtype=torch.bool), RowGenerators.seeded([0]))
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    observed = shares(Draw(temperature))
    chi2 = 40_000 * ((observed[:4] - expected[:4]).square() / expected[:4]).sum()
    assert float(chi2) < 16.3  # 3 degrees of freedom, p = 0.001
    assert observed[4] == 0


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert (shares(Draw(top_k=2))[2:] == 0).all() and (shares(Draw(top_k=2))[:2] > 0.2).all()
    two = float(LOGITS.softmax(-1)[:2].sum())
    assert (shares(Draw(top_p=two - 0.01))[2:] == 0).all()
    assert shares(Draw(top_p=two + 0.01))[2] > 0
    assert shares(Draw(top_p=1e-6))[0] == 1


def test_scores_are_log_probabilities_before_temperature() -> None:
    tokens, score = Draw(0.3)(LOGITS.expand(50, 5), torch.ones(1, 50, dtype=torch.bool), RowGenerators.seeded([0]))
    torch.testing.assert_close(score, LOGITS.log_softmax(-1)[tokens])
    best, sure = Greedy()(LOGITS[None], torch.ones(1, 1, dtype=torch.bool), RowGenerators.seeded([0]))
    assert best.item() == 0 and sure.item() == pytest.approx(float(LOGITS.log_softmax(-1)[0]))


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_settings_out_of_bounds_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Draw(**bad)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=4), st.integers(0, 99))
def test_a_row_s_luck_is_its_own(counts: list[int], seed: int) -> None:
    """What a row draws does not depend on who stands beside it, on padding, or on how much others draw."""
    where = torch.arange(5) < torch.tensor(counts)[:, None]
    seeds = [seed + row for row in range(len(counts))]
    together, again = RowGenerators.seeded(seeds), [RowGenerators.seeded([one]) for one in seeds]
    for _ in range(2):
        uniform, race = together.uniform(where), together.exponential(where, 3)
        for row, alone in enumerate(again):
            own = where[row : row + 1, : counts[row] + 1]
            assert torch.equal(alone.uniform(own)[0, : counts[row]], uniform[row, : counts[row]])
            start = sum(counts[:row])
            assert torch.equal(alone.exponential(own, 3), race[start : start + counts[row]])
