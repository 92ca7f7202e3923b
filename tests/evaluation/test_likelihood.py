"""Likelihoods against `transformers`, enumeration, and themselves."""

import math
from itertools import combinations

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal
from diffusify.evaluation.likelihood import LeftToRight, Likelihood, MonteCarlo, OneByOne, Question, bits_per_byte
from diffusify.models.denoiser import Denoiser
from tests.families import MASK, tiny_denoiser
from tests.text import makers

QUESTIONS = [
    Question((1, 5, 9, 7), ((4, 6), (8, 2, 3, 10, 11), (12,))),
    Question((1,), ((3, 3, 4),)),
    Question((1, 2, 3, 4, 5, 6, 7, 8, 9), ((10, 11, 12, 13), (10, 11, 12, 2)), worth=(0.25, 0.25)),
]


def close(one: Likelihood, other: Likelihood) -> None:
    assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert (one.draws, one.greedy) == (other.draws, other.greedy)


@pytest.mark.parametrize("attention", [Causal(), BlockCausal(4)])
@torch.no_grad()
def test_left_to_right_is_what_transformers_says(attention: Causal | BlockCausal) -> None:
    denoiser = tiny_denoiser("llama", attention, 1)
    for question, told in zip(QUESTIONS, LeftToRight()(denoiser, QUESTIONS), strict=True):
        for choice, log_prob, greedy in zip(question.choices, told.log_prob, told.greedy or (), strict=True):
            tokens = torch.tensor([[*question.context, *choice]])
            logits = denoiser.network(input_ids=tokens).logits[0]
            logits[:, MASK] = -torch.inf
            there = logits.log_softmax(-1)[len(question.context) - 1 : -1]
            assert log_prob == pytest.approx(float(there.gather(1, torch.tensor(choice)[:, None]).sum()), abs=1e-4)
            assert greedy == (there.argmax(-1).tolist() == list(choice))
        assert told.se == (0.0,) * len(question.choices)


def test_a_greedy_continuation_is_told_to_be_one() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    tokens = [1, 5]
    for _ in range(3):
        logits = denoiser(Canvas.clean(torch.tensor([[*tokens, 0]]))).logits[0, -1]
        tokens.append(int(logits.argmax()))
    (told,) = LeftToRight()(denoiser, [Question((1, 5), (tuple(tokens[2:]), (2, 2, 2)))])
    assert told.greedy == (True, False)


def test_one_by_one_is_left_to_right_where_sight_is_causal() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    for one, other in zip(OneByOne()(denoiser, QUESTIONS), LeftToRight()(denoiser, QUESTIONS), strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def bound(denoiser: Denoiser, question: Question, choice: tuple[int, ...]) -> float:
    """By enumeration of all sets of masked tokens, block by block."""
    text = torch.tensor([[*question.context, *choice]])
    first, size = len(question.context), denoiser.diffusion_config.block_size or text.shape[1]
    places = range(first, text.shape[1])
    total = 0.0
    for block in sorted({i // size for i in places}) if denoiser.diffusion_config.block_size else [0]:
        unit = [i for i in places if not denoiser.diffusion_config.block_size or i // size == block]
        for count in range(1, len(unit) + 1):
            for chosen in combinations(unit, count):
                open = torch.zeros_like(text, dtype=torch.bool)
                open[0, list(chosen)] = True
                canvas = Canvas(torch.where(open, MASK, text), open, open, torch.ones_like(text))
                logits = denoiser(canvas, text if denoiser.diffusion_config.block_size else None, positions=open).logits
                log_prob = logits.log_softmax(-1).gather(1, text[open][:, None]).sum()
                total += float(log_prob) / count / math.comb(len(unit), count)
    return total


@pytest.mark.parametrize(
    "denoiser",
    [tiny_denoiser("llama", Bidirectional(), 1), tiny_denoiser("llama", BlockCausal(4), 1), tiny_denoiser("bert")],
    ids=["ar", "block", "mlm"],
)
@torch.no_grad()
def test_the_bound_is_that_of_enumeration_and_its_error_is_honest(denoiser: Denoiser) -> None:
    """Over 200 seeds: the mean is the truth, and its standard errors hold it as often as Student says."""
    question = Question((1, 5, 9), ((4, 6, 8, 2, 11, 3), (4, 6, 8, 2)))
    truth = [bound(denoiser, question, choice) for choice in question.choices]
    told = [next(MonteCarlo(draws=4, least=4, most=4, seed=seed)(denoiser, [question])) for seed in range(200)]
    for i, exact in enumerate(truth):
        values = torch.tensor([one.log_prob[i] for one in told])
        errors = torch.tensor([one.se[i] for one in told])
        assert abs(float(values.mean()) - exact) < 3.5 * float(values.std()) / 200**0.5 + 1e-5
        held = ((values - exact).abs() <= 3.18 * errors + 1e-6).float().mean()  # Student's 95% of 3 degrees of freedom
        assert held > 0.9
        assert 0.75 < float(errors.mean() / values.std()) < 1.5


def test_common_luck_makes_differences_surer() -> None:
    """Choices that differ in one token are told apart with much less error than each is known."""
    denoiser = tiny_denoiser("bert")
    question = Question((1, 5, 9), ((4, 6, 8, 2, 11, 3, 7, 9), (4, 6, 8, 2, 11, 3, 7, 10)))
    told = [next(MonteCarlo(draws=2, least=2, most=2, seed=seed)(denoiser, [question])) for seed in range(100)]
    one, other = (torch.tensor([t.log_prob[i] for t in told]) for i in (0, 1))
    assert float((one - other).std()) < 0.6 * float((one.var() + other.var()).sqrt())


@pytest.mark.parametrize("measure", [LeftToRight(), OneByOne(), MonteCarlo()])
def test_an_answer_does_not_depend_on_the_others(measure: LeftToRight | OneByOne | MonteCarlo) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    together = list(measure(denoiser, QUESTIONS))
    for question, told in zip(QUESTIONS, together, strict=True):
        close(told, next(measure(denoiser, [question])))
    for told, backwards in zip(together, reversed(list(measure(denoiser, QUESTIONS[::-1]))), strict=True):
        close(told, backwards)


def test_rounds_end_when_the_choice_is_decided() -> None:
    denoiser = tiny_denoiser("bert")
    choices = ((4, 6, 8), (4, 6, 9))
    (told,) = MonteCarlo(draws=2, least=2, most=50, decided=0.0)(denoiser, [Question((1, 5), choices)])
    assert told.draws == 4
    (told,) = MonteCarlo(draws=2, least=2, most=5, decided=1e9)(denoiser, [Question((1, 5), choices)])
    assert told.draws == 10
    (told,) = MonteCarlo(draws=8, least=2, most=50)(denoiser, [Question((1, 5), ((4,), (9,)))])
    assert told.draws == 2 and told.se == (0.0, 0.0)  # one token has one noise level


def test_a_long_context_is_cut_at_its_beginning() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    room = denoiser.context
    assert room is not None
    long = Question((1, *[4 + i % 9 for i in range(room)]), ((5, 6, 7),))
    short = Question((1, *long.context[-(room - 4) :]), long.choices)
    close(*LeftToRight()(denoiser, [long, short]))
    with pytest.raises(ValueError, match="does not fit"):
        next(LeftToRight()(denoiser, [Question((1,), ((5,) * room,))]))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="does not read from"):
        next(LeftToRight()(tiny_denoiser("bert"), QUESTIONS))
    with pytest.raises(ValueError, match="has a context"):
        Question((), ((1,),))
    with pytest.raises(ValueError, match="has a context"):
        Question((1,), ((),))
    with pytest.raises(ValueError, match="2 worths for 1 choices"):
        Question((1,), ((2,),), worth=(1.0, 2.0))
    with pytest.raises(ValueError, match="at least 2"):
        MonteCarlo(least=1)


def test_the_best_choice_is_the_likeliest_by_its_worth() -> None:
    question = Question((1,), ((2, 2), (3,), (4,)))
    assert question.best([-3.0, -2.0, -2.0]) == 1
    assert Question((1,), ((2, 2), (3,)), worth=(0.5, 1.0)).best([-3.0, -2.0]) == 0


def test_bits_per_byte_are_the_text_s_own() -> None:
    """Windows that stand alone: their log-probabilities over the bytes they hold, however the text is cut."""
    denoiser, tokenizer = tiny_denoiser("llama", Causal(), 1, vocab_size=320), makers.byte_level()
    text = "The cat sat on the mat: über so! " * 8
    mean, se = bits_per_byte(denoiser, [text, "It is."], tokenizer, LeftToRight(), length=16)
    ids, total = tokenizer.encode(text), 0.0
    for window in [*(ids[i : i + 16] for i in range(0, len(ids), 16)), tokenizer.encode("It is.")]:
        (told,) = LeftToRight()(denoiser, [Question((tokenizer.start_token_id,), (tuple(window),))])
        total -= told.log_prob[0]
    assert mean == pytest.approx(total / math.log(2) / (len(text.encode()) + 6), rel=0.02)
    assert 0 < se < mean
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(denoiser, [], tokenizer, LeftToRight())
