"""Likelihoods compared with `transformers`, with enumeration, and with each other."""

import math
from dataclasses import fields
from itertools import combinations

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal
from diffusify.evaluation import likelihood
from diffusify.evaluation.bits_per_byte import bits_per_byte
from diffusify.evaluation.likelihood import Autoregressive, MonteCarlo, TokenByToken
from diffusify.evaluation.likelihood_requests import Likelihood, LikelihoodRequest
from diffusify.models.denoiser import Denoiser
from diffusify.text.tokenizer import TextTokenizer
from tests.families import CAUSAL, MASK, tiny_denoiser
from tests.text import makers

REQUESTS = [
    LikelihoodRequest((1, 5, 9, 7), ((4, 6), (8, 2, 3, 10, 11), (12,))),
    LikelihoodRequest((1,), ((3, 3, 4),)),
    LikelihoodRequest((1, 2, 3, 4, 5, 6, 7, 8, 9), ((10, 11, 12, 13), (10, 11, 12, 2)), scales=(0.25, 0.25)),
]


def close(one: Likelihood, other: Likelihood) -> None:
    assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert (one.draws, one.greedy) == (other.draws, other.greedy)


@pytest.mark.parametrize("attention", [Causal(), BlockCausal(4)])
@pytest.mark.parametrize("family", sorted(CAUSAL))
@torch.no_grad()
def test_ar_log_probabilities_are_those_of_transformers(family: str, attention: Causal | BlockCausal) -> None:
    """The choices of a request share a row, so they must not see each other."""
    windows = {"sliding_window": 3} if family in ("mistral", "gemma3_text") else {}
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, attention, 1, kernel=kernel, **windows)
    for request, result in zip(REQUESTS, Autoregressive()(denoiser, REQUESTS), strict=True):
        for choice, log_prob, greedy in zip(request.choices, result.log_prob, result.greedy or (), strict=True):
            tokens = torch.tensor([[*request.context, *choice]])
            logits = denoiser.network(input_ids=tokens).logits[0]
            logits[:, MASK] = -torch.inf
            log_probs = logits.log_softmax(-1)[len(request.context) - 1 : -1]
            assert log_prob == pytest.approx(float(log_probs.gather(1, torch.tensor(choice)[:, None]).sum()), abs=1e-4)
            assert greedy == (log_probs.argmax(-1).tolist() == list(choice))
        assert result.se == (0.0,) * len(request.choices)


def test_a_greedy_continuation_is_recognised() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    tokens = [1, 5]
    for _ in range(3):
        logits = denoiser(Canvas.clean(torch.tensor([[*tokens, 0]]))).logits[0, -1]
        tokens.append(int(logits.argmax()))
    (result,) = Autoregressive()(denoiser, [LikelihoodRequest((1, 5), (tuple(tokens[2:]), (2, 2, 2)))])
    assert result.greedy == (True, False)


def test_token_by_token_equals_autoregressive_under_causal_attention() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    for one, other in zip(TokenByToken()(denoiser, REQUESTS), Autoregressive()(denoiser, REQUESTS), strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def enumerated_bound(denoiser: Denoiser, request: LikelihoodRequest, choice: tuple[int, ...]) -> float:
    """The bound by enumeration of all sets of masked tokens, block by block."""
    text = torch.tensor([[*request.context, *choice]])
    first, size = len(request.context), denoiser.diffusion_config.block_size or text.shape[1]
    positions = range(first, text.shape[1])
    total = 0.0
    for block in sorted({i // size for i in positions}) if denoiser.diffusion_config.block_size else [0]:
        unit = [i for i in positions if not denoiser.diffusion_config.block_size or i // size == block]
        for count in range(1, len(unit) + 1):
            for chosen in combinations(unit, count):
                open = torch.zeros_like(text, dtype=torch.bool)
                open[0, list(chosen)] = True
                canvas = Canvas(torch.where(open, MASK, text), open, open, torch.ones_like(text))
                logits = denoiser(canvas, text if denoiser.diffusion_config.block_size else None, positions=open).logits
                log_prob = logits.log_softmax(-1).gather(1, text[open][:, None]).sum()
                total += float(log_prob) / count / math.comb(len(unit), count)
    return total


@pytest.fixture
def memoized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the network once for each masked text, since a few short ones are sampled very often."""
    rows: dict[str, torch.Tensor] = {}
    compute = likelihood._masked_nll

    def masked_nll(denoiser: Denoiser, canvas: Canvas, clean: torch.Tensor) -> torch.Tensor:
        keys = [str((*row[0].tolist(), *row[1].tolist())) for row in zip(canvas.tokens, clean, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in rows]
        if new:
            masked = Canvas(*(getattr(canvas, field.name)[new] for field in fields(Canvas)))
            rows.update(zip([keys[i] for i in new], compute(denoiser, masked, clean[new]), strict=True))
        return torch.stack([rows[key] for key in keys])

    monkeypatch.setattr(likelihood, "_masked_nll", masked_nll)


@pytest.mark.usefixtures("memoized")
@pytest.mark.parametrize(
    "denoiser",
    [
        pytest.param(tiny_denoiser("llama", Bidirectional(), 1), id="ar", marks=pytest.mark.slow),
        pytest.param(tiny_denoiser("llama", BlockCausal(4), 1), id="block"),
        pytest.param(tiny_denoiser("bert"), id="mlm", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_bound_is_unbiased_and_its_standard_error_is_correct(denoiser: Denoiser) -> None:
    """Over 200 seeds, the mean is the enumerated bound, and Student's confidence intervals cover it."""
    request = LikelihoodRequest((1, 5, 9), ((4, 6, 8, 2, 11, 3), (4, 6, 8, 2)))
    bounds = [enumerated_bound(denoiser, request, choice) for choice in request.choices]
    results = [
        next(MonteCarlo(draws=4, min_rounds=4, max_rounds=4, seed=seed)(denoiser, [request])) for seed in range(200)
    ]
    for i, exact in enumerate(bounds):
        values = torch.tensor([result.log_prob[i] for result in results])
        errors = torch.tensor([result.se[i] for result in results])
        assert abs(float(values.mean()) - exact) < 3.5 * float(values.std()) / 200**0.5 + 1e-5
        covered = ((values - exact).abs() <= 3.18 * errors + 1e-6).float().mean()  # 95%, 3 degrees of freedom
        assert covered > 0.9
        assert 0.75 < float(errors.mean() / values.std()) < 1.5


@pytest.mark.usefixtures("memoized")
def test_common_random_numbers_lower_the_error_of_differences() -> None:
    """The difference of choices that differ in one token has a much lower error than each of them."""
    denoiser = tiny_denoiser("bert")
    request = LikelihoodRequest((1, 5, 9), ((4, 6, 8, 2, 11, 3, 7, 9), (4, 6, 8, 2, 11, 3, 7, 10)))
    results = [
        next(MonteCarlo(draws=2, min_rounds=2, max_rounds=2, seed=seed)(denoiser, [request])) for seed in range(100)
    ]
    one, other = (torch.tensor([result.log_prob[i] for result in results]) for i in (0, 1))
    assert float((one - other).std()) < 0.6 * float((one.var() + other.var()).sqrt())


@pytest.mark.parametrize("measure", [Autoregressive(), TokenByToken(), MonteCarlo()])
def test_a_result_does_not_depend_on_other_requests(measure: Autoregressive | TokenByToken | MonteCarlo) -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4), 1)
    together = list(measure(denoiser, REQUESTS))
    for request, result in zip(REQUESTS, together, strict=True):
        close(result, next(measure(denoiser, [request])))
    for result, reverse in zip(together, reversed(list(measure(denoiser, REQUESTS[::-1]))), strict=True):
        close(result, reverse)


def test_rounds_end_when_the_best_choice_is_certain() -> None:
    denoiser = tiny_denoiser("bert")
    request = LikelihoodRequest((1, 5), ((4, 6, 8), (4, 6, 9)))
    (result,) = MonteCarlo(draws=2, min_rounds=2, max_rounds=50, margin=0.0)(denoiser, [request])
    assert result.draws == 4
    (result,) = MonteCarlo(draws=2, min_rounds=2, max_rounds=5, margin=1e9)(denoiser, [request])
    assert result.draws == 10
    (result,) = MonteCarlo(draws=8, min_rounds=2, max_rounds=50)(denoiser, [LikelihoodRequest((1, 5), ((4,), (9,)))])
    assert result.draws == 2 and result.se == (0.0, 0.0)  # one token has one noise level


def test_a_long_context_loses_its_beginning() -> None:
    denoiser = tiny_denoiser("llama", Causal(), 1)
    length = denoiser.context_length
    assert length is not None
    long = LikelihoodRequest((1, *[4 + i % 9 for i in range(length)]), ((5, 6, 7),))
    short = LikelihoodRequest((1, *long.context[-(length - 4) :]), long.choices)
    close(*Autoregressive()(denoiser, [long, short]))
    with pytest.raises(ValueError, match="does not fit"):
        next(Autoregressive()(denoiser, [LikelihoodRequest((1,), ((5,) * length,))]))


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="is not autoregressive"):
        next(Autoregressive()(tiny_denoiser("bert"), REQUESTS))
    with pytest.raises(ValueError, match="needs a context"):
        LikelihoodRequest((), ((1,),))
    with pytest.raises(ValueError, match="needs a context"):
        LikelihoodRequest((1,), ((),))
    with pytest.raises(ValueError, match="2 scales for 1 choices"):
        LikelihoodRequest((1,), ((2,),), scales=(1.0, 2.0))
    with pytest.raises(ValueError, match="min_rounds=1 must be at least 2"):
        MonteCarlo(min_rounds=1)


def test_the_best_choice_has_the_highest_scaled_log_probability() -> None:
    request = LikelihoodRequest((1,), ((2, 2), (3,), (4,)))
    assert request.best([-3.0, -2.0, -2.0]) == 1
    assert LikelihoodRequest((1,), ((2, 2), (3,)), scales=(0.5, 1.0)).best([-3.0, -2.0]) == 0


@pytest.mark.parametrize("tokenizer", [makers.byte_level(), makers.word_piece()], ids=["bytes", "words"])
def test_bits_per_byte_are_those_of_independent_windows(tokenizer: TextTokenizer) -> None:
    """The sum of the windows' log-probabilities over the bytes of the whole text, however it is split and decoded."""
    denoiser = tiny_denoiser("llama", Causal(), 1, vocab_size=320)
    text = "The cat  sat on the mat: über so! " * 8
    mean, se = bits_per_byte(denoiser, [text, "It is."], tokenizer, Autoregressive(), length=16)
    ids, total = tokenizer.encode(text), 0.0
    for window in [*(ids[i : i + 16] for i in range(0, len(ids), 16)), tokenizer.encode("It is.")]:
        (result,) = Autoregressive()(denoiser, [LikelihoodRequest((tokenizer.start_token_id,), (tuple(window),))])
        total -= result.log_prob[0]
    assert mean == pytest.approx(total / math.log(2) / (len(text.encode()) + 6))
    assert 0 < se < mean
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(denoiser, [], tokenizer, Autoregressive())
