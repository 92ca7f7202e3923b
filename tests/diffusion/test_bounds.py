"""Law 6: the estimated bound against exact enumeration, and exact log-probabilities along an order."""

from itertools import combinations, permutations, product
from math import comb, sqrt

import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import bound, draws_compared, log_probability, mask_counts

V, MASK = 3, 3


def answer(canvas: Canvas, clean: torch.Tensor) -> torch.Tensor:
    """A toy denoiser that looks at everything: logits from a fixed random table of (position, neighbours)."""
    table = torch.randn(V + 1, V + 1, 8, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    left, right = canvas.tokens.roll(1, 1), canvas.tokens.roll(-1, 1)
    at = torch.arange(canvas.tokens.shape[1]).expand_as(canvas.tokens)
    return table[left, right, at][canvas.open] * 1.5


def exact_bound(text: list[int], units: list[list[int]]) -> float:
    """Sum over units of E over l of (L / l) * mean over subsets of size l of the cross-entropy inside."""
    total = 0.0
    clean = Canvas.clean(torch.tensor([text]))
    for unit in units:
        for size in range(1, len(unit) + 1):
            for chosen in combinations(unit, size):
                open = torch.zeros(1, len(text), dtype=torch.bool)
                open[0, list(chosen)] = True
                canvas = Canvas(torch.where(open, MASK, clean.tokens), open, clean.editable, clean.document)
                logp = answer(canvas, clean.tokens).log_softmax(-1)
                nll = -logp.gather(1, clean.tokens[open][:, None]).sum()
                total += float(nll) / size / comb(len(unit), size)
    return total


def test_the_estimate_agrees_with_enumeration_within_its_standard_error() -> None:
    text = [0, 2, 1, 1, 2]
    for units, ids in (([[0, 1, 2, 3, 4]], [0, 0, 0, 0, 0]), ([[0, 1], [2, 3], [4]], [0, 0, 1, 1, 2])):
        # blocks are noised apart, the others stay clean: what enumeration does, so estimate one unit at a time
        for number, unit in enumerate(units):
            clean = Canvas.clean(torch.tensor([text]).repeat(4000, 1))
            inside = torch.tensor([ids]) == number
            clean = Canvas(clean.tokens, clean.open, inside.expand(4000, -1), clean.document)
            rng = torch.Generator().manual_seed(number)
            estimate = bound(answer, clean, clean.document, noise=MASK, draws=2, generator=rng).nll.sum(1).double()
            truth = exact_bound(text, [unit])
            error = float(estimate.std()) / sqrt(4000)
            assert abs(float(estimate.mean()) - truth) < 3.5 * error + 1e-6, (unit, truth)


def test_the_bound_is_above_the_mixture_over_orders_and_normalises() -> None:
    """Law 6: writing in a uniformly random order is a distribution over texts; its -log is below the bound."""
    texts = torch.tensor(list(product(range(V), repeat=3)))
    clean = Canvas.clean(texts)
    mixture = torch.zeros(len(texts), dtype=torch.float64)
    mean_log = torch.zeros(len(texts), dtype=torch.float64)
    for order in permutations(range(3)):
        logp = log_probability(answer, clean, torch.tensor([order]).expand(len(texts), 3), noise=MASK)
        torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
        mixture += logp.exp() / 6
        mean_log += logp / 6
    for text, total, average in zip(texts.tolist(), mixture, mean_log, strict=True):
        truth = exact_bound(text, [[0, 1, 2]])
        assert abs(truth + float(average)) < 1e-6  # the bound is the mean over orders of the negative log-probability
        assert truth >= -float(total.log()) - 1e-9


def test_every_unit_opens_every_count_once_over_as_many_draws() -> None:
    unit = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    clean = Canvas.clean(torch.zeros(1, 8, dtype=torch.long))
    counts = []
    for canvas, share in mask_counts(clean, unit, 4, MASK, torch.Generator().manual_seed(0)):
        counts.append(canvas.open.view(2, 4).sum(1))
        torch.testing.assert_close(share.view(2, 4)[:, 0], counts[-1] / 4)
    assert torch.stack(counts).sort(0).values.tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_draws_that_are_compared_keep_the_mean_and_lose_much_of_the_error() -> None:
    """Where some tokens are much harder than others, as in texts."""
    rows, rng = 3000, torch.Generator().manual_seed(1)
    clean = Canvas.clean(torch.tensor([[0, 2, 1, 1, 2]]).repeat(rows, 1))
    hard = torch.tensor([8.0, 0.1, 5.0, 0.5, 0.1], dtype=torch.float64)
    truth = float(hard.sum())
    nll, open, share = [], [], []
    for canvas, part in mask_counts(clean, clean.document, 4, MASK, rng):
        noise = torch.rand(clean.tokens.shape, generator=rng, dtype=torch.float64) - 0.5
        nll.append((hard + noise) * canvas.open)
        open.append(canvas.open)
        share.append(part.double())
    every = torch.stack(nll), torch.stack(open), torch.stack(share)
    compared = draws_compared(*every, clean.editable).mean(0)
    plain = (every[0] / every[2]).sum(-1).mean(0)
    for estimate in (compared, plain):
        assert abs(float(estimate.mean()) - truth) < 3.5 * float(estimate.std()) / sqrt(rows)
    assert float(compared.std()) < 0.65 * float(plain.std())
    one = draws_compared(every[0][:1], every[1][:1], every[2][:1], clean.editable)
    torch.testing.assert_close(one[0], (every[0] / every[2]).sum(-1)[0])


def test_rows_that_are_alike_are_opened_alike() -> None:
    texts = torch.tensor([[0, 1, 2, 1, 0, 2], [0, 2, 2, 1, 0, 1]])
    clean = Canvas.clean(texts)
    for canvas, share in mask_counts(clean, clean.document, 3, MASK, torch.Generator().manual_seed(0), alike=True):
        assert torch.equal(canvas.open[0], canvas.open[1]) and torch.equal(share[0], share[1])
