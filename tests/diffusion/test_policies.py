"""Policies, quotas and rankings follow their definitions, row by row."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions
from torch.distributions import Categorical

from diffusify.canvas import Canvas, Move
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Greedy
from diffusify.diffusion.policies import Ancestral, Klass, Unmask, Wino
from diffusify.diffusion.quotas import Accelerating, EntropyBudget, Evenly, Factor, Threshold
from diffusify.diffusion.ranking import Confidence, Entropy, Leftmost, Margin, Random, Ranking
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.schedules import Cosine, Linear
from diffusify.diffusion.step import StepState, kl_divergence


def step_state(
    positions: torch.Tensor, logits: torch.Tensor, step: int = 0, steps: int = 4, seed: int = 0
) -> StepState:
    """The state of a step in which `positions` are open and have these logits."""
    canvas = Canvas(
        torch.zeros_like(positions).long(), positions, torch.ones_like(positions), torch.ones_like(positions).long()
    )
    rng = RowGenerators((torch.Generator().manual_seed(seed),))
    row_step, row_steps = torch.full((len(positions),), step), torch.full((len(positions),), steps)
    score = torch.zeros(positions.shape)
    return StepState(
        canvas, score, positions, LazyLogits.from_tensor(logits), positions, row_step, row_steps, Greedy(), rng
    )


@given(
    st.integers(0, 999), st.integers(0, 3), st.sampled_from([Confidence(), Margin(), Entropy(), Leftmost(), Random()])
)
def test_unmask_writes_the_best_ranked_of_each_row(seed: int, step: int, rank: Ranking) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 8, generator=rng) < 0.6
    state = step_state(positions, torch.randn(int(positions.sum()), 5, generator=rng), step, seed=seed)
    move = Unmask(rank)(state)
    count = positions.sum(1)
    assert torch.equal(move.write.sum(1), -(-count // (4 - step)))  # an even share, rounded up
    assert not (move.write & ~positions).any() and not move.erase.any()
    if rank != Random():
        values = rank(state)
        for row in range(3):
            if move.write[row].any() and (rest := positions[row] & ~move.write[row]).any():
                assert values[row][move.write[row]].min() >= values[row][rest].max()


def test_rankings_rank_first_what_they_document() -> None:
    positions = torch.ones(1, 3, dtype=torch.bool)
    probabilities = torch.tensor([[0.50, 0.49, 0.01], [0.48, 0.26, 0.26], [0.45, 0.35, 0.20]])
    state = step_state(positions, probabilities.log())
    assert int(Confidence()(state).argmax()) == 0
    assert int(Margin()(state).argmax()) == 1
    assert int(Entropy()(state).argmax()) == 0
    assert int(Leftmost()(state).argmax()) == 0


@given(st.floats(0.05, 1.0), st.integers(0, 999))
def test_threshold_writes_all_confident_guesses_and_at_least_one(threshold: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 8, generator=rng) < 0.6
    state = step_state(positions, torch.randn(int(positions.sum()), 5, generator=rng) * 3, steps=100)
    confident = positions & (state.guess.score.exp() > threshold + 1e-6)
    write = Unmask(quota=Threshold(threshold))(state).write
    assert (write & confident).sum() == confident.sum()
    assert torch.equal(write.any(1), positions.any(1))
    only_one = write.sum(1) == 1
    assert ((write & ~confident).sum(1)[~only_one] == 0).all()


def test_threshold_writes_at_least_an_even_share_of_the_steps() -> None:
    positions = torch.ones(1, 8, dtype=torch.bool)
    state = step_state(positions, torch.zeros(8, 5), step=1, steps=3)
    assert Threshold(0.99)(state).item() == 4 == Evenly()(state).item()


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_threshold_out_of_range_raises(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Threshold(threshold)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_ancestral_writes_at_the_rate_of_the_reverse_process(schedule: Linear | Cosine) -> None:
    open = torch.ones(1, 20_000, dtype=torch.bool)
    for step in range(4):
        before = schedule.alpha(torch.tensor(1 - step / 4))
        after = schedule.alpha(torch.tensor(1 - (step + 1) / 4))
        write = Ancestral(schedule)(step_state(open, torch.zeros(20_000, 2), step, seed=step)).write
        assert abs(float(write.float().mean()) - float((after - before) / (1 - before))) < 0.015
    assert write.all()  # the last step writes all


@given(st.integers(0, 999), st.sampled_from([0.2, 0.5, 1.0, 3.0]))
def test_factor_takes_the_longest_valid_prefix_and_at_least_one(seed: int, factor: float) -> None:
    """Against a loop over ranks; the first rank that fails the condition is not counted."""
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 6, generator=rng) < 0.7
    state = step_state(positions, 4 * torch.randn(int(positions.sum()), 5, generator=rng))
    for row, count in enumerate(Factor(factor)(state).tolist()):
        probs = sorted(state.guess.score[row][positions[row]].exp().tolist(), reverse=True)
        expected = 0
        while expected < len(probs) and 1 - probs[expected] <= factor / (expected + 2):
            expected += 1
        assert count == min(max(expected, 1), len(probs))


@given(st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_entropy_budget_does_not_count_the_largest_entropy(seed: int, nats: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 6, generator=rng) < 0.7
    state = step_state(positions, 3 * torch.randn(int(positions.sum()), 5, generator=rng))
    for row, count in enumerate(EntropyBudget(nats)(state).tolist()):
        entropies = sorted((-Entropy()(state))[row][positions[row]].tolist())
        fitting = [k for k in range(1, len(entropies) + 1) if sum(entropies[:k]) - max(entropies[:k]) <= nats + 1e-6]
        assert count == max(fitting, default=0)


def test_one_uncertain_token_is_written_if_none_is_certain() -> None:
    positions = torch.ones(1, 4, dtype=torch.bool)
    state = step_state(positions, torch.zeros(4, 5))
    assert int(Factor(0.1)(state)) == 1 and int(EntropyBudget(0.0)(state)) == 1


def test_accelerating_follows_the_cosine_schedule() -> None:
    """MaskGIT: after each of ten steps a share cos(pi/2 p) of sixty positions is open."""
    positions, written = torch.ones(1, 60, dtype=torch.bool), []
    for step in range(10):
        state = replace(
            step_state(positions, torch.randn(int(positions.sum()), 5), step, 10), window=torch.ones_like(positions)
        )
        move = Unmask(quota=Accelerating())(state)
        written.append(int(move.write.sum()))
        positions = positions & ~move.write
    assert not positions.any()
    still_open = [60 - sum(written[: i + 1]) for i in range(10)]
    assert still_open == [int(60 * math.cos(math.pi / 2 * (i + 1) / 10) + 1e-9) for i in range(10)]


def test_klass_writes_confident_guesses_with_a_stable_distribution() -> None:
    positions = torch.ones(1, 4).bool()
    logits = torch.zeros(4, 5)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([9.0, 6.0, 4.0, 1.0])  # the last one is not confident
    unstable = logits.clone()
    unstable[1, 4] = 8.0  # and the distribution at the second has just changed
    state, same, other = (step_state(positions, x, steps=4) for x in (logits, logits, unstable))
    policy = Klass(threshold=0.6, kl_threshold=0.01, history_length=2)
    assert policy.history_length == 2
    assert policy(replace(state, history=(same, same))).write.tolist() == [[True, True, True, False]]
    for history in ((same, other), (other, same)):
        assert policy(replace(state, history=history)).write.tolist() == [[True, False, True, False]]
    for history in ((), (same,), (step_state(positions & False, logits[:0]),) * 2):
        assert policy(replace(state, history=history)).write.tolist() == [
            [True, False, False, False]
        ]  # one, as Evenly does


def test_kl_divergence_between_steps() -> None:
    before, after = (torch.rand(3, 6, generator=torch.Generator().manual_seed(i)).log() for i in range(2))
    open_after, open_before = torch.tensor([[True, True, True, False]]), torch.tensor([[False, True, True, True]])
    observed = kl_divergence(step_state(open_after, after), step_state(open_before, before))
    p, q = after[1:].softmax(-1), before[:2].softmax(-1)
    kl = distributions.kl_divergence(Categorical(p), Categorical(q)).tolist()
    torch.testing.assert_close(observed, torch.tensor([[torch.inf, *kl, torch.inf]]))


def test_wino_remasks_the_least_likely_but_fewer_than_were_written() -> None:
    positions = torch.ones(1, 6).bool()
    logits = torch.zeros(6, 5)
    logits[:, 0] = torch.tensor([6.0, 0.5, -1.0, 0.0, 5.0, 5.0])  # token 0 is written at the first four positions
    state = step_state(positions, logits)
    open = torch.tensor([[False, False, False, False, True, True]])
    state = replace(state, canvas=replace(state.canvas, open=open))

    def after(count: int) -> Move:
        """The move if the last step wrote `count` of the four."""
        open_before = open | (torch.arange(6) >= 4 - count)
        return Wino()(replace(state, history=(replace(state, canvas=replace(state.canvas, open=open_before)),)))

    assert after(4).erase.tolist() == [[False, True, True, True, False, False]]
    assert after(3).erase.tolist() == [[False, False, True, True, False, False]]
    assert after(1).erase.sum() == 0 == Wino()(state).erase.sum()
    assert after(4).write.tolist() == [[False, False, False, False, True, True]]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Klass(threshold=0.0),
        lambda: Klass(kl_threshold=0.0),
        lambda: Klass(history_length=0),
        lambda: Wino(threshold_back=1.2),
    ],
)
def test_settings_out_of_range_raise(bad) -> None:
    with pytest.raises(ValueError, match="usual"):
        bad()
