"""Law 6: the estimated NELBO against exact enumeration, and exact log-probabilities along an order."""

from itertools import combinations, permutations, product
from math import comb, sqrt

import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import control_variate_estimates, estimate_bound, log_probability, stratified_masks

V, MASK = 3, 3


def predict(canvas: Canvas, clean: torch.Tensor) -> torch.Tensor:
    """A toy denoiser: logits from a fixed random table indexed by (left neighbour, right neighbour, position)."""
    table = torch.randn(V + 1, V + 1, 8, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    left, right = canvas.tokens.roll(1, 1), canvas.tokens.roll(-1, 1)
    position = torch.arange(canvas.tokens.shape[1]).expand_as(canvas.tokens)
    return table[left, right, position][canvas.open] * 1.5


def exact_bound(text: list[int], units: list[list[int]]) -> float:
    """The sum over units of the mean over l of (L / l) times the mean cross-entropy of all subsets of size l."""
    total = 0.0
    clean = Canvas.clean(torch.tensor([text]))
    for unit in units:
        for size in range(1, len(unit) + 1):
            for chosen in combinations(unit, size):
                open = torch.zeros(1, len(text), dtype=torch.bool)
                open[0, list(chosen)] = True
                canvas = Canvas(torch.where(open, MASK, clean.tokens), open, clean.editable, clean.document)
                log_probs = predict(canvas, clean.tokens).log_softmax(-1)
                nll = -log_probs.gather(1, clean.tokens[open][:, None]).sum()
                total += float(nll) / size / comb(len(unit), size)
    return total


def test_estimate_agrees_with_enumeration_within_its_standard_error() -> None:
    text = [0, 2, 1, 1, 2]
    for units, ids in (([[0, 1, 2, 3, 4]], [0, 0, 0, 0, 0]), ([[0, 1], [2, 3], [4]], [0, 0, 1, 1, 2])):
        # enumeration noises one block while the others stay clean, so estimate one unit at a time
        for number, unit in enumerate(units):
            clean = Canvas.clean(torch.tensor([text]).repeat(4000, 1))
            inside = torch.tensor([ids]) == number
            clean = Canvas(clean.tokens, clean.open, inside.expand(4000, -1), clean.document)
            rng = torch.Generator().manual_seed(number)
            bound = estimate_bound(predict, clean, clean.document, noise=MASK, samples=2, generator=rng)
            estimate = bound.nll.sum(1).double()
            truth = exact_bound(text, [unit])
            error = float(estimate.std()) / sqrt(4000)
            assert abs(float(estimate.mean()) - truth) < 3.5 * error + 1e-6, (unit, truth)


def test_bound_is_above_the_mixture_over_orders_and_probabilities_sum_to_one() -> None:
    """Law 6: decoding in a uniformly random order is a distribution over texts; the bound is above its -log."""
    texts = torch.tensor(list(product(range(V), repeat=3)))
    clean = Canvas.clean(texts)
    mixture = torch.zeros(len(texts), dtype=torch.float64)
    mean_log = torch.zeros(len(texts), dtype=torch.float64)
    for order in permutations(range(3)):
        log_probs = log_probability(predict, clean, torch.tensor([order]).expand(len(texts), 3), noise=MASK)
        torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
        mixture += log_probs.exp() / 6
        mean_log += log_probs / 6
    for text, total, average in zip(texts.tolist(), mixture, mean_log, strict=True):
        truth = exact_bound(text, [[0, 1, 2]])
        assert abs(truth + float(average)) < 1e-6  # the bound is the mean over orders of the negative log-probability
        assert truth >= -float(total.log()) - 1e-9


def test_stratified_masks_open_every_count_of_a_unit_once_over_its_size_in_samples() -> None:
    unit = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    clean = Canvas.clean(torch.zeros(1, 8, dtype=torch.long))
    counts = []
    for canvas, share in stratified_masks(clean, unit, 4, MASK, torch.Generator().manual_seed(0)):
        counts.append(canvas.open.view(2, 4).sum(1))
        torch.testing.assert_close(share.view(2, 4)[:, 0], counts[-1] / 4)
    assert torch.stack(counts).sort(0).values.tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_control_variates_keep_the_mean_and_lower_the_variance() -> None:
    """The variance is lower where some tokens are much harder than others, as in texts."""
    rows, rng = 3000, torch.Generator().manual_seed(1)
    clean = Canvas.clean(torch.tensor([[0, 2, 1, 1, 2]]).repeat(rows, 1))
    hard = torch.tensor([8.0, 0.1, 5.0, 0.5, 0.1], dtype=torch.float64)
    truth = float(hard.sum())
    nll, open, share = [], [], []
    for canvas, part in stratified_masks(clean, clean.document, 4, MASK, rng):
        noise = torch.rand(clean.tokens.shape, generator=rng, dtype=torch.float64) - 0.5
        nll.append((hard + noise) * canvas.open)
        open.append(canvas.open)
        share.append(part.double())
    nlls, opens, shares = torch.stack(nll), torch.stack(open), torch.stack(share)
    controlled = control_variate_estimates(nlls, opens, shares, clean.editable).mean(0)
    plain = (nlls / shares).sum(-1).mean(0)
    for estimate in (controlled, plain):
        assert abs(float(estimate.mean()) - truth) < 3.5 * float(estimate.std()) / sqrt(rows)
    assert float(controlled.std()) < 0.65 * float(plain.std())
    single = control_variate_estimates(nlls[:1], opens[:1], shares[:1], clean.editable)
    torch.testing.assert_close(single[0], (nlls / shares).sum(-1)[0])


def test_same_noise_opens_the_same_positions_of_every_row() -> None:
    texts = torch.tensor([[0, 1, 2, 1, 0, 2], [0, 2, 2, 1, 0, 1]])
    clean = Canvas.clean(texts)
    for canvas, share in stratified_masks(
        clean, clean.document, 3, MASK, torch.Generator().manual_seed(0), same_noise=True
    ):
        assert torch.equal(canvas.open[0], canvas.open[1]) and torch.equal(share[0], share[1])
