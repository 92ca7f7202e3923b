"""Token selection samples from the stated distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.diffusion.picking import Draw, Greedy
from diffusify.diffusion.rng import RowGenerators

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf])


def frequencies(pick: Draw, samples: int = 2000) -> torch.Tensor:
    rng = RowGenerators.from_seeds([0])
    tokens, _ = pick(LOGITS.expand(samples, 5), torch.ones(1, samples, dtype=torch.bool), rng)
    return torch.bincount(tokens, minlength=5) / samples


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    observed = frequencies(Draw(temperature), samples=40_000)
    chi2 = 40_000 * ((observed[:4] - expected[:4]).square() / expected[:4]).sum()
    assert float(chi2) < 16.3  # 3 degrees of freedom, p = 0.001
    assert observed[4] == 0


def test_unlikely_tokens_are_sampled_as_often_as_they_should_be() -> None:
    """Of 40,000 tokens, half of them 100,000 times less likely than the others, and none of an impossible one."""
    logits = torch.zeros(40_000)
    logits[::2] = -math.log(100_000)
    logits[0] = -torch.inf
    positions = torch.ones(1, 500, dtype=torch.bool)
    rng = RowGenerators.from_seeds([0])
    drawn = torch.cat([Draw()(logits.expand(500, -1), positions, rng)[0] for _ in range(4)])
    assert (drawn % 2 == 1).float().mean() > 0.999
    hot = torch.cat([Draw(50.0)(logits.expand(500, -1), positions, rng)[0] for _ in range(4)])
    expected = math.exp(-math.log(100_000) / 50)
    assert float((hot % 2 == 0).float().mean()) == pytest.approx(expected / (1 + expected), abs=0.04)
    assert (drawn != 0).all() and (hot != 0).all()


def test_top_k_and_top_p_keep_the_most_likely_tokens() -> None:
    top_2 = frequencies(Draw(top_k=2))
    assert (top_2[2:] == 0).all() and (top_2[:2] > 0.2).all()
    two = float(LOGITS.softmax(-1)[:2].sum())
    assert (frequencies(Draw(top_p=two - 0.01))[2:] == 0).all()
    assert frequencies(Draw(top_p=two + 0.01))[2] > 0
    assert frequencies(Draw(top_p=1e-6))[0] == 1


def test_scores_are_log_probabilities_before_temperature() -> None:
    tokens, score = Draw(0.3)(LOGITS.expand(50, 5), torch.ones(1, 50, dtype=torch.bool), RowGenerators.from_seeds([0]))
    torch.testing.assert_close(score, LOGITS.log_softmax(-1)[tokens])
    best, log_prob = Greedy()(LOGITS[None], torch.ones(1, 1, dtype=torch.bool), RowGenerators.from_seeds([0]))
    assert best.item() == 0 and log_prob.item() == pytest.approx(float(LOGITS.log_softmax(-1)[0]))


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_settings_out_of_range_raise(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Draw(**bad)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=4), st.integers(0, 99))
def test_random_numbers_of_a_row_do_not_depend_on_other_rows(counts: list[int], seed: int) -> None:
    """Nor do they depend on padding or on how many numbers other rows need, nor on how many are drawn at once."""
    positions = torch.arange(5) < torch.tensor(counts)[:, None]
    seeds = [seed + row for row in range(len(counts))]
    batch, single_rows = RowGenerators.from_seeds(seeds), [RowGenerators.from_seeds([each]) for each in seeds]
    for _ in range(2):
        uniform = batch.uniform(positions)
        for row, single in enumerate(single_rows):
            own = positions[row : row + 1, : counts[row] + 1]
            one_by_one = [single.uniform(own & (torch.arange(own.shape[1]) == i))[0, i] for i in range(counts[row])]
            assert one_by_one == uniform[row, : counts[row]].tolist()
