"""Policies write what their rule says, row by row."""

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


def moment(positions: torch.Tensor, logits: torch.Tensor, step: int = 0, steps: int = 4, seed: int = 0) -> StepState:
    """The asked positions of canvases that are otherwise written."""
    canvas = Canvas(
        torch.zeros_like(positions).long(), positions, torch.ones_like(positions), torch.ones_like(positions).long()
    )
    rng = RowGenerators((torch.Generator().manual_seed(seed),))
    at, of = torch.full((len(positions),), step), torch.full((len(positions),), steps)
    score = torch.zeros(positions.shape)
    return StepState(canvas, score, positions, LazyLogits.of(logits), positions, at, of, Greedy(), rng)


@given(
    st.integers(0, 999), st.integers(0, 3), st.sampled_from([Confidence(), Margin(), Entropy(), Leftmost(), Random()])
)
def test_unmask_writes_the_best_of_each_row_and_nothing_else(seed: int, step: int, rank: Ranking) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 8, generator=rng) < 0.6
    state = moment(positions, torch.randn(int(positions.sum()), 5, generator=rng), step, seed=seed)
    move = Unmask(rank)(state)
    left = positions.sum(1)
    assert torch.equal(move.write.sum(1), -(-left // (4 - step)))  # an even share, rounded up
    assert not (move.write & ~positions).any() and not move.erase.any()
    if rank != Random():
        values = rank(state)
        for row in range(3):
            if move.write[row].any() and (rest := positions[row] & ~move.write[row]).any():
                assert values[row][move.write[row]].min() >= values[row][rest].max()


def test_ranks_put_first_what_they_say() -> None:
    positions = torch.ones(1, 3, dtype=torch.bool)
    probabilities = torch.tensor([[0.50, 0.49, 0.01], [0.48, 0.26, 0.26], [0.45, 0.35, 0.20]])
    state = moment(positions, probabilities.log())
    assert int(Confidence()(state).argmax()) == 0
    assert int(Margin()(state).argmax()) == 1
    assert int(Entropy()(state).argmax()) == 0
    assert int(Leftmost()(state).argmax()) == 0


@given(st.floats(0.05, 1.0), st.integers(0, 999))
def test_a_threshold_writes_all_that_is_surer_and_at_least_one(least: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 8, generator=rng) < 0.6
    state = moment(positions, torch.randn(int(positions.sum()), 5, generator=rng) * 3, steps=100)
    sure = positions & (state.guess.score.exp() > least + 1e-6)
    write = Unmask(quota=Threshold(least))(state).write
    assert (write & sure).sum() == sure.sum()
    assert torch.equal(write.any(1), positions.any(1))
    alone = write.sum(1) == 1
    assert ((write & ~sure).sum(1)[~alone] == 0).all()


def test_steps_hold_a_threshold_to_their_pace() -> None:
    positions = torch.ones(1, 8, dtype=torch.bool)
    state = moment(positions, torch.zeros(8, 5), step=1, steps=3)
    assert Threshold(0.99)(state).item() == 4 == Evenly()(state).item()


@pytest.mark.parametrize("least", [0.0, 1.5, -1.0])
def test_a_threshold_out_of_bounds_is_refused(least: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Threshold(least)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_ancestral_writes_at_the_reverse_process_own_rate(schedule: Linear | Cosine) -> None:
    open = torch.ones(1, 20_000, dtype=torch.bool)
    for step in range(4):
        before = schedule.alpha(torch.tensor(1 - step / 4))
        after = schedule.alpha(torch.tensor(1 - (step + 1) / 4))
        write = Ancestral(schedule)(moment(open, torch.zeros(20_000, 2), step, seed=step)).write
        assert abs(float(write.float().mean()) - float((after - before) / (1 - before))) < 0.015
    assert write.all()  # the last step writes all


@given(st.integers(0, 999), st.sampled_from([0.2, 0.5, 1.0, 3.0]))
def test_the_factor_rule_takes_a_prefix_and_one_at_least(seed: int, factor: float) -> None:
    """Against the rule written out; the failed last rank is never taken along."""
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 6, generator=rng) < 0.7
    state = moment(positions, 4 * torch.randn(int(positions.sum()), 5, generator=rng))
    for row, count in enumerate(Factor(factor)(state).tolist()):
        sure = sorted(state.guess.score[row][positions[row]].exp().tolist(), reverse=True)
        wanted = 0
        while wanted < len(sure) and 1 - sure[wanted] <= factor / (wanted + 2):
            wanted += 1
        assert count == min(max(wanted, 1), len(sure))


@given(st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_the_entropy_budget_leaves_the_largest_out(seed: int, nats: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 6, generator=rng) < 0.7
    state = moment(positions, 3 * torch.randn(int(positions.sum()), 5, generator=rng))
    for row, count in enumerate(EntropyBudget(nats)(state).tolist()):
        entropies = sorted((-Entropy()(state))[row][positions[row]].tolist())
        fitting = [k for k in range(1, len(entropies) + 1) if sum(entropies[:k]) - max(entropies[:k]) <= nats + 1e-6]
        assert count == max(fitting, default=0)


def test_one_doubtful_token_is_written_alone() -> None:
    positions = torch.ones(1, 4, dtype=torch.bool)
    state = moment(positions, torch.zeros(4, 5))
    assert int(Factor(0.1)(state)) == 1 and int(EntropyBudget(0.0)(state)) == 1


def test_cosine_counts_start_slowly_and_end() -> None:
    """MaskGIT: after each of ten steps a share cos(pi/2 p) of sixty is left."""
    positions, written = torch.ones(1, 60, dtype=torch.bool), []
    for step in range(10):
        state = replace(
            moment(positions, torch.randn(int(positions.sum()), 5), step, 10), window=torch.ones_like(positions)
        )
        move = Unmask(quota=Accelerating())(state)
        written.append(int(move.write.sum()))
        positions = positions & ~move.write
    assert not positions.any()
    left = [60 - sum(written[: i + 1]) for i in range(10)]
    assert left == [int(60 * math.cos(math.pi / 2 * (i + 1) / 10) + 1e-9) for i in range(10)]


def test_what_is_likely_and_has_settled_is_written() -> None:
    positions = torch.ones(1, 4).bool()
    logits = torch.zeros(4, 5)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([9.0, 6.0, 4.0, 1.0])  # the last one is not likely
    wobbly = logits.clone()
    wobbly[1, 4] = 8.0  # and the second has just changed its mind
    state, same, other = (moment(positions, x, steps=4) for x in (logits, logits, wobbly))
    policy = Klass(threshold=0.6, kl_threshold=0.01, history_length=2)
    assert policy.history_length == 2
    assert policy(replace(state, history=(same, same))).write.tolist() == [[True, True, True, False]]
    for history in ((same, other), (other, same)):
        assert policy(replace(state, history=history)).write.tolist() == [[True, False, True, False]]
    for history in ((), (same,), (moment(positions & False, logits[:0]),) * 2):
        assert policy(replace(state, history=history)).write.tolist() == [[True, False, False, False]]  # one, as usual


def test_how_far_a_distribution_has_come_is_kl() -> None:
    before, state = (torch.rand(3, 6, generator=torch.Generator().manual_seed(i)).log() for i in range(2))
    one, two = torch.tensor([[True, True, True, False]]), torch.tensor([[False, True, True, True]])
    came = kl_divergence(moment(one, state), moment(two, before))
    p, q = state[1:].softmax(-1), before[:2].softmax(-1)
    kl = distributions.kl_divergence(Categorical(p), Categorical(q)).tolist()
    torch.testing.assert_close(came, torch.tensor([[torch.inf, *kl, torch.inf]]))


def test_the_least_convincing_are_taken_back_but_fewer_than_were_written() -> None:
    positions = torch.ones(1, 6).bool()
    logits = torch.zeros(6, 5)
    logits[:, 0] = torch.tensor([6.0, 0.5, -1.0, 0.0, 5.0, 5.0])  # 0 is what is written in the first four places
    state = moment(positions, logits)
    open = torch.tensor([[False, False, False, False, True, True]])
    state = replace(state, canvas=replace(state.canvas, open=open))

    def after(count: int) -> Move:
        """So many of the four were written at the last step."""
        then = open | (torch.arange(6) >= 4 - count)
        return Wino()(replace(state, history=(replace(state, canvas=replace(state.canvas, open=then)),)))

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
def test_checks_out_of_bounds_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="usual"):
        bad()
